"""What vLLM loads of this project: the receiver of weights, the guard of its routes, what a server says of itself.

vLLM's own processes import this file by name (--worker-extension-cls, --middleware), in vLLM's environment, from a
folder of its own on PYTHONPATH: it needs torch and vLLM and nothing else of this project. The trainer's side of the
protocol is `rollout.weight_push`; both say `PROTOCOL`.

    init_weight_transfer_engine  {"transport": "gloo" | "nccl", "address", "port", "world_size", "first_rank"}
                                 {"transport": "shm" | "ipc", "buffers": [...]}
    update_weights, a bucket     {"number": 1, 2, ..., "buffer": 0 | 1, "num_bytes": ...,
                                  "tensors": [[name, dtype, shape, first byte], ...]}
"""

from __future__ import annotations

import base64
import dataclasses
import hmac
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

PROTOCOL = 2
BACKEND = "megatron_cppo"
TIMEOUT = timedelta(minutes=2)


@dataclasses.dataclass
class Meeting(WeightTransferInitInfo):
    """How the buckets come: by a broadcast among `world_size` ranks, or through `buffers` that both sides map."""

    transport: str
    address: str = ""
    port: int = 0
    world_size: int = 0
    first_rank: int = 0
    buffers: list[Any] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Bucket(WeightTransferUpdateInfo):
    """Tensors that lie one after the other in `num_bytes` of a buffer; the buckets of a load have numbers from 1."""

    number: int
    buffer: int
    num_bytes: int
    tensors: list[tuple[str, str, list[int], int]]


class Receiver(WeightTransferEngine[Meeting, Bucket]):
    """The worker's end: buckets of whole tensors, loaded as from a checkpoint, each rank keeping its slices."""

    init_info_cls, update_info_cls = Meeting, Bucket
    _buffers: Sequence[Tensor] = ()
    _group: Any = None
    _transport: str = ""
    _number: int = 0

    def init_transfer_engine(self, init_info: Meeting) -> None:
        """Meet the trainer, in place of an earlier meeting."""
        self.shutdown()
        self._transport = init_info.transport
        self._buffers = [BUFFERS[init_info.transport](told) for told in init_info.buffers]
        if init_info.transport in GROUPS:
            parallel = self.parallel_config
            rank = init_info.first_rank + parallel.data_parallel_index * parallel.world_size + parallel.rank
            self._group = meet(
                init_info.transport, init_info.address, init_info.port, rank=rank, world_size=init_info.world_size
            )

    def start_weight_update(self) -> None:
        """Let the layers take weights of the checkpoint's form again."""
        self._number = 0
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load one bucket; it is on the device when this returns, so that its buffer may be filled again."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type == "cuda":  # the base class's own synchronisation fails where there is no accelerator
            torch.cuda.synchronize(self.device)

    def receive_weights(self, update_info: Bucket) -> None:
        """Load one bucket. Raises ValueError when it is not the next one."""
        self._number += 1
        if update_info.number != self._number:
            raise ValueError(f"bucket {update_info.number} came when {self._number} was due")
        if self._group is not None:
            raw = torch.empty(update_info.num_bytes, dtype=torch.uint8, device=self.device)
            broadcast(self._group, raw)
        else:
            raw = self._buffers[update_info.buffer]
        self.model.load_weights(self._tensors(raw, update_info))

    def finish_weight_update(self) -> None:
        """Have every layer processed."""
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            repack_tied_weights(self.model)
        clear_deepstack(self.model)
        if self._transport == "ipc":  # the trainer takes this memory back
            self._buffers = ()

    def shutdown(self) -> None:
        """Let go of buffers and group."""
        if self._group is not None and self._transport == "nccl":
            self._group.abort()
        self._buffers, self._group = (), None

    def _tensors(self, raw: Tensor, bucket: Bucket) -> Iterator[tuple[str, Tensor]]:
        for name, dtype_name, shape, start in bucket.tensors:
            dtype = getattr(torch, dtype_name)
            stop = start + torch.Size(shape).numel() * dtype.itemsize
            tensor = raw[start:stop].view(dtype).view(shape)
            # A layer is processed when all of it has come; until then vLLM keeps what it was given.
            yield name, tensor if self._group is not None else tensor.to(self.device, copy=True)


def repack_tied_weights(model: torch.nn.Module) -> None:
    """Work around vLLM 0.32 on a CPU: a layer's weight is repacked for its matrix product when it is loaded, and a head
    that is tied to the embedding is never loaded, so it would keep the first weights for ever.
    """
    seen: set[int] = set()
    for module in model.modules():
        layer: Any = module
        weight = getattr(layer, "weight", None)
        if isinstance(weight, Tensor) and hasattr(layer, "cpu_linear") and weight.numel():
            if id(weight) in seen:
                layer.quant_method.process_weights_after_loading(layer)
            seen.add(id(weight))


