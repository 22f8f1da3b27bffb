"""Hidden rows → sums and gradients of one vocabulary shard, a tile of its columns at a time: the fused head.

Logits never exist beyond one tile. A tile's sums are merged like those of ranks. Each row of the weight is read once a
pass, and its gradient is one product over all tokens, written once; the hidden rows' gradient is added up over the
tiles in float32.

Shapes: N rows (tokens), W views of each, H hidden size, V columns of this shard, c columns of one tile, R tiles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron_cppo.algo import linear_products
from megatron_cppo.algo.kernels import Kernels
from megatron_cppo.algo.shard_statistics import Coefficients, Shard, merge, statistics_dtype

# Of a tile: wide enough for the products to be efficient, narrow enough for its logits to be few.
MOST_COLUMNS = {"cpu": 4096, "cuda": 16384}
FEWEST_COLUMNS = 512


def sums(
    hiddens: Sequence[Tensor], weight_VH: Tensor, targets_N: Tensor, shard: Shard, kernels: Kernels, chunk_bytes: int
) -> Tensor:
    """The kernels' sums of the logits of W hidden rows [N, H], [W, 4, N]."""
    parts = [
        kernels.view_sums(
            [linear_products.project(hidden_NH, weight_VH[columns]) for hidden_NH in hiddens],
            targets_N,
            shard.tile(columns.start, columns.stop),
        )
        for columns in _tiles(hiddens, shard, chunk_bytes)
    ]
    if not parts:
        return kernels.view_sums([hidden_NH[:, :0] for hidden_NH in hiddens], targets_N, shard)
    return merge(torch.stack(parts), shard.inverse_temperature)


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
    for columns in _tiles(hiddens, shard, chunk_bytes):
        logits = [linear_products.project(hidden_NH, weight_VH[columns]) for hidden_NH in hiddens]
        out = [None if total is None else view for total, view in zip(totals, logits, strict=True)]
        kernels.view_gradients(logits, targets_N, given, shard.tile(columns.start, columns.stop), out)
        weight_total_cH = None if weight_total_VH is None else weight_total_VH[columns]
        linear_products.add_gradients_(totals, weight_total_cH, out, hiddens, weight_VH[columns])


def _tiles(hiddens: Sequence[Tensor], shard: Shard, chunk_bytes: int) -> Iterator[slice]:
    """Slices of as many columns as have `chunk_bytes` of logits over all views, within the bounds above."""
    column_bytes = len(hiddens) * max(1, hiddens[0].shape[0]) * statistics_dtype(hiddens[0]).itemsize
    width = max(
        FEWEST_COLUMNS, min(MOST_COLUMNS.get(hiddens[0].device.type, MOST_COLUMNS["cuda"]), chunk_bytes // column_bytes)
    )
    for first in range(0, shard.num_valid, width):
        yield slice(first, min(first + width, shard.num_valid))
