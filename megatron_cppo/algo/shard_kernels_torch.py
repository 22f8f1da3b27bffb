"""The passes over a shard's logits in plain torch: a few rows at a time, so that what is written is read from cache.

The readable twin of `shard_kernels_triton`: the same two functions, the same algebra (`shard_statistics`).

Shapes: N rows (tokens), W views of each, V columns (valid, then padding), n rows and v columns of one tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron_cppo.algo.shard_statistics import (
    FLOOR,
    LOWEST,
    Coefficients,
    Shard,
    banned_columns,
    statistics_dtype,
    sums_of_no_columns,
)

# Of one view's logits at once: on a CPU what a core's cache holds, on a GPU what keeps all of it busy.
TILE_BYTES = {"cpu": 2 * 2**20, "cuda": 256 * 2**20}
# Columns whose maximum is found at once; see `_argmax`.
BLOCK_COLUMNS = 64


def view_sums(views: Sequence[Tensor], targets_N: Tensor, shard: Shard) -> Tensor:
    """The sums of `shard_statistics.merge` over the valid columns of each row, [W, 4, N]; reads every logit once.

    `views` are W logits [N, V] of the same tokens; the first is the original.
    """
    dtype = statistics_dtype(views[0])
    if shard.num_valid == 0:
        return sums_of_no_columns(len(views), targets_N, dtype)
    columns_N, owned_N = shard.columns_of(targets_N)
    sums_W4N = torch.empty(len(views), 4, targets_N.numel(), dtype=dtype, device=targets_N.device)
    for rows, scratch in _tiles(views[0], shard, num_buffers=min(len(views), 2) + 2):
        first_nv, weight_nv = scratch[0], scratch[-1]
        for number, logits_NV in enumerate(views):
            # Every perturbed view takes the place of the one before; the original stays, and its exponentials.
            z_nv = _copy(logits_NV[rows], shard, first_nv if number == 0 else scratch[1])
            exp_nv = weight_nv if number == 0 else scratch[2]
            target_n = z_nv.gather(1, columns_N[rows, None]).squeeze(1).where(owned_N[rows], -torch.inf)
            maximum_n, argmax_n1 = _argmax(z_nv)
            torch.exp(_shift_(z_nv, maximum_n, shard.inverse_temperature), out=exp_nv)
            peak_n1 = exp_nv.gather(1, argmax_n1)
            tail_n = exp_nv.scatter_(1, argmax_n1, 0.0).sum(-1)
            if number == 0:
                weight_nv.scatter_(1, argmax_n1, peak_n1)
                moment_n = torch.mul(first_nv, weight_nv, out=scratch[1]).sum(-1)
            else:
                moment_n = torch.sub(first_nv, z_nv, out=z_nv).mul_(weight_nv).sum(-1)
            sums_W4N[number, :, rows] = torch.stack([maximum_n, tail_n, moment_n, target_n])
    return sums_W4N


def view_gradients(
    views: Sequence[Tensor], targets_N: Tensor, given: Coefficients, shard: Shard, out: Sequence[Tensor | None]
) -> None:
    """Write the loss's gradient in every view's logits into `out`, which may be the views; None asks for none.

    Reads every logit once. Padding and banned columns get exactly 0.
    """
    columns_N, owned_N = shard.columns_of(targets_N)
    # A banned target has no log-probability to raise.
    target_WN = given.target_WN.where(owned_N, 0.0)
    num_views = len(views)
    for rows, scratch in _tiles(views[0], shard, num_buffers=num_views + (2 if num_views == 1 else 3)):
        part = given.rows(rows)
        exp_nv, gradient_nv, spare_nv = scratch[num_views], scratch[num_views + 1], scratch[-1]
        shifted = [
            _shift_(_copy(logits_NV[rows], shard, z_nv), maximum_n, shard.inverse_temperature)
            for logits_NV, z_nv, maximum_n in zip(views, scratch, part.maximum_WN, strict=False)
        ]
        torch.exp(shifted[0], out=exp_nv)
        for number, into_NV in enumerate(out):
            if into_NV is None:
                continue
            if number == 0:
                _first_gradient(shifted, exp_nv, part, gradient_nv, spare_nv)
            else:
                gradient_nv = _other_gradient_(shifted[number], exp_nv, part, number - 1)
            gradient_nv.scatter_add_(1, columns_N[rows, None], target_WN[number, rows, None])
            into_NV[rows, : shard.num_valid] = _fill_banned_(gradient_nv, shard, 0.0)
    for into_NV in out:
        if into_NV is not None:
            into_NV[:, shard.num_valid :] = 0.0


def _first_gradient(
    shifted: Sequence[Tensor], exp_nv: Tensor, part: Coefficients, gradient_nv: Tensor, spare_nv: Tensor
) -> None:
    """exp(z_p)·(constant + slope·z_p + Σ_k cross_k·(z_p − z_k)), into `gradient_nv`."""
    if part.slope_N is None and part.cross_KN is None:
        torch.mul(exp_nv, part.constant_N[:, None], out=gradient_nv)
        return
    if part.slope_N is None:
        gradient_nv.copy_(part.constant_N[:, None].expand_as(gradient_nv))
    else:
        torch.addcmul(part.constant_N[:, None], shifted[0], part.slope_N[:, None], out=gradient_nv)
    if part.cross_KN is not None:
        for cross_n, z_nv in zip(part.cross_KN, shifted[1:], strict=True):
            gradient_nv.addcmul_(torch.sub(shifted[0], z_nv, out=spare_nv), cross_n[:, None])
    gradient_nv.mul_(exp_nv)


def _other_gradient_(z_nv: Tensor, exp_first_nv: Tensor, part: Coefficients, perturbed: int) -> Tensor:
    """own_k·exp(z_k) − cross_k·exp(z_p), in place of z_k."""
    z_nv.exp_().mul_(part.own_KN[perturbed, :, None])
    if part.cross_KN is not None:
        z_nv.addcmul_(exp_first_nv, part.cross_KN[perturbed, :, None], value=-1)
    return z_nv


def _tiles(logits_NV: Tensor, shard: Shard, *, num_buffers: int) -> Iterator[tuple[slice, list[Tensor]]]:
    """Slices of as many rows as make one tile, at least one, each with the same scratch buffers [n, v]."""
    if shard.num_valid == 0:
        return
    dtype = statistics_dtype(logits_NV)
    most = max(1, TILE_BYTES.get(logits_NV.device.type, TILE_BYTES["cuda"]) // (shard.num_valid * dtype.itemsize))
    total = logits_NV.shape[0]
    buffers = [logits_NV.new_empty(min(most, total), shard.num_valid, dtype=dtype) for _ in range(num_buffers)]
    for first in range(0, total, most):
        end = min(first + most, total)
        yield slice(first, end), [buffer[: end - first] for buffer in buffers]


def _copy(logits_nV: Tensor, shard: Shard, into_nv: Tensor) -> Tensor:
    """The valid columns, the banned ones −∞ whatever they held."""
    return _fill_banned_(into_nv.copy_(logits_nV[:, : shard.num_valid]), shard, -torch.inf)


def _fill_banned_(x_nv: Tensor, shard: Shard, value: float) -> Tensor:
    if shard.banned:
        x_nv.index_fill_(1, banned_columns(shard, x_nv.device), value)
    return x_nv


def _shift_(x_nv: Tensor, maximum_n: Tensor, inverse_temperature: float) -> Tensor:
    """(x − maximum)/T in place, −∞ replaced by FLOOR; dividing first would round the logits and their maximum apart."""
    x_nv.sub_(maximum_n[:, None])
    if inverse_temperature != 1.0:
        x_nv.mul_(inverse_temperature)
    return x_nv.clamp_(min=FLOOR)


def _argmax(x_nv: Tensor) -> tuple[Tensor, Tensor]:
    """The maximum [n], no less than LOWEST, and a column [n, 1] that holds it.

    Blocks of columns first, as torch's search for an index is no vector code on a CPU, and that for a value is.
    """
    whole = x_nv.shape[1] // BLOCK_COLUMNS * BLOCK_COLUMNS
    if x_nv.is_cuda or whole == 0:
        maximum_n, argmax_n = x_nv.max(-1)
        return maximum_n.clamp(min=LOWEST), argmax_n[:, None]
    blocks_nbc = x_nv[:, :whole].unflatten(1, (-1, BLOCK_COLUMNS))
    maximum_n, block_n = blocks_nbc.amax(-1).max(-1)
    place_n = block_n * BLOCK_COLUMNS + blocks_nbc[torch.arange(len(block_n)), block_n].argmax(-1)
    if whole < x_nv.shape[1]:
        rest_n, rest_place_n = x_nv[:, whole:].max(-1)
        place_n = torch.where(rest_n > maximum_n, whole + rest_place_n, place_n)
        maximum_n = torch.maximum(maximum_n, rest_n)
    return maximum_n.clamp(min=LOWEST), place_n[:, None]