def clear_deepstack(model: torch.nn.Module) -> None:
    """Work around vLLM 0.32: Qwen3-VL adds these to every token's hidden states, clears them after pictures only, and
    they are no buffers, so that a server that wakes from a deep sleep would add whatever the memory holds.
    """
    for module in model.modules():
        for features in vars(module).get("deepstack_input_embeds") or ():
            features.zero_()


def meet(backend: str, address: str, port: int, *, rank: int, world_size: int) -> Any:
    """A group beside the process's own ones."""
    store = dist.TCPStore(address, port, world_size, is_master=False, timeout=TIMEOUT)
    return GROUPS[backend](dist.PrefixStore("weights", store), rank, world_size)


def _gloo(store: dist.Store, rank: int, world_size: int) -> Any:
    return dist.ProcessGroupGloo(store, rank, world_size, TIMEOUT)


def _nccl(store: dist.Store, rank: int, world_size: int) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = TIMEOUT
    return dist.ProcessGroupNCCL(store, rank, world_size, options)


GROUPS: dict[str, Callable[[dist.Store, int, int], Any]] = {"gloo": _gloo, "nccl": _nccl}


def broadcast(group: Any, tensor: Tensor) -> None:
    """From rank 0, the trainer's, to all."""
    options = dist.BroadcastOptions()
    options.rootRank = options.rootTensor = 0
    group.broadcast([tensor], options).wait()


def _shared_memory(told: dict[str, Any]) -> Tensor:
    return torch.from_file(told["path"], shared=True, size=told["num_bytes"], dtype=torch.uint8)


def _of_same_gpu(told: dict[str, Any]) -> Tensor:
    """The trainer's buffer on this worker's GPU, of all that it tells of. Raises ValueError when none is."""
    here = torch.cuda.current_device()
    mine = str(torch.cuda.get_device_properties(here).uuid)
    if mine not in told:
        raise ValueError(f"the trainer has no buffer on this worker's GPU {mine}, only on {sorted(told)}")
    _, handle, num_bytes, offset, counter, counter_offset, event, event_sync = (
        base64.b64decode(part) if isinstance(part, str) else part for part in told[mine]
    )
    storage = torch.UntypedStorage._new_shared_cuda(
        here, handle, num_bytes, offset, counter, counter_offset, event, event_sync
    )
    return torch.empty(0, dtype=torch.uint8, device=f"cuda:{here}").set_(storage)


BUFFERS: dict[str, Callable[[dict[str, Any]], Tensor]] = {"shm": _shared_memory, "ipc": _of_same_gpu}


class Extension:
    """Named by --worker-extension-cls: each worker has these methods, and imports this file before the model."""

    def megatron_cppo_describe(self) -> dict[str, Any]:
        """What the trainer compares with its own plan."""
        worker: Any = self
        config = worker.vllm_config.model_config
        text = config.hf_config.get_text_config()
        return {
            "protocol": PROTOCOL,
            "model_type": config.hf_config.model_type,
            "hidden_size": text.hidden_size,
            "num_hidden_layers": text.num_hidden_layers,
            "vocab_size": text.vocab_size,
            "dtype": str(config.dtype).removeprefix("torch."),
            "logprobs_mode": str(config.logprobs_mode),
            "max_model_len": config.max_model_len,
            "max_num_seqs": worker.vllm_config.scheduler_config.max_num_seqs,
            "world_size": worker.vllm_config.parallel_config.world_size,
            "transfer": worker.vllm_config.weight_transfer_config.backend,
        }

    def megatron_cppo_end_load(self) -> None:
        """End a load that another driver has left open; vLLM's own call is an error where there is none."""
        worker: Any = self
        if worker._weight_update_active:
            worker.finish_weight_update()


class RequireKey:
    """Named by --middleware: every route but /health asks for the key of VLLM_API_KEY.

    vLLM's own guard knows the OpenAI routes only; those that pause, replace weights or call methods are open.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app
        self._expected = f"Bearer {os.environ['VLLM_API_KEY']}".encode()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Pass a request on, or answer 401."""
        if scope["type"] in ("http", "websocket") and scope["path"] != "/health":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                if scope["type"] == "websocket":
                    await send({"type": "websocket.close", "code": 1008})
                    return
                await send({"type": "http.response.start", "status": 401, "headers": []})
                await send({"type": "http.response.body", "body": b"the key is missing or wrong"})
                return
        await self._app(scope, receive, send)


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, Receiver)
