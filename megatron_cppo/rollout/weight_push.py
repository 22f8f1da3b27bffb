"""Weights to the servers, bucket by bucket, without a disk: the trainer's side of `inside_vllm`.

Whole tensors come from the policy one at a time; they are laid side by side in one of two buffers, and while the
servers load one, the other is filled. The bytes go through memory that both sides map (shm on a CPU, ipc on a shared
GPU) or by a broadcast (gloo, nccl); what lies where goes over HTTP. A server has the new version when all of it is
loaded, all caches are empty and it says so itself; until then it is asked nothing.
"""

from __future__ import annotations

import base64
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cppo.rollout.engine import EngineError
from megatron_cppo.rollout.fleet import Fleet, Server

PROTOCOL = 1
"""What a server must say that it speaks; `inside_vllm` says the same."""
ALIGNMENT = 64
MEMORY = Path("/dev/shm")
TIMEOUT = timedelta(minutes=2)
CACHES = ("prefix", "mm", "encoder")
"""Of a server; each of them holds what the old weights made (https://github.com/vllm-project/vllm/issues/44910)."""
Entry = tuple[str, str, list[int], int]


def checked(
    weights: Iterable[tuple[str, Tensor]], expected: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, Tensor]]:
    """The same tensors. Raises EngineError at one that is unknown, repeated or misshapen, and at the end when some are
    missing: a server would keep its old ones and say nothing.
    """
    missing = dict(expected)
    for name, tensor in weights:
        if name not in missing:
            known = "was sent twice in one load" if name in expected else "is unknown to this model"
            raise EngineError(f"weight '{name}' {known}; send the names of its own checkpoint, each once")
        if tuple(tensor.shape) != missing[name]:
            raise EngineError(f"weight '{name}' has shape {tuple(tensor.shape)}, the model needs {missing[name]}")
        del missing[name]
        yield name, tensor
    if missing:
        raise EngineError(f"{len(missing)} weights are missing, the first: {sorted(missing)[:4]}; send all in one load")


@dataclass(slots=True)
class Buffers:
    """Two buffers, and what the servers must be told to find them."""

    raw: tuple[Tensor, Tensor]
    told: list[Any] = field(default_factory=list)
    release: Callable[[], None] = lambda: None


def _plain(num_bytes: int, device: torch.device) -> Buffers:
    return Buffers((_bytes(num_bytes, device), _bytes(num_bytes, device)))


def _bytes(num_bytes: int, device: torch.device) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, device=device)


def _shared_memory(num_bytes: int, device: torch.device) -> Buffers:
    """Files of /dev/shm that only this user reads; their names go as soon as all servers have mapped them."""
    raw, paths = [], []
    for _ in range(2):
        descriptor, path = tempfile.mkstemp(prefix="megatron_cppo_", dir=MEMORY)
        paths.append(path)
        try:
            os.posix_fallocate(descriptor, 0, num_bytes)  # else a full /dev/shm is a SIGBUS later
        except OSError as error:
            for made in paths:
                os.unlink(made)
            raise EngineError(
                f"{MEMORY} has no room for two buckets of {num_bytes >> 20} MiB ({error.strerror}); give "
                "the machine (the container) more shared memory"
            ) from error
        finally:
            os.close(descriptor)
        raw.append(torch.from_file(path, shared=True, size=num_bytes, dtype=torch.uint8))

    def release() -> None:
        for path in paths:
            os.unlink(path)

    return Buffers((raw[0], raw[1]), [{"path": path, "num_bytes": num_bytes} for path in paths], release)


def _of_this_gpu(num_bytes: int, device: torch.device) -> Buffers:
    """Buffers of this rank's GPU, told by its UUID: a server's worker on the same GPU maps them (CUDA IPC)."""
    buffers, uuid = _plain(num_bytes, device), str(torch.cuda.get_device_properties(device).uuid)
    for raw in buffers.raw:
        handle: list[Any] = [
            base64.b64encode(part).decode() if isinstance(part, bytes) else part
            for part in raw.untyped_storage()._share_cuda_()
        ]
        buffers.told.append({uuid: handle})
    return buffers


BUFFERS: dict[str, Callable[[int, torch.device], Buffers]] = {
    "shm": _shared_memory,
    "ipc": _of_this_gpu,
    "gloo": _plain,
    "nccl": _plain,
}


