"""Hidden rows × the head's weight, and back: the three matrix products of a head, accumulated and kept in float32.

A KL divergence of 1e-3 nat drowns in logits rounded to bfloat16, so products of half-precision tensors come out in
float32: by mixed-precision products on CUDA, elsewhere by upcasting a tile of the weight at a time.

Shapes: N rows (tokens), H hidden size, C columns (of the weight, all of them or a tile).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron_cppo.algo.shard_statistics import statistics_dtype

# Columns of a weight that are upcast at once.
UPCAST_COLUMNS = 4096


def project(hidden_NH: Tensor, head_CH: Tensor) -> Tensor:
    """Logits [N, C], float32 (float64 for float64)."""
    dtype = statistics_dtype(hidden_NH)
    if hidden_NH.is_cuda or hidden_NH.dtype == head_CH.dtype == dtype:
        return _product(hidden_NH, head_CH.t(), dtype)
    logits_NC = hidden_NH.new_empty(hidden_NH.shape[0], head_CH.shape[0], dtype=dtype)
    hidden_NH = hidden_NH.to(dtype)
    for tile in _tiles(head_CH.shape[0]):
        torch.mm(hidden_NH, head_CH[tile].to(dtype).t(), out=logits_NC[:, tile])
    return logits_NC


def add_gradients_(
    totals: Sequence[Tensor | None],
    weight_total_CH: Tensor | None,
    gradients: Sequence[Tensor | None],
    hiddens: Sequence[Tensor],
    head_CH: Tensor,
) -> None:
    """Every view's gradient in its logits, back to its hidden rows and to the weight; None is what nobody asked for."""
    for total_NH, gradient_NC, hidden_NH in zip(totals, gradients, hiddens, strict=True):
        if total_NH is None or gradient_NC is None:
            continue
        _add_hidden_gradient_(total_NH, gradient_NC, head_CH)
        if weight_total_CH is not None:
            _add_weight_gradient_(weight_total_CH, gradient_NC, hidden_NH)


def _add_hidden_gradient_(total_NH: Tensor, gradient_NC: Tensor, head_CH: Tensor) -> None:
    """total += gradient @ head, in the total's precision."""
    if head_CH.is_cuda or head_CH.dtype == total_NH.dtype:
        total_NH += _product(gradient_NC, head_CH, total_NH.dtype)
        return
    for tile in _tiles(head_CH.shape[0]):
        total_NH.addmm_(gradient_NC[:, tile], head_CH[tile].to(total_NH.dtype))


def _add_weight_gradient_(total_CH: Tensor, gradient_NC: Tensor, hidden_NH: Tensor) -> None:
    """total += gradientᵀ @ hidden, in the total's precision."""
    if hidden_NH.is_cuda:
        total_CH += _product(gradient_NC.t(), hidden_NH, total_CH.dtype)
    else:
        total_CH.addmm_(gradient_NC.t().to(total_CH.dtype), hidden_NH.to(total_CH.dtype))


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b accumulated and returned in `dtype`; on CUDA, half-precision `b` brings `a` to its own precision."""
    if b.dtype == dtype:
        return a.to(dtype) @ b
    return torch.mm(a.to(b.dtype), b, out_dtype=dtype)


def _tiles(num_columns: int) -> Iterator[slice]:
    for first in range(0, num_columns, UPCAST_COLUMNS):
        yield slice(first, first + UPCAST_COLUMNS)
