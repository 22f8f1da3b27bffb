"""The passes over a shard's logits by the two Triton kernels of `shard_kernels_triton_jit`.

The twin of `shard_kernels_torch`, with the same signatures. Each kernel reads every logit once. Forward: a program owns
some columns of one row, and each of its lanes adds up the columns that it meets, online; lanes, then programs, are
merged by the algebra of `shard_statistics.merge`. Backward: one element, one program's lane, so the gradient may be
written over the logits.

Runs compiled on CUDA, and on a CPU in Triton's interpreter (TRITON_INTERPRET=1 before the first import).

Shapes: N rows (tokens), W views of each (at most three), V columns (valid, then padding).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from megatron_cppo.algo.shard_kernels_triton_jit import gradients_kernel, sums_kernel
from megatron_cppo.algo.shard_statistics import Coefficients, Shard, merge, statistics_dtype, sums_of_no_columns

# Neighbours that a lane of the forward meets at once: one load of 16 bytes in bfloat16, one rescaling of its sums.
EACH = 8
# Columns that a program meets at once: forward by the number of views, whose sums are kept in registers, and backward.
FORWARD_COLUMNS = {1: 2048, 2: 1024, 3: 1024}
BACKWARD_COLUMNS = 1024
# As many programs keep a large GPU busy; with fewer rows, several share a row.
ENOUGH_PROGRAMS = 2048
MOST_VIEWS = 3


def view_sums(views: Sequence[Tensor], targets_N: Tensor, shard: Shard, *, num_splits: int | None = None) -> Tensor:
    """`shard_kernels_torch.view_sums`. `num_splits` programs share a row; by default what fills a GPU."""
    _check(views)
    dtype = statistics_dtype(views[0])
    num_rows = targets_N.numel()
    if shard.num_valid == 0 or num_rows == 0:
        return sums_of_no_columns(len(views), targets_N, dtype)
    lanes = FORWARD_COLUMNS[len(views)]
    if num_splits is None:
        num_splits = max(1, min(ENOUGH_PROGRAMS // num_rows, shard.num_valid // (4 * lanes)))
    columns = triton.cdiv(triton.cdiv(shard.num_valid, num_splits), lanes) * lanes
    sums_RW4N = torch.empty(num_splits, len(views), 4, num_rows, dtype=dtype, device=targets_N.device)
    ranges_B2, num_ranges = _banned_ranges(shard, targets_N.device)
    with torch.cuda.device_of(targets_N):
        sums_kernel[(num_rows, num_splits)](
            *_pointers_and_strides(views),
            targets_N.contiguous(),
            sums_RW4N,
            ranges_B2,
            _scales(shard.inverse_temperature, dtype, targets_N.device),
            num_rows,
            columns,
            shard.start,
            shard.num_valid,
            NUM_VIEWS=len(views),
            NUM_RANGES=num_ranges,
            LANES=lanes // EACH,
            EACH=EACH,
            num_warps=4,
        )
    return merge(sums_RW4N, shard.inverse_temperature)


def view_gradients(
    views: Sequence[Tensor], targets_N: Tensor, given: Coefficients, shard: Shard, out: Sequence[Tensor | None]
) -> None:
    """`shard_kernels_torch.view_gradients`."""
    _check(views)
    num_rows, width = views[0].shape
    if num_rows == 0 or width == 0:
        return
    ranges_B2, num_ranges = _banned_ranges(shard, targets_N.device)
    wanted = [into is not None for into in out] + [False] * (MOST_VIEWS - len(views))
    places = [view if into is None else into for view, into in zip(views, out, strict=True)]
    absent = given.constant_N
    with torch.cuda.device_of(targets_N):
        gradients_kernel[(num_rows, triton.cdiv(width, BACKWARD_COLUMNS))](
            *_pointers_and_strides(views),
            *_pointers_and_strides(places),
            targets_N.contiguous(),
            given.maximum_WN.contiguous(),
            given.constant_N.contiguous(),
            absent if given.slope_N is None else given.slope_N.contiguous(),
            absent if given.cross_KN is None else given.cross_KN.contiguous(),
            given.own_KN.contiguous(),
            given.target_WN.contiguous(),
            ranges_B2,
            _scales(shard.inverse_temperature, given.constant_N.dtype, targets_N.device),
            num_rows,
            width,
            shard.start,
            shard.num_valid,
            NUM_VIEWS=len(views),
            HAS_SLOPE=given.slope_N is not None,
            HAS_CROSS=given.cross_KN is not None,
            WANTS_0=wanted[0],
            WANTS_1=wanted[1],
            WANTS_2=wanted[2],
            NUM_RANGES=num_ranges,
            LANES=BACKWARD_COLUMNS,
            num_warps=4,
        )


def _check(views: Sequence[Tensor]) -> None:
    if len(views) > MOST_VIEWS:
        raise ValueError(f"Triton's kernels take {MOST_VIEWS} views at most, got {len(views)}; use backend torch")
    if any(view.stride(1) != 1 for view in views if view.numel()):
        raise ValueError("Triton's kernels need the columns of a row next to each other; give contiguous logits")


def _pointers_and_strides(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """Three pointers, then three row strides; absent views repeat the first."""
    three = [*tensors, *[tensors[0]] * (MOST_VIEWS - len(tensors))]
    return *three, *(tensor.stride(0) for tensor in three)


@lru_cache
def _scales(inverse_temperature: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """log2(e)/T and log(2), in the precision of the sums: a number that is passed is float32."""
    return torch.tensor([inverse_temperature / math.log(2), math.log(2)], dtype=dtype, device=device)


@lru_cache(maxsize=4096)
def _banned_ranges(shard: Shard, device: torch.device) -> tuple[Tensor, int]:
    """Banned columns as [first, end) pairs: markers of images and videos are neighbours. Kept, as a copy from the host
    would have a GPU wait."""
    ranges: list[list[int]] = []
    for column in shard.banned:
        if ranges and ranges[-1][1] == column:
            ranges[-1][1] += 1
        else:
            ranges.append([column, column + 1])
    return torch.tensor(ranges or [[0, 0]], dtype=torch.int32, device=device), len(ranges)