@dataclass(eq=False, slots=True)
class WeightPush:
    """Sends the policy's weights to all usable servers. Called by all ranks; the one with the `fleet` speaks to them.

    `group` is the trainer's, `address` where servers find the driver for a broadcast.
    """

    fleet: Fleet | None
    transport: str
    bucket_bytes: int
    expected: Mapping[str, tuple[int, ...]]
    device: torch.device
    group: dist.ProcessGroup | None
    address: str
    num_bytes: int = 0
    """Of the last push."""
    num_buckets: int = 0
    _targets: list[Server] = field(default_factory=list)
    _sent: tuple[list[Future[Any]], list[Future[Any]]] = field(default_factory=lambda: ([], []))
    _buffers: Buffers | None = None
    _broadcast: Any = None
    _met: tuple[tuple[int, int], ...] = ()

    def __call__(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        """Send all of them. Raises EngineError, on all ranks, when they are not those of the model: no server is asked
        anything then before a whole load. A server that fails alone is out alone.
        """
        self.num_bytes = self.num_buckets = 0
        complete = False
        self._agree(self._begin())
        try:
            self._send(weights)
            complete = True
        finally:
            if not complete:
                self._abandon()
        self._finish(version)

    def _begin(self) -> EngineError | None:
        """Have the servers ready to load. What keeps the driver from it is returned: the others would wait for it."""
        if self.fleet is not None:
            self.fleet.hold()
            self._targets = self.fleet.usable()
        try:
            self._meet()
        except EngineError as error:
            return error
        self._all("/start_weight_update")
        return None

    def _agree(self, error: EngineError | None) -> None:
        """Raise the driver's error on all ranks."""
        shared = [error]
        if self.group is not None:
            dist.broadcast_object_list(shared, group=self.group, group_src=0)
        if shared[0] is not None:
            raise shared[0]

    def _meet(self) -> None:
        """Have buffers that the servers know: made once, and told again when a server is another."""
        largest = max(torch.Size(shape).numel() for shape in self.expected.values()) * 4
        makes = self.fleet is not None or self.transport == "ipc"
        if self.transport == "shm" or self._buffers is None:
            self._buffers = BUFFERS[self.transport](max(self.bucket_bytes, largest), self.device) if makes else None
        told = [] if self._buffers is None else self._buffers.told
        if self.transport == "ipc":
            told = self._gathered(told)
        met = tuple((server.index, server.starts) for server in self._targets)
        if self.transport == "shm" or (met != self._met and self.transport == "ipc"):
            self._all("/init_weight_transfer_engine", {"init_info": {"transport": self.transport, "buffers": told}})
        elif met != self._met and self.fleet is not None and self._targets:
            try:
                self._broadcast = self._broadcast_group()
            except (EngineError, RuntimeError) as error:
                self._break(str(error))
        self._met = met
        if self._buffers is not None:
            self._buffers.release()

    def _gathered(self, told: list[Any]) -> list[Any]:
        """The handles of all ranks' buffers, by GPU."""
        every: list[list[Any]] = [told]
        if self.group is not None:
            every = [[]] * dist.get_world_size(self.group)
            dist.all_gather_object(every, told, group=self.group)
        return [{uuid: handle for rank in every for uuid, handle in rank[which].items()} for which in range(2)]

    def _broadcast_group(self) -> Any:
        """The driver as rank 0, and every worker of every server."""
        assert self.fleet is not None, "the driver alone broadcasts"
        sizes = [self.fleet.get(server, "/get_world_size").result()["world_size"] for server in self._targets]
        world_size = 1 + sum(sizes)
        store = dist.TCPStore(self.address, 0, world_size, is_master=True, timeout=TIMEOUT, wait_for_workers=False)
        first, meetings = 1, []
        for server, size in zip(self._targets, sizes, strict=True):
            info = {"address": self.address, "port": store.port, "world_size": world_size, "first_rank": first}
            body = {"init_info": {"transport": self.transport} | info}
            meetings.append(self.fleet.post(server, "/init_weight_transfer_engine", body))
            first += size
        prefixed = dist.PrefixStore("weights", store)
        if self.transport == "nccl":
            group = dist.ProcessGroupNCCL(prefixed, 0, world_size, dist.ProcessGroupNCCL.Options())
        else:
            group = dist.ProcessGroupGloo(prefixed, 0, world_size, TIMEOUT)
        for meeting in meetings:
            meeting.result()
        return group

    def _send(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        which, start = 0, 0
        tensors: list[Entry] = []
        for name, tensor in checked(weights, self.expected):
            room = 0 if self._buffers is None else len(self._buffers.raw[0])
            if tensors and start + tensor.nbytes > max(room, self.bucket_bytes):
                self._flush(which, start, tensors)
                which, start, tensors = 1 - which, 0, []
                self._await(which)
            if self._buffers is not None:
                self._buffers.raw[which][start : start + tensor.nbytes].copy_(_as_bytes(tensor))
            dtype = str(tensor.dtype).removeprefix("torch.")
            tensors.append((name, dtype, list(tensor.shape), start))
            start += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        self._flush(which, start, tensors)
        for each in (0, 1):
            self._await(each)

    def _flush(self, which: int, num_bytes: int, tensors: list[Entry]) -> None:
        """Have the servers load a buffer; returns before they have."""
        self.num_bytes += num_bytes
        self.num_buckets += 1
        self._same_place()
        if self.fleet is None:
            return
        body = {"update_info": {"buffer": which, "num_bytes": num_bytes, "tensors": tensors}}
        self._sent[which].extend(self.fleet.post(server, "/update_weights", body) for server in self._targets)
        if self._broadcast is not None and self._targets:
            assert self._buffers is not None, "the driver has buffers"
            options = dist.BroadcastOptions()
            options.rootRank = options.rootTensor = 0
            try:
                self._broadcast.broadcast([self._buffers.raw[which][:num_bytes]], options).wait()
            except RuntimeError as error:
                self._break(str(error))

    def _await(self, which: int) -> None:
        """Until the servers have loaded a buffer, which may then be filled again."""
        for loaded in self._sent[which]:
            self._survives(loaded)
        self._sent[which].clear()
        self._same_place()

    def _same_place(self) -> None:
        """With buffers on every rank, none may be filled before all are read, or read before all are filled."""
        if self.transport == "ipc":
            torch.cuda.synchronize(self.device)
            if self.group is not None:
                dist.barrier(self.group)

    def _finish(self, version: int) -> None:
        """Only a server that says that it has the version, with empty caches, is asked again."""
        if self.fleet is None:
            return
        label = self.fleet.label(version)
        self._all("/finish_weight_update", {"weight_version": label})
        for cache in CACHES:
            self._all(f"/reset_{cache}_cache")
        for server in self._targets:
            told = self._survives(self.fleet.get(server, "/weight_info"))
            if told is not None and told.get("weight_version") != label:
                self.fleet.fail(server, f"it has the weights {told}, was sent {label}")
        self._all("/resume")
        self.fleet.version = version
        for server in self._targets:
            if server.state != "failed":
                self.fleet.has(server, version)
        self.fleet.let_go()

    def _abandon(self) -> None:
        """End a load that is not whole, so that another can begin; what a server has now has no version."""
        if self.fleet is None:
            return
        self.fleet.version = -1
        for sent in self._sent:
            sent.clear()
        if self._broadcast is not None:
            self._break("the weights were not all there")
        self._all("/finish_weight_update", {"weight_version": self.fleet.label(-1)})
        for server in self._targets:
            self.fleet.lacks(server)

    def _break(self, why: str) -> None:
        """Give a broadcast up. It needs all of its servers: whose workers wait for bytes now, must be started again.

        The driver goes on with the weights, which the ranks gather together, and sends them to nobody.
        """
        assert self.fleet is not None, "the driver alone broadcasts"
        for server in self._targets:
            self.fleet.fail(server, f"the broadcast of weights broke off ({why})")
        self._targets, self._broadcast, self._met = [], None, ()

    def _all(self, path: str, body: Any = None) -> None:
        """Call a route of all servers that are still in."""
        if self.fleet is None:
            return
        calls = [self.fleet.post(server, path, body) for server in self._targets if server.state != "failed"]
        for call in calls:
            self._survives(call)
        self._targets = [server for server in self._targets if server.state != "failed"]

    def _survives(self, call: Future[Any]) -> Any:
        """What a call brings; None where its server failed, which is then out by itself."""
        try:
            return call.result()
        except EngineError as error:
            if self._broadcast is not None:
                self._break(str(error))
            return None


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
