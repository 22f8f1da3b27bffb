"""Which data-parallel rank, and which packed row of it, runs which sample. Pure arithmetic: the same on every rank.

A group is the samples of one prompt; a sample's cost is the tokens of all its segments, which never leave its row.
Every row that holds samples of a group encodes the prompt's images once, so groups stay together where the loads allow.
Ranks and rows are filled alike, and called bins here: whole groups, longest first, go into the emptiest bin; then the
fullest bin exchanges with emptier ones, cutting groups only where whole ones do not help, until it is low enough.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

MemberT = TypeVar("MemberT")
SampleId = tuple[int, int]
"""Group, sample of the group."""
Costs = Sequence[Sequence[int]]
"""Tokens of each group's samples."""

ROW_TOLERANCE = 0.1
"""How far a rank's fullest row may stay above the mean, as a share of it; evener rows would cut more groups."""
_MAX_PARTNERS, _MAX_CUTS = 16, 16
"""Bins tried for an exchange, the emptiest first, and places tried to cut a group: they bound the time."""


@dataclass(frozen=True, slots=True)
class _Parcel:
    """Samples of one group that can leave their bin together, and their tokens; `whole` if no others stay there."""

    tokens: int
    group: int
    samples: tuple[int, ...]
    whole: bool


_NOTHING = _Parcel(tokens=0, group=-1, samples=(), whole=True)

_Exchange = tuple[tuple[int, int, int], int, _Parcel, _Parcel]
"""Score (the higher load's tokens above the goal, images to encode more, the higher load), partner, given, taken."""


@dataclass(frozen=True, slots=True)
class _Bins:
    """Bins being filled: what each holds (group -> samples), its load in tokens, what can leave it; cheapest first."""

    costs: Costs
    images: Sequence[int]
    held: list[dict[int, list[int]]]
    loads: list[int]
    parcels: list[list[_Parcel]]


def deal(costs: Costs, num_ranks: int, *, images: Sequence[int] = (), tolerance: float = 0.02) -> list[list[SampleId]]:
    """Rank -> its samples in order: loads even, few groups on several ranks.

    The fullest rank has at most 1 + `tolerance` times the mean load, or the costliest sample's if that is more, unless
    no exchange that is tried leads there. `images` says what encoding the images of each group costs, in any unit (0
    for text alone); where it is empty, all groups' cost the same.
    """
    goal = _goal(costs, num_ranks, tolerance)
    bins = _level(_fill_with_groups(costs, num_ranks, images), goal)
    if max(bins.loads) > goal:
        scattered = _level(_fill_with_samples(costs, num_ranks, images, max_tokens=0), goal)
        # Even ranks are worth many cut groups, but not for less than the tolerance.
        if max(scattered.loads) < max(bins.loads) - tolerance * sum(bins.loads) / num_ranks:
            bins = scattered
    return [[(group, sample) for group in sorted(held) for sample in sorted(held[group])] for held in bins.held]


def fill(
    members_costs: Sequence[Sequence[tuple[MemberT, int]]], max_tokens: int, num_rows: int, images: Sequence[int] = ()
) -> list[list[MemberT]] | None:
    """A rank's members, by group and with their tokens, in `num_rows` rows of at most `max_tokens`; None if none found.

    The rows are about equally full, the fullest first, with few groups in several rows. A row is empty only where
    there are more rows than members. As many rows as members are always enough. `images` as for `deal`.
    """
    costs = [[tokens for _, tokens in group] for group in members_costs]
    goal = min(max_tokens, _goal(costs, num_rows, ROW_TOLERANCE))
    bins = _level(_fill_with_groups(costs, num_rows, images), goal)
    if max(bins.loads) > max_tokens:
        # Even rows leave each too little room for a long sample: fill one row after another, and not with groups.
        bins = _level(_fill_with_samples(costs, num_rows, images, max_tokens), goal)
    if max(bins.loads) > max_tokens:
        return None
    rows = [bins.held[row] for row in sorted(range(num_rows), key=lambda row: (-bins.loads[row], row))]
    return [[members_costs[group][sample][0] for group in sorted(row) for sample in sorted(row[group])] for row in rows]


