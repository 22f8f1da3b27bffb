"""The plain-torch backend of the head's statistics: hidden rows → sums and gradients of one vocabulary shard.

Owns the projection and its backward, a chunk of rows at a time, so that logits exist for one chunk only and are
computed again when the gradient is asked for. It knows nothing of other ranks.

Products are accumulated and kept in float32 whatever the weights' dtype: a KL divergence of 1e-3 nat drowns in logits
rounded to bfloat16.

Shapes: N rows (tokens), H hidden size, V columns of this shard, n rows of one chunk, v its valid columns, K statistics.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_cppo.algo import shard_statistics
from megatron_cppo.algo.shard_statistics import Shard, statistics_dtype

# Columns of the weight that are upcast, or have their gradient added up, at once.
TILE_COLUMNS = 16384


def token_sums(hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, shard: Shard, chunk_bytes: int) -> Tensor:
    """`shard_statistics.token_sums` of the rows' logits, [4, N]."""
    head_vH = weight_VH[: shard.num_valid]
    sums_4N = hidden_NH.new_empty(4, hidden_NH.shape[0], dtype=statistics_dtype(hidden_NH))
    for rows in _chunks(hidden_NH, shard, chunk_bytes):
        logits_nv = _project(hidden_NH[rows], head_vH)
        sums_4N[:, rows] = shard_statistics.token_sums(logits_nv, targets_N[rows], shard)
    return sums_4N


def token_gradients(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    merged_4N: Tensor,
    logp_grad_N: Tensor,
    entropy_grad_N: Tensor | None,
    shard: Shard,
    chunk_bytes: int,
    needs_weight: bool,
) -> tuple[Tensor, Tensor | None]:
    """This shard's part of the hidden rows' gradient, and the gradient of its weight."""
    head_vH = weight_VH[: shard.num_valid]
    hidden_grad_NH = torch.empty_like(hidden_NH)
    weight_grad_VH = _zeros_for(weight_VH) if needs_weight else None
    for rows in _chunks(hidden_NH, shard, chunk_bytes):
        logits_nv = _project(hidden_NH[rows], head_vH)
        gradient_nv = shard_statistics.token_gradient(
            logits_nv,
            targets_N[rows],
            merged_4N[:, rows],
            logp_grad_N[rows],
            None if entropy_grad_N is None else entropy_grad_N[rows],
            shard,
        )
        hidden_grad_NH[rows] = _backpropagate(gradient_nv, hidden_NH[rows], head_vH, weight_grad_VH)
    return hidden_grad_NH, None if weight_grad_VH is None else weight_grad_VH.to(weight_VH.dtype)


def divergence_sums(
    hidden_p_NH: Tensor, hidden_q_NH: Tensor, weight_VH: Tensor, shard: Shard, chunk_bytes: int
) -> Tensor:
    """`shard_statistics.divergence_sums` of both rows' logits, [5, N]."""
    head_vH = weight_VH[: shard.num_valid]
    sums_5N = hidden_p_NH.new_empty(5, hidden_p_NH.shape[0], dtype=statistics_dtype(hidden_p_NH))
    for rows in _chunks(hidden_p_NH, shard, chunk_bytes // 2):
        logits_p_nv, logits_q_nv = _project(hidden_p_NH[rows], head_vH), _project(hidden_q_NH[rows], head_vH)
        sums_5N[:, rows] = shard_statistics.divergence_sums(logits_p_nv, logits_q_nv, shard)
    return sums_5N


def divergence_gradients(
    hidden_p_NH: Tensor,
    hidden_q_NH: Tensor,
    weight_VH: Tensor,
    merged_5N: Tensor,
    kl_grad_N: Tensor,
    shard: Shard,
    chunk_bytes: int,
    needs_weight: bool,
    stop_gradient_q: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """This shard's part of both hidden gradients, and the weight's; nothing flows through q where it is a constant."""
    head_vH = weight_VH[: shard.num_valid]
    hidden_p_grad_NH = torch.empty_like(hidden_p_NH)
    hidden_q_grad_NH = None if stop_gradient_q else torch.empty_like(hidden_q_NH)
    weight_grad_VH = _zeros_for(weight_VH) if needs_weight else None
    for rows in _chunks(hidden_p_NH, shard, chunk_bytes // 2):
        logits_p_nv, logits_q_nv = _project(hidden_p_NH[rows], head_vH), _project(hidden_q_NH[rows], head_vH)
        gradient_p_nv, gradient_q_nv = shard_statistics.divergence_gradients(
            logits_p_nv, logits_q_nv, merged_5N[:, rows], kl_grad_N[rows], shard
        )
        hidden_p_grad_NH[rows] = _backpropagate(gradient_p_nv, hidden_p_NH[rows], head_vH, weight_grad_VH)
        if hidden_q_grad_NH is not None:
            hidden_q_grad_NH[rows] = _backpropagate(gradient_q_nv, hidden_q_NH[rows], head_vH, weight_grad_VH)
    weight_grad = None if weight_grad_VH is None else weight_grad_VH.to(weight_VH.dtype)
    return hidden_p_grad_NH, hidden_q_grad_NH, weight_grad


def _chunks(hidden_NH: Tensor, shard: Shard, chunk_bytes: int) -> Iterator[slice]:
    """Slices of as many rows as have `chunk_bytes` of logits, at least one."""
    row_bytes = max(1, shard.num_valid) * statistics_dtype(hidden_NH).itemsize
    num_rows = max(1, chunk_bytes // row_bytes)
    for first in range(0, hidden_NH.shape[0], num_rows):
        yield slice(first, first + num_rows)


def _tiles(num_columns: int) -> Iterator[slice]:
    for first in range(0, num_columns, TILE_COLUMNS):
        yield slice(first, first + TILE_COLUMNS)


def _project(hidden_nH: Tensor, head_vH: Tensor) -> Tensor:
    dtype = statistics_dtype(hidden_nH)
    if hidden_nH.is_cuda or hidden_nH.dtype == dtype:
        return _product(hidden_nH, head_vH.t(), dtype)
    # Without mixed-precision products the weight is upcast, and never the whole of it at once.
    logits_nv = hidden_nH.new_empty(hidden_nH.shape[0], head_vH.shape[0], dtype=dtype)
    for tile in _tiles(head_vH.shape[0]):
        logits_nv[:, tile] = _product(hidden_nH, head_vH[tile].t(), dtype)
    return logits_nv


def _backpropagate(gradient_nv: Tensor, hidden_nH: Tensor, head_vH: Tensor, weight_grad_VH: Tensor | None) -> Tensor:
    """The hidden rows' gradient; the weight's, if wanted, is added to `weight_grad_VH`."""
    dtype = gradient_nv.dtype
    hidden_grad_nH = torch.zeros_like(hidden_nH, dtype=dtype)
    for tile in _tiles(head_vH.shape[0]):
        hidden_grad_nH += _product(gradient_nv[:, tile], head_vH[tile], dtype)
        if weight_grad_VH is not None:
            weight_grad_VH[: head_vH.shape[0]][tile] += _product(gradient_nv[:, tile].t(), hidden_nH, dtype)
    return hidden_grad_nH


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b accumulated and returned in `dtype`; on CUDA, half-precision `b` brings `a` to its own precision."""
    if b.is_cuda and b.dtype != dtype:
        return torch.mm(a.to(b.dtype), b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def _zeros_for(weight_VH: Tensor) -> Tensor:
    return torch.zeros_like(weight_VH, dtype=statistics_dtype(weight_VH))
