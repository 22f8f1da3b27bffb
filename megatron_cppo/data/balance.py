"""Which data-parallel rank, and which packed row of it, runs which sample. Pure arithmetic: the same on every rank.

A group is the samples of one prompt; a sample's cost is the tokens of all its segments, which never leave its row.
Every row that holds samples of a group encodes the prompt's images once, so groups stay together where the loads allow.
Ranks and rows are filled alike, and called bins here: whole groups, longest first, go into the emptiest bin; then the
fullest bin exchanges with emptier ones, cutting groups only where whole ones do not help, until it is low enough.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

MemberT = TypeVar("MemberT")
Costs = Sequence[Sequence[int]]
"""Tokens of each group's samples."""

ROW_TOLERANCE = 0.1
"""How far a rank's fullest row may stay above the mean; evener rows would cut more groups."""

_MAX_PARTNERS = 32
"""Bins, the emptiest first, with which the fullest one looks for an exchange: what bounds the time of many rows."""

_Bin = dict[int, list[int]]
"""What a bin holds: group -> its samples there, cheapest first."""


@dataclass(frozen=True, slots=True)
class _Parcel:
    """Samples of one group that can leave their bin together, and their tokens; `whole` if no others stay there."""

    tokens: int
    group: int
    samples: tuple[int, ...]
    whole: bool


_NOTHING = _Parcel(tokens=0, group=-1, samples=(), whole=True)


_Exchange = tuple[tuple[int, int, int], int, _Parcel, _Parcel]
"""Score, the bin with which the fullest one exchanges, the parcel that it gives and the one that it takes.

The lowest score is the best: tokens of the fuller of the two above the goal, images to encode more, tokens of it.
"""


@dataclass(frozen=True, slots=True)
class _Bins:
    """Bins that are being filled, each with its load in tokens and the parcels that could leave it, cheapest first."""

    costs: Costs
    images: Sequence[int]
    held: list[_Bin]
    loads: list[int]
    parcels: list[list[_Parcel]]


def deal(
    costs: Costs, num_ranks: int, *, images: Sequence[int] = (), tolerance: float = 0.02
) -> list[list[tuple[int, int]]]:
    """Rank -> its samples, as (group, sample of the group) in order: loads even, few groups on several ranks.

    The fullest rank has at most 1 + `tolerance` times the mean load, or the costliest sample's if that is more, unless
    no exchange that was tried leads there. `images` says what encoding the images of each group costs, in any unit (0
    for text alone); where it is empty, all cost the same.
    """
    bins = _fill_with_groups(costs, num_ranks, images)
    _level(bins, goal=_goal(costs, num_ranks, tolerance))
    return [_members(held) for held in bins.held]


def fill(
    members_costs: Sequence[Sequence[tuple[MemberT, int]]],
    max_tokens: int,
    num_rows: int,
    *,
    images: Sequence[int] = (),
) -> list[list[MemberT]] | None:
    """A rank's members, by group and with their tokens, in `num_rows` rows of at most `max_tokens`; None if none found.

    The rows are about equally full, the fullest first, with few groups in several rows. A row is empty only where
    there are more rows than members. As many rows as members are always enough. `images` as for `deal`.
    """
    costs = [[tokens for _, tokens in group] for group in members_costs]
    bins = _fill_with_groups(costs, num_rows, images)
    goal = min(max_tokens, _goal(costs, num_rows, ROW_TOLERANCE))
    _level(bins, goal)
    if max(bins.loads) > max_tokens:
        # Bins that are even are not those with the most room for a long sample: start from samples packed tightly.
        tight = _fill_tightly(costs, num_rows, images, max_tokens)
        if tight is None:
            return None
        bins = tight
        _level(bins, goal)
    order = sorted(range(num_rows), key=lambda row: (-bins.loads[row], row))
    return [[members_costs[group][sample][0] for group, sample in _members(bins.held[row])] for row in order]


