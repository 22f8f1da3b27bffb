"""Packed rows against what they promise: random steps are planned, and every row is taken apart again."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_cppo.algo.objective import OBJECTIVES
from megatron_cppo.data.packing import Member, ViewsFor, build_batch, pack, segment_tokens
from megatron_cppo.families.qwen2_5_vl.positions import rope_positions
from megatron_cppo.plan import Packing
from megatron_cppo.types import VIEWS, Batch, Group, ImageGrid, MicroBatch, MiniBatch, Prompt, Sample, View

IMAGE = 5
GRIDS = tuple(ImageGrid(1, height, width, 2) for height, width in ((2, 2), (2, 6), (4, 4), (6, 4)))
NUM_SEEDS = 120


def make_prompt(row: int, num_images: int, rng: np.random.Generator, epoch: int = 0) -> Prompt:
    """Random text before, between and after images; adjacent images without text between them, too."""

    def text(low: int, high: int) -> list[int]:
        return rng.integers(10, 10_000, int(rng.integers(low, high))).tolist()

    grids = tuple(GRIDS[int(i)] for i in rng.integers(0, len(GRIDS), num_images))
    ids = text(1, 6)
    for grid in grids:
        ids += [IMAGE] * grid.num_tokens + text(0, 3)
    positions, following = rope_positions(ids, grids, image_token_id=IMAGE)
    time, height, width = (tuple(axis) for axis in positions.tolist())
    slots = tuple(place for place, token in enumerate(ids) if token == IMAGE)
    return Prompt("train", row, epoch, "", "", "", tuple(ids), (time, height, width), following, grids, slots)


def make_sample(prompt: Prompt, index: int, token_ids: Sequence[int], advantage: float) -> Sample:
    return Sample(prompt, index, tuple(token_ids), (), "", False, 0, advantage=advantage)


def make_groups(rng: np.random.Generator, num_prompts: int, samples_per_prompt: int) -> list[Group]:
    """Groups of ragged answers, some of a single token, some with image pads in them; text-only prompts among them."""
    groups = []
    for row in range(num_prompts):
        prompt = make_prompt(row, int(rng.integers(0, 4)), rng, epoch=row % 2)
        samples = []
        for index in range(samples_per_prompt):
            ids = rng.integers(10, 10_000, int(rng.integers(1, 25)))
            ids[rng.random(len(ids)) < 0.1] = IMAGE
            samples.append(make_sample(prompt, index, ids.tolist(), float(rng.choice([-1.0, 0.0, 0.5]))))
        groups.append(Group(prompt, tuple(samples)))
    return groups


def all_views(sample: Sample) -> tuple[View, ...]:
    return VIEWS if sample.prompt.grids else ("original",)


def two_views(sample: Sample) -> tuple[View, ...]:
    return ("original", "removing") if sample.prompt.grids else ("original",)


VIEW_RULES: tuple[ViewsFor, ...] = (
    OBJECTIVES["cppo"].views_for,
    OBJECTIVES["grpo"].views_for,
    all_views,
    two_views,
)


@dataclass(frozen=True)
class Step:
    """A random step: what was asked for, and what was planned."""

    groups: list[Group]
    batch: Batch
    views_for: ViewsFor
    packing: Packing
    num_updates: int

    @property
    def parts(self) -> Iterator[tuple[MiniBatch, range, ViewsFor]]:
        """The mini-batches with the samples that each must hold: the updates', and the scoring pass's."""
        share = len(self.batch.samples) // self.num_updates
        for update, mini in enumerate(self.batch.updates):
            yield mini, range(update * share, (update + 1) * share), self.views_for
        if self.batch.scoring is not None:
            yield self.batch.scoring, range(len(self.batch.samples)), OBJECTIVES["grpo"].views_for


def random_step(seed: int) -> Step:
    rng = np.random.default_rng(seed)
    num_updates = int(rng.integers(1, 4))
    groups = make_groups(rng, num_updates * int(rng.integers(1, 6)), int(rng.integers(1, 6)))
    views_for = VIEW_RULES[seed % len(VIEW_RULES)]
    samples = [sample for group in groups for sample in group.samples]
    needed = max(len(views_for(sample)) * segment_tokens(sample) for sample in samples)
    packing = Packing(
        data_parallel=int(rng.integers(1, 9)),
        max_tokens=int(needed * rng.choice([1.0, 1.3, 4.0, 20.0])),
        row_multiple=int(rng.choice([1, 2, 8, 16])),
    )
    batch = build_batch(groups, views_for=views_for, num_updates=num_updates, packing=packing, score=bool(seed % 3))
    return Step(groups, batch, views_for, packing, num_updates)


@pytest.fixture(scope="module")
def steps() -> list[Step]:
    return [random_step(seed) for seed in range(NUM_SEEDS)]


def rows_of(mini: MiniBatch) -> list[MicroBatch]:
    return [row for rows in mini.microbatches for row in rows]


def members(row: MicroBatch, step: Step, views_for: ViewsFor) -> list[tuple[Sample, Sequence[View]]]:
    """The row's samples with their views; a filler is the sample whose tokens it repeats."""
    found: list[tuple[Sample, Sequence[View]]] = []
    for index in row.sample_ids:
        if index >= 0:
            found.append((step.batch.samples[index], views_for(step.batch.samples[index])))
        else:
            ids = row.token_ids_T[: row.token_ids_T.numel() - row.num_padding_tokens].tolist()
            same = [s for s in step.batch.samples if [*s.prompt.token_ids, *s.token_ids[:-1]] == ids]
            assert same, "a filler is no sample of the step"
            last = row.targets_N[-1].item()
            found.append((next(s for s in same if s.token_ids[-1] == last), ("original",)))
    return found


