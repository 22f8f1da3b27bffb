"""Hidden rows → sums and gradients of one vocabulary shard, some rows at a time.

The logits of a chunk of rows exist over the whole shard, and are computed again when the gradient is asked for. The
weight is read, and its gradient added to, once a chunk: best where the products of a chunk are large anyway.

Shapes: N rows (tokens), W views of each, H hidden size, V columns of this shard, n rows of one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron_cppo.algo import linear_products
from megatron_cppo.algo.kernels import Kernels
from megatron_cppo.algo.shard_statistics import Coefficients, Shard, statistics_dtype


def sums(
    hiddens: Sequence[Tensor], weight_VH: Tensor, targets_N: Tensor, shard: Shard, kernels: Kernels, chunk_bytes: int
) -> Tensor:
    """The kernels' sums of the logits of W hidden rows [N, H], [W, 4, N]."""
    head_vH = weight_VH[: shard.num_valid]
    parts = [
        kernels.view_sums(
            [linear_products.project(hidden_NH[rows], head_vH) for hidden_NH in hiddens], targets_N[rows], shard
        )
        for rows in _chunks(hiddens, shard, chunk_bytes)
    ]
    return torch.cat(parts, dim=2)


def gradients(
    hiddens: Sequence[Tensor],
    weight_VH: Tensor,
    targets_N: Tensor,
    given: Coefficients,
    shard: Shard,
    kernels: Kernels,
    chunk_bytes: int,
    totals: Sequence[Tensor | None],
    weight_total_VH: Tensor | None,
) -> None:
    """Add this shard's part of the hidden rows' gradients to `totals`, and the weight's; None asks for none."""
    head_vH = weight_VH[: shard.num_valid]
    for rows in _chunks(hiddens, shard, chunk_bytes):
        logits = [linear_products.project(hidden_NH[rows], head_vH) for hidden_NH in hiddens]
        out = [None if total is None else view for total, view in zip(totals, logits, strict=True)]
        kernels.view_gradients(logits, targets_N[rows], given.rows(rows), shard, out)
        linear_products.add_gradients_(
            [None if total is None else total[rows] for total in totals],
            None if weight_total_VH is None else weight_total_VH[: shard.num_valid],
            out,
            [hidden_NH[rows] for hidden_NH in hiddens],
            head_vH,
        )


def _chunks(hiddens: Sequence[Tensor], shard: Shard, chunk_bytes: int) -> Iterator[slice]:
    """Slices of as many rows as have `chunk_bytes` of logits over all views, at least one; an empty one of no rows."""
    row_bytes = len(hiddens) * max(1, shard.num_valid) * statistics_dtype(hiddens[0]).itemsize
    num_rows = max(1, chunk_bytes // row_bytes)
    for first in range(0, max(1, hiddens[0].shape[0]), num_rows):
        yield slice(first, first + num_rows)
