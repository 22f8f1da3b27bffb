"""The passes over a shard's logits as torch.compile fuses them: on a CPU with a C++ compiler the fastest kind.

The same two functions as `shard_kernels_torch`. A sum costs two reads of the logits (the maximum, then all else), a
gradient one read and one write, and nothing of their size is held beside. Banned columns are no mask, which would cost
more than all else: the ranges of columns between them are passes of their own, and merge like ranks. The first call
compiles, for some seconds.

Shapes: N rows (tokens), W views of each, K = W − 1 of them perturbed, V columns (valid, then padding), c of one range.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import torch
import torch._dynamo
from torch import Tensor

from megatron_cppo.algo.shard_statistics import (
    FLOOR,
    LOWEST,
    Coefficients,
    Shard,
    banned_columns,
    merge,
    statistics_dtype,
    sums_of_no_columns,
)


def view_sums(views: Sequence[Tensor], targets_N: Tensor, shard: Shard) -> Tensor:
    """`shard_kernels_torch.view_sums`."""
    dtype, run = statistics_dtype(views[0]), _compiled()[0]
    parts = []
    for columns in _allowed(shard):
        part = shard.tile(columns.start, columns.stop)
        place_N, owned_N = part.columns_of(targets_N)
        cut = [view[:, columns] for view in views]
        targets_WN = torch.stack([view.gather(1, place_N[:, None]).squeeze(1) for view in cut]).to(dtype)
        sums_W3N = run(cut, shard.inverse_temperature, dtype)
        parts.append(torch.cat([sums_W3N, targets_WN.where(owned_N, -torch.inf)[:, None]], dim=1))
    if not parts or targets_N.numel() == 0:
        return sums_of_no_columns(len(views), targets_N, dtype)
    return merge(torch.stack(parts), shard.inverse_temperature)


def view_gradients(
    views: Sequence[Tensor], targets_N: Tensor, given: Coefficients, shard: Shard, out: Sequence[Tensor | None]
) -> None:
    """`shard_kernels_torch.view_gradients`."""
    run = _compiled()[1]
    for columns in _allowed(shard):
        place_N, owned_N = shard.tile(columns.start, columns.stop).columns_of(targets_N)
        cut = [view[:, columns] for view in views]
        # Where the gradient overwrites the logits, both must be one tensor for the compiler to see it.
        into = [
            None if whole is None else part if whole.data_ptr() == view.data_ptr() else whole[:, columns]
            for part, view, whole in zip(cut, views, out, strict=True)
        ]
        run(
            cut,
            into,
            torch.where(owned_N, place_N, -1),
            given.maximum_WN,
            given.constant_N,
            given.slope_N,
            given.cross_KN,
            given.own_KN,
            given.target_WN,
            shard.inverse_temperature,
        )
    for whole in out:
        if whole is not None:
            whole[:, shard.num_valid :] = 0.0
            if shard.banned:
                whole.index_fill_(1, banned_columns(shard, whole.device), 0.0)


def _allowed(shard: Shard) -> Iterator[slice]:
    """The ranges of valid columns between the banned ones."""
    first = 0
    for banned in (*shard.banned, shard.num_valid):
        if banned > first:
            yield slice(first, banned)
        first = banned + 1


@lru_cache
def _compiled() -> tuple[Callable[..., Tensor], Callable[..., None]]:
    """The two functions for any number of rows and columns; a few variants each, by views, types and what is None."""
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(_sums, dynamic=True, fullgraph=True), torch.compile(_gradients, dynamic=True, fullgraph=True)


def _shifted(x_Nc: Tensor, maximum_N: Tensor, inverse_temperature: float) -> Tensor:
    return ((x_Nc.to(maximum_N.dtype) - maximum_N[:, None]) * inverse_temperature).clamp(min=FLOOR)


def _sums(views: list[Tensor], inverse_temperature: float, dtype: torch.dtype) -> Tensor:
    """(maximum, tail, slope or cross) of every view, [W, 3, N]."""
    maxima = [view.to(dtype).amax(-1).clamp(min=LOWEST) for view in views]
    shifted = [_shifted(view, maximum_N, inverse_temperature) for view, maximum_N in zip(views, maxima, strict=True)]
    weight_Nc = shifted[0].exp()
    sums = []
    for number, (maximum_N, z_Nc) in enumerate(zip(maxima, shifted, strict=True)):
        at_maximum_Nc = z_Nc == 0
        # All that are as high as the maximum but one of them.
        ties_N = (at_maximum_Nc.to(dtype).sum(-1) - 1).clamp(min=0)
        tail_N = torch.where(at_maximum_Nc, 0.0, z_Nc.exp()).sum(-1) + ties_N
        moment_N = (weight_Nc * (z_Nc if number == 0 else shifted[0] - z_Nc)).sum(-1)
        sums.append(torch.stack([maximum_N, tail_N, moment_N]))
    return torch.stack(sums)


def _gradients(
    views: list[Tensor],
    out: list[Tensor | None],
    place_N: Tensor,
    maximum_WN: Tensor,
    constant_N: Tensor,
    slope_N: Tensor | None,
    cross_KN: Tensor | None,
    own_KN: Tensor,
    target_WN: Tensor,
    inverse_temperature: float,
) -> None:
    """See `shard_statistics.Coefficients`; `place_N` is the target's column, or -1."""
    shifted = [
        _shifted(view, maximum_N, inverse_temperature) for view, maximum_N in zip(views, maximum_WN, strict=True)
    ]
    weight_Nc = shifted[0].exp()
    hit_Nc = torch.arange(views[0].shape[1], device=place_N.device) == place_N[:, None]
    factor_Nc = constant_N[:, None] if slope_N is None else constant_N[:, None] + slope_N[:, None] * shifted[0]
    gradients = []
    for number, z_Nc in enumerate(shifted[1:]):
        gradient_Nc = own_KN[number, :, None] * z_Nc.exp()
        if cross_KN is not None:
            factor_Nc = factor_Nc + cross_KN[number, :, None] * (shifted[0] - z_Nc)
            gradient_Nc = gradient_Nc - cross_KN[number, :, None] * weight_Nc
        gradients.append(gradient_Nc)
    for into_Nc, gradient_Nc, target_N in zip(out, [weight_Nc * factor_Nc, *gradients], target_WN, strict=True):
        if into_Nc is not None:
            into_Nc.copy_(gradient_Nc + torch.where(hit_Nc, target_N[:, None], 0.0))