def fill_ranks(
    ranks: Sequence[Sequence[Sequence[tuple[MemberT, int]]]],
    *,
    max_tokens: int,
    rows_multiple: int,
    images: Sequence[int] = (),
) -> list[list[list[MemberT]]]:
    """Every rank's members, by group and with their tokens, in rows of at most `max_tokens`: rank -> rows -> members.

    All ranks get the same number of rows: the smallest multiple of `rows_multiple` for which `fill` finds a way on
    every rank, to 1 %. `images` as for `deal`.
    """
    tokens = [[tokens for group in rank for _, tokens in group] for rank in ranks]
    assert all(cost <= max_tokens for rank in tokens for cost in rank), f"a sample is longer than {max_tokens}"
    fewest = max(_fewest_rows(rank, max_tokens) for rank in tokens)
    num_rows = math.ceil(max(1, fewest) / rows_multiple) * rows_multiple
    while True:
        filled: list[list[list[MemberT]]] = []
        for rank in ranks:
            rows = fill(rank, max_tokens, num_rows, images)
            if rows is None:
                break
            filled.append(rows)
        else:
            return filled
        num_rows += rows_multiple * math.ceil(num_rows / rows_multiple / 100)


def _fewest_rows(tokens: Sequence[int], max_tokens: int) -> int:
    """A number of rows that samples need at least: at most k that are longer than a (k + 1)-th of a row share one."""
    by_length = [math.ceil(sum(cost * (k + 1) > max_tokens for cost in tokens) / k) for k in range(1, 8)]
    return max(math.ceil(sum(tokens) / max_tokens), *by_length)


def _goal(costs: Costs, num_bins: int, tolerance: float) -> int:
    """Tokens at which the fullest bin is low enough; it cannot be lower than the costliest sample."""
    enough = math.floor(sum(map(sum, costs)) / num_bins * (1 + tolerance))
    return max(enough, *(tokens for group in costs for tokens in group), 0)


def _empty_bins(costs: Costs, num_bins: int, images: Sequence[int]) -> _Bins:
    assert len(images) in (0, len(costs)), f"{len(images)} costs of images for {len(costs)} groups"
    held: list[dict[int, list[int]]] = [{} for _ in range(num_bins)]
    return _Bins(costs, images or [1] * len(costs), held, [0] * num_bins, [[] for _ in held])


def _fill_with_groups(costs: Costs, num_bins: int, images: Sequence[int]) -> _Bins:
    """Each group whole, longest first, in the bin that is the emptiest by then."""
    bins = _empty_bins(costs, num_bins, images)
    for _, group in sorted((-sum(its), group) for group, its in enumerate(costs) if its):
        _add(bins, min(range(num_bins), key=bins.loads.__getitem__), group, range(len(costs[group])))
    return bins


def _fill_with_samples(costs: Costs, num_bins: int, images: Sequence[int], max_tokens: int) -> _Bins:
    """Each sample, longest first, in the first bin with room, its group's before others; else in the emptiest one."""
    bins = _empty_bins(costs, num_bins, images)
    for negative, group, sample in sorted((-cost, g, s) for g, its in enumerate(costs) for s, cost in enumerate(its)):
        room = [index for index, load in enumerate(bins.loads) if load - negative <= max_tokens]
        room = room or [min(range(num_bins), key=bins.loads.__getitem__)]
        _add(bins, next((index for index in room if group in bins.held[index]), room[0]), group, [sample])
    return bins


def _add(bins: _Bins, index: int, group: int, samples: Sequence[int]) -> None:
    costs = bins.costs[group]
    together = [*bins.held[index].get(group, []), *samples]
    bins.held[index][group] = sorted(together, key=lambda sample: (costs[sample], sample))
    bins.loads[index] += sum(costs[sample] for sample in samples)