def rows_and_members(steps: list[Step]) -> Iterator[tuple[MicroBatch, list[tuple[Sample, Sequence[View]]]]]:
    for step in steps:
        for mini, _, views_for in step.parts:
            for row in rows_of(mini):
                yield row, members(row, step, views_for)


def segments(row: MicroBatch) -> list[tuple[int, int]]:
    """(start, end) of each segment, the padding's too."""
    return list(itertools.pairwise(row.cu_seqlens_S.tolist()))


def test_the_random_steps_cover_what_matters(steps: list[Step]) -> None:
    minis = [mini for step in steps for mini, _, _ in step.parts]
    samples = [sample for step in steps for sample in step.batch.samples]
    assert {step.packing.data_parallel for step in steps} == set(range(1, 9))
    assert {step.num_updates for step in steps} == {1, 2, 3}
    assert {len(step.groups[0].samples) for step in steps} == {1, 2, 3, 4, 5}
    assert {len(sample.prompt.grids) for sample in samples} == {0, 1, 2, 3}
    assert sum(-1 in row.sample_ids for mini in minis for row in rows_of(mini)) > 50
    assert sum(len(rows_of(mini)) > step.packing.data_parallel for step in steps for mini, _, _ in step.parts) > 50
    assert sum(row.num_padding_tokens > 0 for mini in minis for row in rows_of(mini)) > 50
    assert sum(len(row.sample_ids) > 3 for mini in minis for row in rows_of(mini)) > 50
    assert sum(IMAGE in sample.token_ids[:-1] and bool(sample.prompt.grids) for sample in samples) > 50
    assert min(len(sample.token_ids) for sample in samples) == 1


def test_every_sample_is_in_one_row_of_its_update(steps: list[Step]) -> None:
    for step in steps:
        for mini, expected, _ in step.parts:
            found = Counter(index for row in rows_of(mini) for index in row.sample_ids if index >= 0)
            assert found == Counter(expected)
        assert step.batch.samples == tuple(sample for group in step.groups for sample in group.samples)
        assert (step.batch.old_logp, step.batch.reference_logp) == (None, None)


def test_every_rank_has_as_many_rows_and_fillers_fill_only_empty_ones(steps: list[Step]) -> None:
    for step in steps:
        for mini, _, _ in step.parts:
            assert len(mini.microbatches) == step.packing.data_parallel
            assert len({len(rows) for rows in mini.microbatches}) == 1
            rows = rows_of(mini)
            fillers = [row for row in rows if -1 in row.sample_ids]
            shortest = min(segment_tokens(sample) for sample in step.batch.samples)
            for row in fillers:
                assert row.sample_ids == (-1,), "a filler shares a row"
                assert row.token_ids_T.numel() - row.num_padding_tokens == shortest
            assert len(fillers) < step.packing.data_parallel, "one row fewer on every rank would have done"


def test_rows_stay_within_their_capacity(steps: list[Step]) -> None:
    for step in steps:
        for mini, _, _ in step.parts:
            for row in rows_of(mini):
                tokens = row.token_ids_T.numel()
                assert tokens % step.packing.row_multiple == 0
                assert 0 <= row.num_padding_tokens < step.packing.row_multiple
                assert tokens - row.num_padding_tokens <= step.packing.max_tokens
                assert row.positions_3T.shape == (3, tokens)
                assert row.cu_seqlens_S.dtype == torch.int32
                assert (row.cu_seqlens_S[0], row.cu_seqlens_S[-1]) == (0, tokens)
                assert row.max_seqlen == max(end - start for start, end in segments(row))


