"""A step's samples -> planned packed rows. Pure bookkeeping: the same on every rank, so no rank can miss a collective.

A segment is a sample under one view: its prompt and its response but for the last token, which predicts nothing. The
segments of a sample share a row (the mask compares their entropies), unless the perturbed ones are constants, which
rows of their own bring up in a pass without gradient. `balance` says which rank and which row runs which sample.
Segments are padded at their ends, where causal attention hides it from all that count.
Legend: T tokens of a row, S segments + 1, N response tokens, F image tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from megatron_cppo.data import balance
from megatron_cppo.plan import Packing
from megatron_cppo.types import VIEWS, Batch, Group, ImageKey, MicroBatch, MiniBatch, RowsOfRanks, Sample, View

ViewsFor = Callable[[Sample], Sequence[View]]
"""Which views the objective needs of a sample; the original always comes first."""
PASSES_OF_TRAINING = 3
"""Forward passes that a segment costs where it has a gradient: backward is about two."""


class Member(NamedTuple):
    """A sample in a row: its index in the step (-1 for a filler), the views that it carries, and those that are
    constants, remembered from another pass."""

    index: int
    sample: Sample
    views: tuple[View, ...]
    constants: tuple[View, ...] = ()


_ORIGINAL: tuple[View, ...] = ("original",)


def segment_tokens(sample: Sample) -> int:
    """Tokens of one segment of `sample`."""
    return len(sample.prompt.token_ids) + len(sample.token_ids) - 1


def rows_per_rank(batch: Batch) -> int:
    """Packed rows that each data-parallel rank runs in the batch's updates, in all of their passes."""
    passes = [rows for mini in batch.updates for rows in passes_of(mini)]
    return sum(len(rows[0]) for rows in passes)


def passes_of(mini: MiniBatch) -> list[RowsOfRanks]:
    """The passes of one update, in their order."""
    return [rows for rows in (mini.constant_views, mini.counting, mini.microbatches) if rows]


def scoring_rows(batch: Batch) -> int:
    """Packed rows that each data-parallel rank runs in one scoring pass; 0 when none was planned."""
    return len(batch.scoring.microbatches[0]) if batch.scoring is not None else 0


def build_batch(
    groups: Sequence[Group],
    *,
    views_for: ViewsFor,
    num_updates: int,
    packing: Packing,
    score: bool,
    constant_views: bool = False,
    count_masked: bool = False,
) -> Batch:
    """Plan one step: its updates (mini-batches of equal prompt count), and the scoring pass when `score`.

    `constant_views`: perturbed views get a pass of their own, without gradient. `count_masked`: so does what counting
    the masked tokens takes. A sample that no row can hold is left out of its update where `packing` says so, and named
    in `oversized`; else it raises ValueError.
    """
    assert len(groups) % num_updates == 0, f"{len(groups)} prompts cannot be cut into {num_updates} updates"
    samples = tuple(sample for group in groups for sample in group.samples)
    numbered, first = [], 0
    for group in groups:
        enumerated = enumerate(group.samples, first)
        numbered.append([_member(index, sample, views_for, constant_views) for index, sample in enumerated])
        first += len(group.samples)
    oversized = _oversized([member for group in numbered for member in group], packing)
    fitting = [[member for member in group if member.index not in oversized] for group in numbered]
    original = [[Member(member.index, member.sample, _ORIGINAL) for member in group] for group in numbered]
    share = len(groups) // num_updates
    return Batch(
        samples=samples,
        scoring=_mini_batch(original, packing, samples, count_masked=False) if score else None,
        updates=tuple(
            _mini_batch(fitting[i * share : (i + 1) * share], packing, samples, count_masked=count_masked)
            for i in range(num_updates)
        ),
        oversized=tuple(sorted(oversized)),
    )


def _member(index: int, sample: Sample, views_for: ViewsFor, constant_views: bool) -> Member:
    original, *perturbed = views_for(sample)
    if constant_views:
        return Member(index, sample, (original,), tuple(perturbed))
    return Member(index, sample, (original, *perturbed))


def _cost(member: Member, packing: Packing) -> int:
    """Tokens of the member's segments."""
    return len(member.views) * packing.segment_tokens(segment_tokens(member.sample))


def _oversized(members: Sequence[Member], packing: Packing) -> set[int]:
    """The samples that no row can hold under all of their views, where they are to be left out; else ValueError."""
    found = set()
    for member in members:
        cost = _cost(member, packing)
        if cost <= packing.max_tokens:
            continue
        if not packing.drop_oversized:
            raise ValueError(
                f"row {member.sample.prompt.row}: {len(member.views)} views of {segment_tokens(member.sample)} tokens "
                f"exceed policy.max_tokens_per_microbatch {packing.max_tokens}; raise it to {packing.row_tokens(cost)}"
            )
        found.add(member.index)
    return found


def _mini_batch(
    groups: Sequence[Sequence[Member]], packing: Packing, filler: Sequence[Sample], *, count_masked: bool
) -> MiniBatch:
    """The rows of these samples in every pass; where there are none, the shortest sample of `filler` at zero weight."""
    ranks = _deal(groups, packing)
    constant = [[[Member(m.index, m.sample, (v,)) for m in g for v in m.constants] for g in rank] for rank in ranks]
    counted = [[[_counted(m) for m in g if "removing" in m.views + m.constants] for g in rank] for rank in ranks]
    shortest = Member(-1, min(filler, key=segment_tokens), _ORIGINAL)
    members = [member for group in groups for member in group]
    return MiniBatch(
        microbatches=_rows(ranks, packing, shortest),
        # Where every sample was left out, the loss is zero, over one.
        num_tokens=max(1, sum(len(member.sample.token_ids) for member in members)),
        num_samples=max(1, len(members)),
        num_gated_samples=sum(member.sample.gated for member in members),
        constant_views=_rows(constant, packing, shortest) if any(map(any, constant)) else (),
        counting=_rows(counted, packing, shortest) if count_masked and any(map(any, counted)) else (),
    )


