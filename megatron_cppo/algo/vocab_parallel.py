"""Log-probabilities, entropies and exact KL divergences of logits whose vocabulary is split over ranks.

Owns the public functions and the only communication of the loss: one all-gather of a few floats per row in the forward,
nothing in the backward. The vocabulary is never gathered. It must not know whose rows these are, or what loss follows.

`token_statistics` and `kl_divergence` take logits and are the readable reference; `linear_statistics` and
`linear_divergence` compute the same numbers from hidden rows and the head's weight, without ever holding all logits.

Conventions of all four:
- `group` is the process group that the vocabulary is split over, in rank order and in shards of equal width; None means
  one rank. Every rank of it must call, also with N = 0, with the same rows.
- Columns from `vocab_size` on are padding, and `banned_ids` may not be sampled: both count as −∞ whatever they hold,
  NaN included, and get a gradient of exactly 0. The log-probability of such a target is −∞.
- Logits are divided by `temperature`. Statistics are float32 (float64 for float64 arguments) and the same to the last
  bit on every rank: all merge the same numbers in rank order.
- Gradients assume that every rank of the group computes the same loss from them (Megatron's convention).

Shapes: N rows (tokens), V columns of this rank's shard, H hidden size, R ranks, K statistics per row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_cppo.algo import linear_torch
from megatron_cppo.algo.shard_statistics import (
    Shard,
    divergence_gradients,
    divergence_sums,
    merge_divergence_sums,
    merge_token_sums,
    statistics_dtype,
    token_gradient,
    token_sums,
)

# One chunk's logits; the statistics and their gradients need about as much again.
CHUNK_BYTES = 512 * 2**20


@dataclass(frozen=True, slots=True)
class LinearBackend:
    """How one rank gets from hidden rows to its shard's sums, and back to gradients; see `linear_torch`."""

    token_sums: Callable[..., Tensor]
    token_gradients: Callable[..., tuple[Tensor, Tensor | None]]
    divergence_sums: Callable[..., Tensor]
    divergence_gradients: Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]


BACKENDS: dict[str, LinearBackend] = {
    "torch": LinearBackend(
        linear_torch.token_sums,
        linear_torch.token_gradients,
        linear_torch.divergence_sums,
        linear_torch.divergence_gradients,
    ),
}