def fill_ranks(
    ranks: Sequence[Sequence[Sequence[tuple[MemberT, int]]]],
    *,
    max_tokens: int,
    rows_multiple: int,
    images: Sequence[int] = (),
) -> list[list[list[MemberT]]]:
    """Every rank's members, by group and with their tokens, in rows of at most `max_tokens`: rank -> rows -> members.

    All ranks get the same number of rows, a multiple of `rows_multiple` and the smallest one for which `fill` finds a
    way on every rank. `images` as for `deal`.
    """
    tokens = [[tokens for group in rank for _, tokens in group] for rank in ranks]
    costliest = max((cost for rank in tokens for cost in rank), default=0)
    assert costliest <= max_tokens, f"a sample of {costliest} tokens, rows of {max_tokens}"
    fewest = max(_fewest_rows(rank, max_tokens) for rank in tokens)
    num_rows = math.ceil(max(1, fewest) / rows_multiple) * rows_multiple
    while True:
        filled = [rows for rank in ranks if (rows := fill(rank, max_tokens, num_rows, images=images)) is not None]
        if len(filled) == len(ranks):
            return filled
        num_rows += rows_multiple


def _fewest_rows(tokens: Sequence[int], max_tokens: int) -> int:
    """A number of rows that these samples need at least."""
    fewest = math.ceil(sum(tokens) / max_tokens)
    # At most k samples longer than a (k + 1)-th of a row share one.
    for k in range(1, 8):
        fewest = max(fewest, math.ceil(sum(cost * (k + 1) > max_tokens for cost in tokens) / k))
    return fewest


def _goal(costs: Costs, num_bins: int, tolerance: float) -> int:
    """Tokens of the fullest bin that are low enough; none can be lower than the costliest sample."""
    mean = sum(map(sum, costs)) / num_bins
    return max(math.floor(mean * (1 + tolerance)), max((tokens for group in costs for tokens in group), default=0))


def _members(held: _Bin) -> list[tuple[int, int]]:
    return [(group, sample) for group in sorted(held) for sample in sorted(held[group])]


def _empty_bins(costs: Costs, num_bins: int, images: Sequence[int]) -> _Bins:
    assert not images or len(images) == len(costs), f"{len(images)} costs of images for {len(costs)} groups"
    held: list[_Bin] = [{} for _ in range(num_bins)]
    return _Bins(costs, images or [1] * len(costs), held, [0] * num_bins, [[] for _ in held])


def _fill_with_groups(costs: Costs, num_bins: int, images: Sequence[int]) -> _Bins:
    """Each group whole, longest first, in the bin that is the emptiest by then."""
    bins = _empty_bins(costs, num_bins, images)
    totals = [sum(group) for group in costs]
    for group in sorted(range(len(costs)), key=lambda group: (-totals[group], group)):
        _add(bins, min(range(num_bins), key=bins.loads.__getitem__), group, range(len(costs[group])))
    return bins


def _fill_tightly(costs: Costs, num_bins: int, images: Sequence[int], max_tokens: int) -> _Bins | None:
    """Each sample alone, longest first, in the first bin that has room, one with its group if there is any; or None."""
    bins = _empty_bins(costs, num_bins, images)
    order = [(-tokens, group, sample) for group, its in enumerate(costs) for sample, tokens in enumerate(its)]
    for negative, group, sample in sorted(order):
        room = [index for index, load in enumerate(bins.loads) if load - negative <= max_tokens]
        if not room:
            return None
        _add(bins, next((index for index in room if group in bins.held[index]), room[0]), group, [sample])
    return bins


def _add(bins: _Bins, index: int, group: int, samples: Sequence[int]) -> None:
    if samples:
        costs = bins.costs[group]
        together = [*bins.held[index].get(group, []), *samples]
        bins.held[index][group] = sorted(together, key=lambda sample: (costs[sample], sample))
        bins.loads[index] += sum(costs[sample] for sample in samples)


