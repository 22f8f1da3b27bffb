"""What one rank of a stage holds while it trains: the policy's own modules, buffers and passes, with bytes counted.

Runs on whatever tensors there are, true ones or fake ones (`fake.py`). Knows nothing of GPUs, engines or allowances,
and of schedules only that a row's backward comes after its forward; `sizing.py` says what comes of it.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from megatron_cppo import fp8
from megatron_cppo.algo.objective import Counts
from megatron_cppo.config import Config
from megatron_cppo.plan import Plan
from megatron_cppo.policy import build, step
from megatron_cppo.policy.allocations import Allocations
from megatron_cppo.policy.checkpoint import initialise_adam
from megatron_cppo.policy.groups import Groups, gathered_sequences
from megatron_cppo.policy.head import Head, HeadSettings, Remembered
from megatron_cppo.policy.held import inner_optimizers
from megatron_cppo.policy.policy import loss_settings
from megatron_cppo.policy.reference import Reference
from megatron_cppo.policy.vision import Pixels
from megatron_cppo.sizing import ChunkBytes, StageBytes
from megatron_cppo.types import Batch, MicroBatch

CPU = torch.device("cpu")


def measure(config: Config, plan: Plan, batches: Iterable[Batch], groups: Groups, pixels: Pixels) -> StageBytes:
    """Build this rank's part, and run the first row of each batch forward and backward through each of its chunks.

    Of the rows that one counts whose backward needs the most. Nothing is loaded: weights are what memory held.
    """
    started, allocations = time.monotonic(), Allocations()
    with allocations:
        trained = _build(config, plan, groups, pixels)
        with allocations.span() as reference:
            other = Reference(trained.parameters(), on_host=False) if _on_device(config, plan) else None
        runs = [passes(config, plan, batch, trained, allocations) for batch in batches]
        with allocations.span() as reduction:
            step.finalize_gradients(groups)(list(trained.wrapped))
    del other
    return StageBytes(
        parameters=distinct_bytes(_held(trained.chunks)),
        vision_parameters=sum(p.nbytes for chunk in trained.chunks for p in _tower(chunk).parameters()),
        gradients=distinct_bytes(_gradients(trained)),
        optimizer=distinct_bytes(_states(trained), beside=_held(trained.chunks)),
        reference=reference.kept,
        buffers=_shared_bytes(),
        chunks=tuple(max(every, key=lambda chunk: chunk.backward_peak) for every in zip(*runs, strict=True)),
        reduction=reduction.peak,
        seconds=time.monotonic() - started,
    )


def distinct_bytes(tensors: Iterable[Tensor], *, beside: Iterable[Tensor] = ()) -> int:
    """Bytes of the storages under `tensors`, each once, but for those that are under `beside`."""
    known = {id(tensor.untyped_storage()) for tensor in beside}
    storages = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storage.nbytes() for key, storage in storages.items() if key not in known)


def _build(config: Config, plan: Plan, groups: Groups, pixels: Pixels) -> build.Trained:
    # Of the device only the modules' choice of kernels depends, which are the caller's to stand in for. FP8 and moments
    # in bf16 are Transformer Engine's: its copies, and the smaller moments, are the arithmetic's (`sizing`).
    precision = "fp32" if config.policy.precision == "fp32" else "bf16"
    overrides = tuple(o for o in config.policy.megatron_overrides if o.partition("=")[0] != fp8.PARAMETERS)
    policy = dataclasses.replace(config.policy, device="cpu", precision=precision, megatron_overrides=overrides)
    chunks = build.make_chunks(plan, model=config.model, policy=policy, pixels=pixels, groups=groups, device=CPU)
    optimizer = dataclasses.replace(config.optimizer, state_precision="fp32")
    trained = build.make_trained(plan, chunks, policy=policy, optimizer=optimizer)
    initialise_adam(trained)
    return trained


def passes(
    config: Config, plan: Plan, batch: Batch, trained: build.Trained, allocations: Allocations
) -> list[ChunkBytes]:
    """The first row of `batch`, forward and backward through each chunk; `allocations` is to be entered."""
    settings, mini = loss_settings(config, plan, ()), batch.updates[0]
    counts = Counts(mini.num_tokens, mini.num_samples, mini.num_gated_samples, 1, settings.max_response_tokens, 1)
    function = step.contribution(trained.device, batch, counts, settings)
    row = mini.microbatches[0][0]
    return [_run(trained, number, row, function, settings.head, allocations) for number in range(len(trained.chunks))]


def _run(
    trained: build.Trained,
    number: int,
    row: MicroBatch,
    function: step.RowFunction,
    head: HeadSettings,
    allocations: Allocations,
) -> ChunkBytes:
    """A row through one chunk and back, as Megatron-Core's schedules take it: what is received, sent and returned is
    held until the backward's end."""
    chunk, received, seen = trained.chunks[number], None, None
    tower, shared = _Watched(_tower(chunk), allocations), _shared_bytes()
    gc.collect()  # or cycles of an earlier pass end within this one, at a moment that chance decides
    with allocations.span() as forward, tower:
        if not chunk.pre_process:
            received = _hidden(chunk, row).requires_grad_()
            chunk.set_input_tensor(received)
        output = trained.wrapped[number](row)
        sent = 0 if chunk.post_process else output.nbytes
        if chunk.post_process:
            output, seen = function(row, Head(chunk, row, output, head, _remembered(chunk, row)))
    gc.collect()
    with allocations.span() as backward:
        gradient = None if chunk.post_process else torch.empty_like(output)
        torch.autograd.backward(output, grad_tensors=gradient)
    del seen
    shared = _shared_bytes() - shared  # made by the first pass, for good
    return ChunkBytes(
        forward_peak=forward.peak - shared,
        kept=forward.kept - shared,
        backward_peak=forward.kept + backward.peak - shared,
        vision=tower.kept,
        received=0 if received is None else received.nbytes,
        sent=sent,
    )