def token_statistics(
    logits_NV: Tensor,
    targets_N: Tensor,
    *,
    group: dist.ProcessGroup | None,
    vocab_size: int,
    temperature: float = 1.0,
    banned_ids: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and Shannon entropy of each row, both [N], in nats, both differentiable.

    `logits_NV` is this rank's shard, `targets_N` holds vocabulary ids. Raises ValueError for an impossible `vocab_size`
    or `temperature`.
    """
    shard = _shard(logits_NV.shape[1], group, vocab_size, temperature, banned_ids)
    return _TokenStatistics.apply(logits_NV, targets_N, shard, group)


def kl_divergence(
    logits_p_NV: Tensor,
    logits_q_NV: Tensor,
    *,
    group: dist.ProcessGroup | None,
    vocab_size: int,
    temperature: float = 1.0,
    banned_ids: Sequence[int] = (),
) -> Tensor:
    """Exact KL(p‖q) of each row over the whole vocabulary, [N], in nats, differentiable in both arguments.

    Rounding can leave a KL of about 0 slightly negative. Raises ValueError for an impossible `vocab_size` or
    `temperature`.
    """
    assert logits_p_NV.shape == logits_q_NV.shape, f"{logits_p_NV.shape} against {logits_q_NV.shape}"
    shard = _shard(logits_p_NV.shape[1], group, vocab_size, temperature, banned_ids)
    return _Divergence.apply(logits_p_NV, logits_q_NV, shard, group)


def linear_statistics(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    group: dist.ProcessGroup | None,
    vocab_size: int,
    temperature: float = 1.0,
    banned_ids: Sequence[int] = (),
    backend: str = "torch",
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, Tensor]:
    """`token_statistics` of the logits `hidden_NH @ weight_VHᵀ`, which exist for `chunk_bytes` of rows at a time.

    The hidden rows' gradient is this rank's part of it, the sum over its own vocabulary shard: the caller adds the
    parts up over `group`, as the backward of Megatron's copy and gather regions does. The weight's gradient is
    complete. The weight's banned rows must be finite; its padding may hold anything. Raises ValueError as
    `token_statistics` does, and for an unknown `backend`.
    """
    shard = _shard(weight_VH.shape[0], group, vocab_size, temperature, banned_ids)
    return _LinearStatistics.apply(hidden_NH, weight_VH, targets_N, shard, group, _backend(backend), chunk_bytes)


def linear_divergence(
    hidden_p_NH: Tensor,
    hidden_q_NH: Tensor,
    weight_VH: Tensor,
    *,
    group: dist.ProcessGroup | None,
    vocab_size: int,
    temperature: float = 1.0,
    banned_ids: Sequence[int] = (),
    backend: str = "torch",
    chunk_bytes: int = CHUNK_BYTES,
    stop_gradient_q: bool = False,
) -> Tensor:
    """`kl_divergence` of the logits of two hidden rows under one head, differentiable in both rows and the weight.

    Gradients are as in `linear_statistics`. `stop_gradient_q` makes q a constant: neither `hidden_q_NH` nor, through q,
    the weight gets a gradient. Raises ValueError as `linear_statistics` does.
    """
    assert hidden_p_NH.shape == hidden_q_NH.shape, f"{hidden_p_NH.shape} against {hidden_q_NH.shape}"
    shard = _shard(weight_VH.shape[0], group, vocab_size, temperature, banned_ids)
    options = (shard, group, _backend(backend), chunk_bytes, stop_gradient_q)
    return _LinearDivergence.apply(hidden_p_NH, hidden_q_NH, weight_VH, *options)


def _shard(
    width: int, group: dist.ProcessGroup | None, vocab_size: int, temperature: float, banned_ids: Sequence[int]
) -> Shard:
    rank, world_size = (0, 1) if group is None else (group.rank(), group.size())
    return Shard.of_rank(
        rank,
        world_size=world_size,
        width=width,
        vocab_size=vocab_size,
        temperature=temperature,
        banned_ids=banned_ids,
    )


def _backend(name: str) -> LinearBackend:
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; choose one of {', '.join(BACKENDS)}")
    return BACKENDS[name]


def _gather(sums_KN: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Every rank's sums, [R, K, N]: the one collective."""
    if group is None or group.size() == 1:
        return sums_KN[None]
    gathered_RKN = sums_KN.new_empty(group.size(), *sums_KN.shape)
    dist.all_gather(list(gathered_RKN), sums_KN.contiguous(), group=group)
    return gathered_RKN


def _copy_valid(logits_NV: Tensor, shard: Shard) -> Tensor:
    return logits_NV[:, : shard.num_valid].to(statistics_dtype(logits_NV), copy=True)


def _pad(gradient_Nv: Tensor, logits_NV: Tensor) -> Tensor:
    padded_NV = torch.zeros_like(logits_NV)
    padded_NV[:, : gradient_Nv.shape[1]] = gradient_Nv
    return padded_NV


class _TokenStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, targets_N: Tensor, shard: Shard, group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor]:
        sums_4N = token_sums(_copy_valid(logits_NV, shard), targets_N, shard)
        merged_4N = merge_token_sums(_gather(sums_4N, group), shard.inverse_temperature)
        ctx.save_for_backward(logits_NV, targets_N, merged_4N)
        ctx.shard = shard
        ctx.set_materialize_grads(False)
        return merged_4N[2].clone(), merged_4N[3].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override]
        logits_NV, targets_N, merged_4N = ctx.saved_tensors
        logp_grad_N, entropy_grad_N = _token_grads(grad_outputs, merged_4N)
        logits_Nv = _copy_valid(logits_NV, ctx.shard)
        gradient_Nv = token_gradient(logits_Nv, targets_N, merged_4N, logp_grad_N, entropy_grad_N, ctx.shard)
        return _pad(gradient_Nv, logits_NV), None, None, None


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_p_NV: Tensor, logits_q_NV: Tensor, shard: Shard, group: dist.ProcessGroup | None
    ) -> Tensor:
        sums_5N = divergence_sums(_copy_valid(logits_p_NV, shard), _copy_valid(logits_q_NV, shard), shard)
        merged_5N = merge_divergence_sums(_gather(sums_5N, group), shard.inverse_temperature)
        ctx.save_for_backward(logits_p_NV, logits_q_NV, merged_5N)
        ctx.shard = shard
        return merged_5N[4].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override]
        logits_p_NV, logits_q_NV, merged_5N = ctx.saved_tensors
        logits_p_Nv, logits_q_Nv = _copy_valid(logits_p_NV, ctx.shard), _copy_valid(logits_q_NV, ctx.shard)
        p_Nv, q_Nv = divergence_gradients(logits_p_Nv, logits_q_Nv, merged_5N, grad_outputs[0], ctx.shard)
        return _pad(p_Nv, logits_p_NV), _pad(q_Nv, logits_q_NV), None, None