def _level(bins: _Bins, goal: int) -> _Bins:
    """Exchange parcels until no bin is above `goal` tokens, or the fullest finds no partner; then leave no bin empty.

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
        if take.samples:
            _move(bins, partner, fullest, take)
    for empty in (index for index, held in enumerate(bins.held) if not held):
        # It would run a sample of no weight: it takes a group, else a sample, from the fullest bin that can spare one.
        donors = [index for index, held in enumerate(bins.held) if sum(map(len, held.values())) > 1]
        if not donors:
            break
        donor = max(donors, key=bins.loads.__getitem__)
        whole = len(bins.held[donor]) > 1
        _move(bins, donor, empty, next(parcel for parcel in reversed(bins.parcels[donor]) if parcel.whole == whole))
    return bins


def _list_parcels(bins: _Bins, index: int) -> None:
    """Of each group single samples, the cheapest, the dearest: gated ones, which cost more, mostly stay together."""
    parcels = []
    for group, samples in bins.held[index].items():
        until = [0, *accumulate(bins.costs[group][sample] for sample in samples)]
        count = len(samples)
        places = range(0, count, math.ceil(count / _MAX_CUTS))
        spans = {(start, start + 1) for start in places} | {(start, count) for start in places}
        for start, end in sorted(spans | {(0, end) for end in places if end}):
            tokens = until[end] - until[start]
            parcels.append(_Parcel(tokens, group, tuple(samples[start:end]), whole=end - start == count))
    bins.parcels[index] = sorted(parcels, key=lambda parcel: (parcel.tokens, parcel.group))


def _move(bins: _Bins, source: int, target: int, parcel: _Parcel) -> None:
    stay = [sample for sample in bins.held[source].pop(parcel.group) if sample not in parcel.samples]
    if stay:
        bins.held[source][parcel.group] = stay
    bins.loads[source] -= parcel.tokens
    _add(bins, target, parcel.group, parcel.samples)
    _list_parcels(bins, source)
    _list_parcels(bins, target)


def _best_exchange(bins: _Bins, fullest: int, partners: Sequence[int], goal: int) -> _Exchange | None:
    """The best exchange of those that cut the fewest groups; None if none lowers the fullest bin."""
    for cuts in (0, 1, 2):
        found = (exchange for partner in partners for exchange in _exchanges(bins, fullest, partner, goal, cuts))
        best = min(found, key=lambda exchange: exchange[0], default=None)
        if best is not None:
            return best
    return None


def _exchanges(bins: _Bins, fullest: int, partner: int, goal: int, cuts: int) -> Iterator[_Exchange]:
    """Exchanges that cut at most `cuts` groups and lower the higher of two loads, near the best for each parcel."""
    here, there = bins.held[fullest], bins.held[partner]
    high, low = bins.loads[fullest], bins.loads[partner]

    def price(parcel: _Parcel, target: dict[int, list[int]]) -> int:
        """Images to encode more if the parcel goes to the bin `target`; none for `_NOTHING`, new there but whole."""
        return bins.images[parcel.group] * ((parcel.group not in target) - parcel.whole)

    every = [(take, price(take, here)) for take in (_NOTHING, *bins.parcels[partner])]
    takes_by_cuts = [[take for take in every if take[1] <= 0], every]
    for give in bins.parcels[fullest]:
        give_price = price(give, there)
        cuts_left = cuts - (give_price > 0)
        if cuts_left < 0:
            continue
        takes = takes_by_cuts[min(cuts_left, 1)]
        # The higher load ends up lowest where half of the difference moves.
        at = bisect_left(takes, give.tokens - (high - low) / 2, key=lambda take: take[0].tokens)
        for take, take_price in takes[max(0, at - 2) : at + 2]:
            moved = give.tokens - take.tokens
            if 0 < moved < high - low and take.group != give.group:
                higher = max(high - moved, low + moved)
                yield (max(0, higher - goal), give_price + take_price, higher), partner, give, take