def test_rows_are_about_equally_full(steps: list[Step]) -> None:
    """The fullest row and the emptiest differ by no more than what travels together."""
    for step in steps:
        for mini, expected, views_for in step.parts:
            load = [
                0 if -1 in row.sample_ids else row.token_ids_T.numel() - row.num_padding_tokens for row in rows_of(mini)
            ]
            samples = [step.batch.samples[i] for i in expected]
            heaviest = max(len(views_for(sample)) * segment_tokens(sample) for sample in samples)
            # A group of at most a quarter of a row travels whole.
            assert max(load) - min(load) <= max(heaviest, step.packing.max_tokens // 4)


def test_segments_hold_prompt_and_response_under_exactly_the_views(steps: list[Step]) -> None:
    for row, row_members in rows_and_members(steps):
        wanted = [[*sample.prompt.token_ids, *sample.token_ids[:-1]] for sample, views in row_members for _ in views]
        padding = [[0] * row.num_padding_tokens] if row.num_padding_tokens else []
        assert [row.token_ids_T[start:end].tolist() for start, end in segments(row)] == wanted + padding


def test_positions_restart_in_each_segment_and_continue_after_the_prompt(steps: list[Step]) -> None:
    for row, row_members in rows_and_members(steps):
        spans = iter(segments(row))
        for sample, views in row_members:
            prompt, tail = sample.prompt, len(sample.token_ids) - 1
            response = list(range(prompt.next_position, prompt.next_position + tail))
            for _ in views:
                start, end = next(spans)
                assert row.positions_3T[:, start:end].tolist() == [[*axis, *response] for axis in prompt.positions]
        for start, end in spans:
            assert row.positions_3T[:, start:end].tolist() == [list(range(end - start))] * 3


def test_rows_of_hidden_states_predict_the_targets(steps: list[Step]) -> None:
    for row, row_members in rows_and_members(steps):
        check_predictions(row, row_members)


def check_predictions(row: MicroBatch, row_members: list[tuple[Sample, Sequence[View]]]) -> None:
    by_view = dict(zip(VIEWS, (row.rows_original_N, row.rows_preserving_N, row.rows_removing_N), strict=True))
    spans = iter(segments(row))
    assert row.targets_N.tolist() == [token for sample, _ in row_members for token in sample.token_ids]
    assert row.sample_N.tolist() == [i for i, (sample, _) in enumerate(row_members) for _ in sample.token_ids]
    first = 0
    for sample, views in row_members:
        mine = slice(first, first + len(sample.token_ids))
        first = mine.stop
        for view in VIEWS:
            rows = by_view[view][mine]
            if view not in views:
                assert (rows == -1).all(), f"{view} was not asked for"
                continue
            start, end = next(spans)
            assert rows[0] == start + len(sample.prompt.token_ids) - 1
            assert row.token_ids_T[rows[0]] == sample.prompt.token_ids[-1]
            # The state at a token predicts the next: the target is what stands there, but for the last, which does not.
            assert torch.equal(row.token_ids_T[rows[:-1] + 1], row.targets_N[mine][:-1])
            assert rows[-1] == end - 1


def test_every_placeholder_gets_its_own_images_feature(steps: list[Step]) -> None:
    for row, row_members in rows_and_members(steps):
        check_features(row, row_members)


def check_features(row: MicroBatch, row_members: list[tuple[Sample, Sequence[View]]]) -> None:
    # The tower's output for the distinct images, one after the other: each feature says whose it is and which.
    features: list[Any] = [
        (key, token) for key, grid in zip(row.images, row.grids, strict=True) for token in range(grid.num_tokens)
    ]
    embedded: list[Any] = [None] * row.token_ids_T.numel()
    for slot, feature in zip(row.feature_slots_F.tolist(), row.feature_rows_F.tolist(), strict=True):
        assert embedded[slot] is None, f"two features at {slot}"
        embedded[slot] = features[feature]
    spans = iter(segments(row))
    needed = {}
    for sample, views in row_members:
        prompt = sample.prompt
        for view in (view for view in VIEWS if view in views):
            start, end = next(spans)
            own = [
                (key, token)
                for key, grid in zip(prompt.images(view), prompt.grids, strict=True)
                for token in range(grid.num_tokens)
            ]
            needed |= dict(zip(prompt.images(view), prompt.grids, strict=True))
            inside = embedded[start:end]
            assert [inside[slot] for slot in prompt.image_slots] == own
            # All else is text, image pads of a sampled answer too.
            assert sum(feature is not None for feature in inside) == len(own)
    assert len(set(row.images)) == len(row.images), "an image is encoded twice"
    assert dict(zip(row.images, row.grids, strict=True)) == needed


def test_counts_are_those_of_the_whole_update(steps: list[Step]) -> None:
    for step in steps:
        for mini, expected, _ in step.parts:
            samples = [step.batch.samples[i] for i in expected]
            assert mini.num_tokens == sum(len(sample.token_ids) for sample in samples)
            assert mini.num_samples == len(samples)
            assert mini.num_gated_samples == sum(s.advantage > 0 and len(s.prompt.grids) > 0 for s in samples)
            rows = rows_of(mini)
            assert mini.num_tokens == sum(row.targets_N.numel() for row in rows if -1 not in row.sample_ids)


def test_only_samples_with_positive_advantage_and_an_image_are_perturbed() -> None:
    rng = np.random.default_rng(0)
    prompt, text_only = make_prompt(0, 1, rng), make_prompt(1, 0, rng)
    views_for = OBJECTIVES["cppo"].views_for
    assert views_for(make_sample(prompt, 0, [11], 0.1)) == VIEWS
    for sample in (
        make_sample(prompt, 0, [11], 0.0),
        make_sample(prompt, 0, [11], -1.0),
        make_sample(text_only, 0, [11], 1.0),
    ):
        assert views_for(sample) == ("original",)
    row = pack([Member(0, make_sample(text_only, 0, [11, 12], 1.0), ("original",))], Packing())
    assert row.images == ()
    assert row.feature_slots_F.numel() == row.feature_rows_F.numel() == 0
    assert (row.rows_removing_N == -1).all()


def test_a_small_group_shares_a_row_and_its_images() -> None:
    """16 small groups of 4 over 4 rows: each image is encoded once per view, not once per sample."""
    rng = np.random.default_rng(1)
    groups = []
    for number in range(16):
        prompt = make_prompt(number, 1, rng)
        groups.append(Group(prompt, tuple(make_sample(prompt, i, [20 + i, 21], 1.0) for i in range(4))))
    costs = [sum(3 * segment_tokens(sample) for sample in group.samples) for group in groups]
    batch = build_batch(
        groups,
        views_for=OBJECTIVES["cppo"].views_for,
        num_updates=1,
        packing=Packing(data_parallel=2, max_tokens=max(4 * max(costs), sum(costs) // 3)),
        score=False,
    )
    rows = rows_of(batch.updates[0])
    assert len(rows) >= 4
    assert sum(len(row.images) for row in rows) == 16 * 3
    assert batch.scoring is None


def test_the_same_prompt_in_another_epoch_is_another_image() -> None:
    """Perturbations are drawn again each epoch, so their pixels differ though row and view are the same."""
    rng = np.random.default_rng(2)
    prompt = make_prompt(0, 1, rng)
    later = replace(prompt, epoch=1)
    members = [Member(i, make_sample(p, 0, [11], 1.0), VIEWS) for i, p in enumerate((prompt, later))]
    row = pack(members, Packing())
    assert len(row.images) == 6


def test_padding_is_a_segment_of_its_own() -> None:
    prompt = make_prompt(3, 0, np.random.default_rng(3))
    sample = make_sample(prompt, 0, [11, 12, 13], 1.0)
    length = segment_tokens(sample)
    row = pack([Member(0, sample, ("original",))], Packing(row_multiple=length + 5))
    assert row.cu_seqlens_S.tolist() == [0, length, length + 5]
    assert row.num_padding_tokens == 5
    assert pack([Member(0, sample, ("original",))], Packing(row_multiple=length)).num_padding_tokens == 0


def test_a_sample_that_fits_no_row_is_named() -> None:
    rng = np.random.default_rng(4)
    short, long = make_prompt(7, 0, rng), make_prompt(8, 1, rng)
    groups = [
        Group(short, (make_sample(short, 0, [11], 1.0),)),
        Group(long, (make_sample(long, 0, range(20, 40), 1.0),)),
    ]
    cost = 3 * (len(long.token_ids) + 20 - 1)
    options: dict[str, Any] = {
        "views_for": OBJECTIVES["cppo"].views_for,
        "num_updates": 1,
        "score": False,
    }
    said = (
        f"row 8: 3 views of {cost // 3} tokens exceed policy.max_tokens_per_microbatch {cost - 1}; raise it to {cost}"
    )
    with pytest.raises(ValueError, match=said):
        build_batch(groups, packing=Packing(data_parallel=2, max_tokens=cost - 1), **options)
    enough = Packing(data_parallel=2, max_tokens=cost)
    assert len(rows_of(build_batch(groups, packing=enough, **options).updates[0])) == 2
    with pytest.raises(AssertionError, match="2 prompts cannot be cut into 3 updates"):
        build_batch(groups, packing=enough, **(options | {"num_updates": 3}))


def test_planning_is_a_function_of_its_arguments() -> None:
    """Every rank plans for itself; a different plan on one of them would hang the others."""
    for seed in range(3):
        one, other = random_step(seed).batch, random_step(seed).batch
        for first, second in zip(one.updates, other.updates, strict=True):
            for a, b in zip(rows_of(first), rows_of(second), strict=True):
                assert (a.sample_ids, a.images) == (b.sample_ids, b.images)
                assert torch.equal(a.token_ids_T, b.token_ids_T)