def _counted(member: Member) -> Member:
    """What counting a sample's masked tokens takes: the preserving view has no part in it."""
    views = tuple(view for view in member.views if view != "preserving")
    return member._replace(views=views, constants=tuple(view for view in member.constants if view != "preserving"))


def _deal(groups: Sequence[Sequence[Member]], packing: Packing) -> list[list[list[Member]]]:
    """Rank -> its members, by group: work even over the passes, few groups on several ranks."""

    def work(member: Member) -> int:
        passes = PASSES_OF_TRAINING * len(member.views) + len(member.constants)
        return passes * packing.segment_tokens(segment_tokens(member.sample))

    dealt = balance.deal(
        [[work(member) for member in group] for group in groups],
        packing.data_parallel,
        images=[_image_tokens(group) for group in groups],
    )
    ranks: list[list[list[Member]]] = [[[] for _ in groups] for _ in dealt]
    for rank, places in zip(ranks, dealt, strict=True):
        for group, sample in places:
            rank[group].append(groups[group][sample])
    return ranks


def _image_tokens(group: Sequence[Member]) -> int:
    """Image tokens of the group's prompt under the views that any of its samples carries."""
    views = {view for member in group for view in (*member.views, *member.constants)}
    return len(views) * sum(grid.num_tokens for member in group[:1] for grid in member.sample.prompt.grids)


def _rows(ranks: Sequence[Sequence[Sequence[Member]]], packing: Packing, filler: Member) -> RowsOfRanks:
    """Every rank's packed rows of one pass."""
    costs = [[[(member, _cost(member, packing)) for member in group] for group in rank] for rank in ranks]
    images = [max(_image_tokens(rank[number]) for rank in ranks) for number in range(len(ranks[0]))]
    filled = balance.fill_ranks(
        costs, max_tokens=packing.max_tokens, rows_multiple=packing.rows_multiple, images=images
    )
    return tuple(tuple(pack(row or [filler], packing) for row in rows) for rows in filled)


def pack(members: Sequence[Member], packing: Packing) -> MicroBatch:
    """One packed row of `members`."""
    ids, positions, lengths = [], [], []
    images: dict[ImageKey, int] = {}
    grids, slots, features = [], [], []
    rows: dict[View, list[np.ndarray]] = {view: [] for view in VIEWS}
    start = num_features = padding = 0
    first_feature: dict[ImageKey, int] = {}
    constants: list[tuple[int, View]] = []
    num_constant = 0
    for index, sample, views, constant_views in members:
        prompt, count = sample.prompt, len(sample.token_ids)
        length = packing.segment_tokens(segment_tokens(sample))
        num_added = length - segment_tokens(sample)
        segment_ids = np.array(prompt.token_ids + sample.token_ids[:-1] + (0,) * num_added, dtype=np.int64)
        tail = np.broadcast_to(prompt.next_position + np.arange(count - 1 + num_added), (3, count - 1 + num_added))
        segment_positions = np.concatenate([np.array(prompt.positions, dtype=np.int64), tail], axis=1)
        for view in VIEWS:
            if view in constant_views:
                # Counted from the row's end, which is not known yet.
                rows[view].append(-2 - num_constant - np.arange(count))
                constants.append((index, view))
                num_constant += count
                continue
            if view not in views:
                rows[view].append(np.full(count, -1))
                continue
            for key, grid in zip(prompt.images(view), prompt.grids, strict=True):
                if key not in images:
                    images[key], first_feature[key] = len(images), num_features
                    grids.append(grid)
                    num_features += grid.num_tokens
                features.append(first_feature[key] + np.arange(grid.num_tokens))
            if prompt.grids:
                slots.append(start + np.array(prompt.image_slots))
            ids.append(segment_ids)
            positions.append(segment_positions)
            lengths.append(length)
            rows[view].append(start + len(prompt.token_ids) - 1 + np.arange(count))
            start += length
            padding += num_added
    rest = -start % packing.row_multiple
    if rest:
        ids.append(np.zeros(rest, dtype=np.int64))
        positions.append(np.broadcast_to(np.arange(rest), (3, rest)))
        lengths.append(rest)
    counts = [len(member.sample.token_ids) for member in members]
    flat = {view: _flat(parts) for view, parts in rows.items()}
    end = start + rest
    flat = {view: torch.where(places < -1, end - 2 - places, places) for view, places in flat.items()}
    return MicroBatch(
        token_ids_T=torch.from_numpy(np.concatenate(ids)),
        positions_3T=torch.from_numpy(np.concatenate(positions, axis=1)),
        cu_seqlens_S=torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)),
        max_seqlen=max(lengths),
        num_padding_tokens=padding + rest,
        images=tuple(images),
        grids=tuple(grids),
        feature_slots_F=_flat(slots),
        feature_rows_F=_flat(features),
        sample_ids=tuple(member.index for member in members),
        targets_N=_flat([np.array(member.sample.token_ids) for member in members]),
        sample_N=torch.from_numpy(np.repeat(np.arange(len(members)), counts)),
        rows_original_N=flat["original"],
        rows_preserving_N=flat["preserving"],
        rows_removing_N=flat["removing"],
        constants=tuple(constants),
    )


def _flat(parts: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64)) if parts else torch.zeros(0, dtype=torch.int64)
