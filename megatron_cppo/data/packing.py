"""A step's samples -> planned packed rows. Pure bookkeeping: the same on every rank, so no rank can miss a collective.

A segment is a sample under one view: its prompt and its response but for the last token, which predicts nothing. The
segments of a sample share a row (the mask compares their entropies); samples of one prompt share it where the budget
allows, so that their image is encoded once. Every data-parallel rank gets the same number of rows, one that the
pipeline's schedule takes. Segments are padded at their ends, where causal attention hides it from all that count.
Legend: T tokens of a row, S segments + 1, N response tokens, F image tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_cppo.plan import Packing
from megatron_cppo.types import VIEWS, Batch, Group, ImageKey, MicroBatch, MiniBatch, Sample, View

ViewsFor = Callable[[Sample], Sequence[View]]
"""Which views the objective needs of a sample; the original always comes first."""


_Member = tuple[int, Sample, tuple[View, ...]]
"""Index in the step (-1 for a filler), sample, its views."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """Samples that travel together, and their tokens, padding included."""

    members: tuple[_Member, ...]
    tokens: int


def segment_tokens(sample: Sample) -> int:
    """Tokens of one segment of `sample`."""
    return len(sample.prompt.token_ids) + len(sample.token_ids) - 1


def rows_per_rank(batch: Batch) -> int:
    """Packed rows that each data-parallel rank runs in the batch's updates."""
    return sum(len(mini.microbatches[0]) for mini in batch.updates)


def scoring_rows(batch: Batch) -> int:
    """Packed rows that each data-parallel rank runs in one scoring pass; 0 when none was planned."""
    return len(batch.scoring.microbatches[0]) if batch.scoring is not None else 0


def build_batch(
    groups: Sequence[Group], *, views_for: ViewsFor, num_updates: int, packing: Packing, score: bool
) -> Batch:
    """Plan one step: its updates (mini-batches of equal prompt count), and the scoring pass when `score`.

    A sample that no row can hold is left out of its update where `packing` says so, and named in `oversized`; else it
    raises ValueError.
    """
    assert len(groups) % num_updates == 0, f"{len(groups)} prompts cannot be cut into {num_updates} updates"
    samples = tuple(sample for group in groups for sample in group.samples)
    numbered, first = [], 0
    for group in groups:
        numbered.append([(first + i, sample, tuple(views_for(sample))) for i, sample in enumerate(group.samples)])
        first += len(group.samples)
    oversized = _oversized([member for group in numbered for member in group], packing)
    fitting = [[member for member in group if member[0] not in oversized] for group in numbered]
    original = [[(index, sample, _ORIGINAL) for index, sample, _ in group] for group in numbered]
    share = len(groups) // num_updates
    return Batch(
        samples=samples,
        scoring=_mini_batch(original, packing, filler=samples) if score else None,
        updates=tuple(
            _mini_batch(fitting[i * share : (i + 1) * share], packing, filler=samples) for i in range(num_updates)
        ),
        oversized=tuple(sorted(oversized)),
    )


_ORIGINAL: tuple[View, ...] = ("original",)


def _oversized(members: Sequence[_Member], packing: Packing) -> set[int]:
    """The samples that no row can hold under all of their views, where they are to be left out; else ValueError."""
    found = set()
    for index, sample, views in members:
        cost = len(views) * packing.segment_tokens(segment_tokens(sample))
        if cost <= packing.max_tokens:
            continue
        if not packing.drop_oversized:
            raise ValueError(
                f"row {sample.prompt.row}: {len(views)} views of {segment_tokens(sample)} tokens exceed "
                f"policy.max_tokens_per_microbatch {packing.max_tokens}; raise it to {packing.row_tokens(cost)}"
            )
        found.add(index)
    return found


