"""Two checkpoints, of either kind each, tensor by tensor: what one has and the other lacks, and what is not the same.

Tensors go by their official Hugging Face names, and pass through memory in blocks of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megatron_cppo.convert import workers
from megatron_cppo.convert.checkpoints import Checkpoint, Opening
from megatron_cppo.convert.layout import row_blocks
from megatron_cppo.families.experts import place

TASK_BYTES = 2**29
_PIECE = 2**22
"""Numbers that are subtracted at once, in float64."""
_SHOWN = 10


@dataclass(frozen=True, slots=True)
class Difference:
    """A tensor that is not the same: how many of its numbers differ, and by how much at most (inf where NaN is)."""

    name: str
    num_differing: int
    num_elements: int
    max_gap: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """What two checkpoints, called A and B, have not in common."""

    num_tensors: int
    num_bytes: int
    missing: tuple[str, ...]
    """In A, not in B."""
    extra: tuple[str, ...]
    """In B, not in A."""
    shapes: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    dtypes: tuple[tuple[str, str, str], ...]
    differing: tuple[Difference, ...]
    """Worst first."""
    peak_bytes: int

    @property
    def equal(self) -> bool:
        """Whether there is nothing to tell."""
        return not (self.missing or self.extra or self.shapes or self.dtypes or self.differing)

    def lines(self) -> list[str]:
        """What differs, for people; the worst of each kind where there are many."""
        told = [f"missing in B: {name}" for name in self.missing[:_SHOWN]]
        told += [f"only in B: {name}" for name in self.extra[:_SHOWN]]
        told += [f"shape: {name} is {a} in A, {b} in B" for name, a, b in self.shapes[:_SHOWN]]
        told += [f"dtype: {name} is {a} in A, {b} in B" for name, a, b in self.dtypes[:_SHOWN]]
        told += [
            f"differs: {found.name}: {found.num_differing} of {found.num_elements} numbers, "
            f"by {found.max_gap:.3g} at most"
            for found in self.differing[:_SHOWN]
        ]
        counts = {
            "missing in B": self.missing,
            "only in B": self.extra,
            "of another shape": self.shapes,
            "of another dtype": self.dtypes,
            "with other numbers": self.differing,
        }
        summary = ", ".join(f"{len(found)} {what}" for what, found in counts.items() if found)
        return [*told, f"{self.num_tensors} tensors compared: {summary or 'all equal'}"]


@dataclass(frozen=True, slots=True)
class How:
    """What counts as the same: every bit, A cast to `cast` first where that is given; or any gap up to `tolerance`."""

    tolerance: float | None = None
    cast: torch.dtype | None = None


@dataclass(frozen=True, slots=True)
class _Pair:
    a: Checkpoint
    b: Checkpoint
    how: How


def compare(
    a: Opening, b: Opening, *, how: How, num_workers: int, begin: Callable[[int], Callable[[int], None]]
) -> Comparison:
    """Compare all tensors of two checkpoints. `begin` is told how many bytes there are, and gives who hears of them.

    Raises UserError when one cannot be read.
    """
    pair = _Pair(a.open(), b.open(), how)
    common = [name for name in pair.a.sizes if name in pair.b.sizes]
    shapes = tuple(
        (name, pair.a.sizes[name], pair.b.sizes[name]) for name in common if pair.a.sizes[name] != pair.b.sizes[name]
    )
    dtypes = []
    if how.tolerance is None:
        pairs = ((name, how.cast or pair.a.dtype(name), pair.b.dtype(name)) for name in common)
        dtypes = [(name, str(x), str(y)) for name, x, y in pairs if x != y]
    passed_over = {name for name, *_ in (*shapes, *dtypes)}
    names = [name for name in common if name not in passed_over]
    sizes = {name: math.prod(pair.a.sizes[name]) * pair.a.dtype(name).itemsize for name in names}
    advance = begin(sum(sizes.values()))
    found: list[Difference] = []
    peak = 0
    for task, differences, used in workers.each(
        partial(_open, a, b, how), _compare, _tasks(names, sizes), workers=num_workers
    ):
        found += differences
        peak = max(peak, used)
        advance(sum(sizes[name] for name in task))
    return Comparison(
        num_tensors=len(names),
        num_bytes=sum(sizes.values()),
        missing=tuple(sorted(pair.a.sizes.keys() - pair.b.sizes.keys())),
        extra=tuple(sorted(pair.b.sizes.keys() - pair.a.sizes.keys())),
        shapes=shapes,
        dtypes=tuple(dtypes),
        differing=tuple(sorted(found, key=lambda difference: (-difference.max_gap, difference.name))),
        peak_bytes=peak,
    )


def _open(a: Opening, b: Opening, how: How) -> _Pair:
    return _Pair(a.open(), b.open(), how)


def _tasks(names: Sequence[str], sizes: dict[str, int]) -> list[tuple[str, ...]]:
    """Runs of names, by what is stored together, so that a stack or a chunk is read for all that is in it."""
    tasks: list[tuple[str, ...]] = []
    task: list[str] = []
    size = 0
    for name in sorted(names, key=_stored_together):
        if task and size + sizes[name] > TASK_BYTES:
            tasks.append(tuple(task))
            task, size = [], 0
        task.append(name)
        size += sizes[name]
    return [*tasks, tuple(task)] if task else tasks


def _stored_together(name: str) -> tuple[str, int, str]:
    where = place(name)
    return (name, 0, "") if where is None else (where.stack, where.expert, name)


def _compare(pair: _Pair, task: tuple[str, ...]) -> tuple[tuple[str, ...], list[Difference], int]:
    found = [difference for name in task if (difference := _compare_one(pair, name)) is not None]
    return task, found, workers.peak_bytes()


def _compare_one(pair: _Pair, name: str) -> Difference | None:
    count, gap, size = 0, 0.0, pair.a.sizes[name]
    for start, stop in row_blocks(size, max(pair.a.dtype(name), pair.b.dtype(name), key=lambda dtype: dtype.itemsize)):
        a, b = pair.a.rows(name, start, stop), pair.b.rows(name, start, stop)
        if pair.how.cast is not None:
            a = a.to(pair.how.cast)
        if a.dtype == b.dtype and torch.equal(_bits(a), _bits(b)):
            continue
        if pair.how.tolerance is None:
            differs = _bits(a) != _bits(b)
            count += int(differs.sum())
            gap = max(gap, _gap(a[differs], b[differs])[0])
        else:
            widest, beyond = _gap(a.flatten(), b.flatten(), pair.how.tolerance)
            count += beyond
            gap = max(gap, widest) if beyond else gap
    return Difference(name, count, math.prod(size), gap) if count else None


def _bits(tensor: Tensor) -> Tensor:
    """The numbers as integers: two NaN of the same bits are the same, zeros of two signs are not."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.dtype.itemsize])


def _gap(a: Tensor, b: Tensor, tolerance: float = 0.0) -> tuple[float, int]:
    """The largest |a - b|, and how many are above `tolerance`; NaN is infinitely far from all but NaN."""
    widest, beyond = 0.0, 0
    for x, y in zip(a.split(_PIECE), b.split(_PIECE), strict=True):
        gap = (x.double() - y.double()).abs()
        same = (x.double() == y.double()) | (x.isnan() & y.isnan())
        gap = torch.where(same, 0.0, gap.nan_to_num(nan=math.inf))
        widest = max(widest, gap.max().item() if gap.numel() else 0.0)
        beyond += int((gap > tolerance).sum())
    return widest, beyond
