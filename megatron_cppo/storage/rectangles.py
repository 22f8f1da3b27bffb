"""Where a shard of a parameter lies in the tensor that a checkpoint stores, for any flat range of the shard.

Megatron's distributed optimizer cuts each shard into flat ranges, which are no rectangles; a checkpoint stores
rectangles. A range of a tensor of d dimensions is at most 2d - 1 of them, each of which is contiguous in the shard: so
no rank needs another's numbers to save or load its own, in any layout. Knows no ranks and no files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Piece(NamedTuple):
    """Numbers [start, stop) of a flat shard, which are the rectangle of `shape` at `offset` of the stored tensor."""

    start: int
    stop: int
    offset: tuple[int, ...]
    shape: tuple[int, ...]


class Rows(NamedTuple):
    """Consecutive rows of a shard that are consecutive in the stored tensor, too: from `start` here, `stored` there."""

    start: int
    count: int
    stored: int


@dataclass(frozen=True, slots=True)
class Held:
    """A shard: its `shape`, and its place in the stored tensor `key`, which has `size` as a whole.

    `index` are the first numbers of a place (layer, expert), `rows` the shard's rows there, and `column` where its
    columns begin. Rows of the shard that are in no `rows` (a vocabulary's padding) are stored nowhere.
    """

    key: str
    size: tuple[int, ...]
    index: tuple[int, ...]
    shape: tuple[int, ...]
    rows: tuple[Rows, ...]
    column: int = 0

    @property
    def numel(self) -> int:
        """Numbers of the shard."""
        return math.prod(self.shape)

    def pieces(self, start: int, stop: int) -> Iterator[Piece]:
        """The rectangles of the numbers [start, stop) of the flat shard, in their order."""
        inner = math.prod(self.shape[1:])
        for rows in self.rows:
            first = rows.start * inner
            low, high = max(start, first), min(stop, first + rows.count * inner)
            at = low
            for offset, shape in rectangles((rows.count, *self.shape[1:]), low - first, high - first):
                place = [rows.stored + offset[0], *offset[1:]]
                if len(place) > 1:
                    place[1] += self.column
                ones = (1,) * len(self.index)
                size = math.prod(shape)
                yield Piece(at, at + size, (*self.index, *place), (*ones, *shape))
                at += size


def rectangles(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offset, shape) of the rectangles that make the numbers [start, stop) of a flat tensor, in their order.

    >>> list(rectangles((4, 10), 7, 35))
    [((0, 7), (1, 3)), ((1, 0), (2, 10)), ((3, 0), (1, 5))]
    """
    if start >= stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    inner = math.prod(shape[1:])
    row, whole = -(-start // inner), stop // inner
    if row > whole:  # within one row
        head, body, tail = (start, stop), False, (0, 0)
        row = whole + 1
    else:
        head, body, tail = (start, row * inner), row < whole, (whole * inner, stop)
    yield from _within(shape, row - 1, *head)
    if body:
        yield (row, *(0 for _ in shape[1:])), (whole - row, *shape[1:])
    yield from _within(shape, whole, *tail)


def _within(shape: Sequence[int], row: int, start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The rectangles of a range that lies in one row."""
    if start < stop:
        before = row * math.prod(shape[1:])
        for offset, extent in rectangles(shape[1:], start - before, stop - before):
            yield (row, *offset), (1, *extent)


def share(count: int, rank: int, num_ranks: int) -> tuple[int, int]:
    """[start, stop): the part of `count` things that falls to a rank, as even as can be."""
    return count * rank // num_ranks, count * (rank + 1) // num_ranks