def _shared_bytes() -> int:
    """Of the buffers that Megatron-Core gathers sequences into, in all layers alike."""
    return distinct_bytes(gathered_sequences())


class _Watched:
    """Counts what the passes of a module keep."""

    def __init__(self, module: nn.Module, allocations: Allocations) -> None:
        self._module, self._allocations, self._before, self.kept = module, allocations, 0, 0

    def __enter__(self) -> _Watched:
        self._hooks = [
            self._module.register_forward_pre_hook(self._enter),
            self._module.register_forward_hook(self._leave),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _enter(self, *_: object) -> None:
        self._before = self._allocations.live_bytes

    def _leave(self, *_: object) -> None:
        self.kept += self._allocations.live_bytes - self._before


def _hidden(chunk: Any, row: MicroBatch) -> Tensor:
    """Hidden states [L, 1, H] as another stage sends them."""
    local = row.token_ids_T.numel() // chunk.groups.context.size()
    local //= chunk.groups.tensor.size() if chunk.config.sequence_parallel else 1
    return torch.empty(local, 1, chunk.shape.hidden_size, dtype=chunk.config.params_dtype)


def _remembered(chunk: Any, row: MicroBatch) -> dict[Any, Remembered]:
    """What an earlier pass would have left of the row's constants, dealt evenly over the context ranks."""
    counts = torch.bincount(row.sample_N, minlength=len(row.sample_ids)).tolist()
    lengths = dict(zip(row.sample_ids, counts, strict=True))
    size, found = chunk.groups.context.size(), {}
    for index, view in row.constants:
        rank_N = torch.arange(lengths[index]) * size // lengths[index]
        held = int((rank_N == chunk.groups.context.rank()).sum())
        hidden_nH = torch.empty(held, chunk.shape.hidden_size, dtype=chunk.config.params_dtype)
        found[index, view] = Remembered(hidden_nH, rank_N)
    return found


def _on_device(config: Config, plan: Plan) -> bool:
    return plan.uses_reference and config.policy.reference == "device"


def _tower(chunk: Any) -> nn.Module:
    """The vision tower, or a module without anything."""
    return getattr(chunk, "visual", nn.Identity())


def _held(chunks: Iterable[nn.Module]) -> list[Tensor]:
    return [tensor for chunk in chunks for tensor in (*chunk.parameters(), *chunk.buffers())]


def _gradients(trained: build.Trained) -> list[Tensor]:
    """DDP's, in fp32."""
    parameters: Iterable[Any] = trained.parameters()
    return [parameter.main_grad for parameter in parameters if parameter.requires_grad]


def _states(trained: build.Trained) -> list[Tensor]:
    """Master weights and what Adam keeps of each."""
    found = []
    for inner in inner_optimizers(trained):
        found += [weight for group in inner.optimizer.param_groups for weight in group["params"]]
        found += [value for state in inner.optimizer.state.values() for value in state.values()]
    return [tensor for tensor in found if isinstance(tensor, Tensor)]
