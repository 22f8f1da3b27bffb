"""A step's samples -> planned packed rows. Pure bookkeeping: the same on every rank, so no rank can miss a collective.

A segment is a sample under one view: its prompt and its response but for the last token, which predicts nothing. The
segments of a sample share a row (the mask compares their entropies); samples of one prompt share it where the budget
allows, so that their image is encoded once. Every data-parallel rank gets the same number of rows.
Legend: T tokens of a row, S segments + 1, N response tokens, F image tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_cppo.types import VIEWS, Batch, Group, ImageKey, MicroBatch, MiniBatch, Sample, View

ViewsFor = Callable[[Sample], Sequence[View]]
"""Which views the objective needs of a sample; the original always comes first."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """Samples that travel together: (index in the step, sample, its views), and their tokens."""

    members: tuple[tuple[int, Sample, tuple[View, ...]], ...]
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
    groups: Sequence[Group],
    *,
    views_for: ViewsFor,
    num_updates: int,
    data_parallel: int,
    max_tokens: int,
    row_multiple: int,
    score: bool,
) -> Batch:
    """Plan one step: its updates (mini-batches of equal prompt count), and the scoring pass when `score`.

    `max_tokens` is a row's capacity; a row is padded to a multiple of `row_multiple`. Raises ValueError for a sample
    that no row can hold.
    """
    assert len(groups) % num_updates == 0, f"{len(groups)} prompts cannot be cut into {num_updates} updates"
    size = {"data_parallel": data_parallel, "max_tokens": max_tokens, "row_multiple": row_multiple}
    samples = tuple(sample for group in groups for sample in group.samples)
    numbered, first = [], 0
    for group in groups:
        numbered.append([(first + i, sample) for i, sample in enumerate(group.samples)])
        first += len(group.samples)
    share = len(groups) // num_updates
    return Batch(
        samples=samples,
        scoring=_mini_batch(numbered, _original_only, **size) if score else None,
        updates=tuple(
            _mini_batch(numbered[i * share : (i + 1) * share], views_for, **size) for i in range(num_updates)
        ),
    )


def _original_only(_: Sample) -> tuple[View, ...]:
    return ("original",)


def _mini_batch(
    groups: Sequence[Sequence[tuple[int, Sample]]],
    views_for: ViewsFor,
    *,
    data_parallel: int,
    max_tokens: int,
    row_multiple: int,
) -> MiniBatch:
    pieces = [piece for group in groups for piece in _pieces(group, views_for, max_tokens)]
    rows = _balance(pieces, data_parallel, max_tokens)
    filler = min((member for piece in pieces for member in piece.members), key=lambda m: segment_tokens(m[1]))[1]
    packed = [pack(row or [(-1, filler, ("original",))], row_multiple) for row in rows]
    per_rank = len(packed) // data_parallel
    members = [sample for group in groups for _, sample in group]
    return MiniBatch(
        microbatches=tuple(tuple(packed[rank * per_rank : (rank + 1) * per_rank]) for rank in range(data_parallel)),
        num_tokens=sum(len(sample.token_ids) for sample in members),
        num_samples=len(members),
        num_gated_samples=sum(sample.gated for sample in members),
    )


def _pieces(group: Sequence[tuple[int, Sample]], views_for: ViewsFor, max_tokens: int) -> list[_Piece]:
    """The group whole, where a quarter of a row holds it; else each sample alone."""
    members = [(index, sample, tuple(views_for(sample))) for index, sample in group]
    costs = [segment_tokens(sample) * len(views) for _, sample, views in members]
    for (_, sample, views), cost in zip(members, costs, strict=True):
        if cost > max_tokens:
            raise ValueError(
                f"row {sample.prompt.row}: {len(views)} views of {segment_tokens(sample)} tokens exceed "
                f"policy.max_tokens_per_microbatch {max_tokens}; raise it to {cost}"
            )
    if sum(costs) <= max_tokens // 4:
        return [_Piece(tuple(members), sum(costs))]
    return [_Piece((member,), cost) for member, cost in zip(members, costs, strict=True)]


def _balance(
    pieces: Sequence[_Piece], data_parallel: int, max_tokens: int
) -> list[list[tuple[int, Sample, tuple[View, ...]]]]:
    """Rows, a multiple of `data_parallel`: as few as hold the pieces, each filled about equally (longest first)."""
    total = sum(piece.tokens for piece in pieces)
    per_rank = max(1, math.ceil(total / max_tokens / data_parallel))
    order = sorted(range(len(pieces)), key=lambda i: (-pieces[i].tokens, i))
    while True:
        loads = [0] * (per_rank * data_parallel)
        rows: list[list[tuple[int, Sample, tuple[View, ...]]]] = [[] for _ in loads]
        for i in order:
            row = min(range(len(loads)), key=loads.__getitem__)
            loads[row] += pieces[i].tokens
            rows[row].extend(pieces[i].members)
        if max(loads) <= max_tokens:
            return rows
        per_rank += 1


def pack(members: Sequence[tuple[int, Sample, tuple[View, ...]]], row_multiple: int = 1) -> MicroBatch:
    """One packed row of `members`: (index in the step or -1 for a filler, sample, views)."""
    ids, positions, lengths = [], [], []
    images: dict[ImageKey, int] = {}
    grids, slots, features = [], [], []
    rows: dict[View, list[np.ndarray]] = {view: [] for view in VIEWS}
    start = num_features = 0
    first_feature: dict[ImageKey, int] = {}
    for _, sample, views in members:
        prompt, count = sample.prompt, len(sample.token_ids)
        length = segment_tokens(sample)
        segment_ids = np.array(prompt.token_ids + sample.token_ids[:-1], dtype=np.int64)
        tail = np.broadcast_to(prompt.next_position + np.arange(count - 1), (3, count - 1))
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
    padding = -start % row_multiple
    if padding:
        ids.append(np.zeros(padding, dtype=np.int64))
        positions.append(np.broadcast_to(np.arange(padding), (3, padding)))
        lengths.append(padding)
    counts = [len(sample.token_ids) for _, sample, _ in members]
    return MicroBatch(
        token_ids_T=torch.from_numpy(np.concatenate(ids)),
        positions_3T=torch.from_numpy(np.concatenate(positions, axis=1)),
        cu_seqlens_S=torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)),
        max_seqlen=max(lengths),
        num_padding_tokens=padding,
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