def _mini_batch(groups: Sequence[Sequence[_Member]], packing: Packing, *, filler: Sequence[Sample]) -> MiniBatch:
    """The rows of these samples; where a rank has none, the shortest sample of `filler` at zero weight."""
    pieces = [piece for group in groups for piece in _pieces(group, packing)]
    rows = _balance(pieces, packing)
    shortest = min(filler, key=segment_tokens)
    packed = [pack(row or [(-1, shortest, _ORIGINAL)], packing) for row in rows]
    per_rank = len(packed) // packing.data_parallel
    members = [sample for group in groups for _, sample, _ in group]
    return MiniBatch(
        microbatches=tuple(
            tuple(packed[rank * per_rank : (rank + 1) * per_rank]) for rank in range(packing.data_parallel)
        ),
        # Where every sample was left out, the loss is zero, over one.
        num_tokens=max(1, sum(len(sample.token_ids) for sample in members)),
        num_samples=max(1, len(members)),
        num_gated_samples=sum(sample.gated for sample in members),
    )


def _pieces(group: Sequence[_Member], packing: Packing) -> list[_Piece]:
    """The group whole, where a quarter of a row holds it; else each sample alone."""
    costs = [len(views) * packing.segment_tokens(segment_tokens(sample)) for _, sample, views in group]
    if group and sum(costs) <= packing.max_tokens // 4:
        return [_Piece(tuple(group), sum(costs))]
    return [_Piece((member,), cost) for member, cost in zip(group, costs, strict=True)]


def _balance(pieces: Sequence[_Piece], packing: Packing) -> list[list[_Member]]:
    """Rows, a multiple of what ranks and schedule take: as few as hold the pieces, about equally full (longest first).

    A row that gets no piece is left empty.
    """
    total, multiple = sum(piece.tokens for piece in pieces), packing.rows_multiple
    longest = max((piece.tokens for piece in pieces), default=0)
    assert longest <= packing.max_tokens, f"a piece of {longest} tokens, rows of {packing.max_tokens}"
    per_rank = max(1, math.ceil(total / packing.max_tokens / packing.data_parallel))
    per_rank = math.ceil(per_rank / multiple) * multiple
    order = sorted(range(len(pieces)), key=lambda i: (-pieces[i].tokens, i))
    while True:
        loads = [0] * (per_rank * packing.data_parallel)
        rows: list[list[_Member]] = [[] for _ in loads]
        for i in order:
            row = min(range(len(loads)), key=loads.__getitem__)
            loads[row] += pieces[i].tokens
            rows[row].extend(pieces[i].members)
        if max(loads) <= packing.max_tokens:
            return rows
        per_rank += multiple


def pack(members: Sequence[_Member], packing: Packing) -> MicroBatch:
    """One packed row of `members`."""
    ids, positions, lengths = [], [], []
    images: dict[ImageKey, int] = {}
    grids, slots, features = [], [], []
    rows: dict[View, list[np.ndarray]] = {view: [] for view in VIEWS}
    start = num_features = padding = 0
    first_feature: dict[ImageKey, int] = {}
    for _, sample, views in members:
        prompt, count = sample.prompt, len(sample.token_ids)
        length = packing.segment_tokens(segment_tokens(sample))
        num_added = length - segment_tokens(sample)
        segment_ids = np.array(prompt.token_ids + sample.token_ids[:-1] + (0,) * num_added, dtype=np.int64)
        tail = np.broadcast_to(prompt.next_position + np.arange(count - 1 + num_added), (3, count - 1 + num_added))
        segment_positions = np.concatenate([np.array(prompt.positions, dtype=np.int64), tail], axis=1)
        for view in VIEWS:
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
    counts = [len(sample.token_ids) for _, sample, _ in members]
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
        sample_ids=tuple(index for index, _, _ in members),
        targets_N=_flat([np.array(sample.token_ids) for _, sample, _ in members]),
        sample_N=torch.from_numpy(np.repeat(np.arange(len(members)), counts)),
        rows_original_N=_flat(rows["original"]),
        rows_preserving_N=_flat(rows["preserving"]),
        rows_removing_N=_flat(rows["removing"]),
    )


def _flat(parts: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64)) if parts else torch.zeros(0, dtype=torch.int64)