class _LinearStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        targets_N: Tensor,
        shard: Shard,
        group: dist.ProcessGroup | None,
        backend: LinearBackend,
        chunk_bytes: int,
    ) -> tuple[Tensor, Tensor]:
        sums_4N = backend.token_sums(hidden_NH, weight_VH, targets_N, shard, chunk_bytes)
        merged_4N = merge_token_sums(_gather(sums_4N, group), shard.inverse_temperature)
        ctx.save_for_backward(hidden_NH, weight_VH, targets_N, merged_4N)
        ctx.shard, ctx.backend, ctx.chunk_bytes = shard, backend, chunk_bytes
        ctx.set_materialize_grads(False)
        return merged_4N[2].clone(), merged_4N[3].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override]
        hidden_NH, weight_VH, targets_N, merged_4N = ctx.saved_tensors
        grads = ctx.backend.token_gradients(
            hidden_NH,
            weight_VH,
            targets_N,
            merged_4N,
            *_token_grads(grad_outputs, merged_4N),
            ctx.shard,
            ctx.chunk_bytes,
            needs_weight=ctx.needs_input_grad[1],
        )
        return *grads, *[None] * 5


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_p_NH: Tensor,
        hidden_q_NH: Tensor,
        weight_VH: Tensor,
        shard: Shard,
        group: dist.ProcessGroup | None,
        backend: LinearBackend,
        chunk_bytes: int,
        stop_gradient_q: bool,
    ) -> Tensor:
        sums_5N = backend.divergence_sums(hidden_p_NH, hidden_q_NH, weight_VH, shard, chunk_bytes)
        merged_5N = merge_divergence_sums(_gather(sums_5N, group), shard.inverse_temperature)
        ctx.save_for_backward(hidden_p_NH, hidden_q_NH, weight_VH, merged_5N)
        ctx.shard, ctx.backend, ctx.chunk_bytes, ctx.stop_gradient_q = shard, backend, chunk_bytes, stop_gradient_q
        return merged_5N[4].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override]
        hidden_p_NH, hidden_q_NH, weight_VH, merged_5N = ctx.saved_tensors
        grads = ctx.backend.divergence_gradients(
            hidden_p_NH,
            hidden_q_NH,
            weight_VH,
            merged_5N,
            grad_outputs[0],
            ctx.shard,
            ctx.chunk_bytes,
            needs_weight=ctx.needs_input_grad[2],
            stop_gradient_q=ctx.stop_gradient_q,
        )
        return *grads, *[None] * 5


def _token_grads(grad_outputs: tuple[Any, ...], merged_4N: Tensor) -> tuple[Tensor, Tensor | None]:
    """The gradients in the log-probs and in the entropies; None for entropies that the loss does not use."""
    logp_grad_N, entropy_grad_N = grad_outputs
    return torch.zeros_like(merged_4N[2]) if logp_grad_N is None else logp_grad_N, entropy_grad_N