def _level(bins: _Bins, goal: int) -> None:
    """Exchange parcels until no bin is above `goal` tokens or the fullest finds none that helps; then fill empty bins.

    It ends: every exchange brings two loads closer together, which lowers the sum of their squares.
    """
    for index in range(len(bins.held)):
        _list_parcels(bins, index)
    while True:
        *emptier, fullest = sorted(range(len(bins.loads)), key=bins.loads.__getitem__)
        exchange = _best_exchange(bins, fullest, emptier[:_MAX_PARTNERS], goal) if bins.loads[fullest] > goal else None
        if exchange is None:
            break
        _, partner, give, take = exchange
        _move(bins, fullest, partner, give)
        _move(bins, partner, fullest, take)
    for index, held in enumerate(bins.held):
        if held:
            continue
        # An empty bin would run a sample of no weight: it takes a group, or else a sample, from the fullest that can.
        donors = [donor for donor, its in enumerate(bins.held) if sum(map(len, its.values())) > 1]
        if not donors:
            break
        donor = max(donors, key=bins.loads.__getitem__)
        whole = len(bins.held[donor]) > 1
        _move(bins, donor, index, next(parcel for parcel in reversed(bins.parcels[donor]) if parcel.whole == whole))


def _list_parcels(bins: _Bins, index: int) -> None:
    """The cheapest and the dearest samples of each group, however many, and each sample: cuts leave like with like."""
    parcels = []
    for group, samples in bins.held[index].items():
        until = [0, *accumulate(bins.costs[group][sample] for sample in samples)]
        count = len(samples)
        spans = {(0, end) for end in range(1, count + 1)} | {(start, count) for start in range(count)}
        for start, end in sorted(spans | {(start, start + 1) for start in range(count)}):
            tokens = until[end] - until[start]
            parcels.append(_Parcel(tokens, group, tuple(samples[start:end]), whole=end - start == count))
    bins.parcels[index] = sorted(parcels, key=lambda parcel: (parcel.tokens, parcel.group))


def _move(bins: _Bins, source: int, target: int, parcel: _Parcel) -> None:
    if not parcel.samples:
        return
    left = [sample for sample in bins.held[source].pop(parcel.group) if sample not in parcel.samples]
    if left:
        bins.held[source][parcel.group] = left
    bins.loads[source] -= parcel.tokens
    _add(bins, target, parcel.group, parcel.samples)
    _list_parcels(bins, source)
    _list_parcels(bins, target)


def _best_exchange(bins: _Bins, fullest: int, partners: Sequence[int], goal: int) -> _Exchange | None:
    """The best exchange of those that cut the fewest groups; None if none lowers the fullest bin."""
    for cuts in (0, 1, 2):
        best: _Exchange | None = None
        for partner in partners:
            best = _better_exchange(bins, fullest, partner, goal, cuts, best)
            if best is not None and best[0][:2] <= (0, 0):
                return best
        if best is not None:
            return best
    return None


def _better_exchange(
    bins: _Bins, fullest: int, partner: int, goal: int, cuts: int, best: _Exchange | None
) -> _Exchange | None:
    """The best exchange with `partner` that cuts at most `cuts` groups, if it is better than `best`; else that."""
    here, there = bins.held[fullest], bins.held[partner]
    high, low = bins.loads[fullest], bins.loads[partner]

    def price(parcel: _Parcel, target: _Bin) -> int:
        """Images to encode more if the parcel goes to the bin `target`."""
        return (bins.images[parcel.group] if parcel.samples else 0) * ((parcel.group not in target) - parcel.whole)

    takes = [_NOTHING, *bins.parcels[partner]]
    takes_by_cuts = [[take for take in takes if price(take, here) <= 0], takes]
    tokens_by_cuts = [[take.tokens for take in some] for some in takes_by_cuts]
    for give in bins.parcels[fullest]:
        give_price = price(give, there)
        left = cuts - (give_price > 0)
        if left < 0:
            continue
        # The loads end up closest where half their difference moves: only what comes near is looked at.
        takes, tokens = takes_by_cuts[min(left, 1)], tokens_by_cuts[min(left, 1)]
        at = bisect_left(tokens, give.tokens - (high - low) / 2)
        for take in takes[max(0, at - 2) : at + 2]:
            moved = give.tokens - take.tokens
            if 0 < moved < high - low and take.group != give.group:
                top = max(high - moved, low + moved)
                score = (max(0, top - goal), give_price + price(take, here), top)
                if best is None or score < best[0]:
                    best = (score, partner, give, take)
    return best
