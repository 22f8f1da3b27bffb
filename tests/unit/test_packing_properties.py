"""What holds of every planned step: drawn lengths, gates, images and layouts, and every row taken apart again."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_cppo.algo.objective import OBJECTIVES
from megatron_cppo.data.packing import build_batch, passes_of
from megatron_cppo.families.qwen2_5_vl.positions import rope_positions
from megatron_cppo.plan import Packing
from megatron_cppo.policy.split import context_tokens
from megatron_cppo.types import VIEWS, Batch, Group, ImageGrid, MicroBatch, MiniBatch, Prompt, Sample, View

IMAGE, FIRST_WORD, LAST_WORD = 5, 10, 10_000
GRIDS = (ImageGrid(1, 2, 2, 2), ImageGrid(1, 2, 6, 2), ImageGrid(1, 4, 6, 2))
checked = settings(
    derandomize=True, deadline=None, database=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow]
)


@dataclass(frozen=True)
class Case:
    """A step to be planned; `packing` drops oversized samples."""

    groups: list[Group]
    num_updates: int
    packing: Packing
    context: int
    objective: str

    @property
    def samples(self) -> list[Sample]:
        return [sample for group in self.groups for sample in group.samples]

    def views(self, sample: Sample) -> tuple[View, ...]:
        return tuple(OBJECTIVES[self.objective].views_for(sample))

    def padded(self, sample: Sample) -> int:
        """Tokens of one segment, padded to what the layout can cut."""
        return -(-real_tokens(sample) // self.packing.segment_multiple) * self.packing.segment_multiple

    def fits(self, sample: Sample) -> bool:
        return len(self.views(sample)) * self.padded(sample) <= self.packing.max_tokens

    def plan(self, *, score: bool = False, drop: bool = True) -> Batch:
        return build_batch(
            self.groups,
            views_for=OBJECTIVES[self.objective].views_for,
            num_updates=self.num_updates,
            packing=replace(self.packing, drop_oversized=drop),
            score=score,
        )

    def parts(self, batch: Batch) -> list[tuple[MiniBatch, list[int], bool]]:
        """The mini-batches, with the samples that each must hold, and whether under the original view alone."""
        share = len(self.samples) // self.num_updates
        found = [
            (mini, [i for i in range(n * share, (n + 1) * share) if self.fits(self.samples[i])], False)
            for n, mini in enumerate(batch.updates)
        ]
        scoring = [(batch.scoring, list(range(len(self.samples))), True)] if batch.scoring is not None else []
        return [*found, *scoring]


def real_tokens(sample: Sample) -> int:
    """Tokens of one segment: the last of a response predicts nothing."""
    return len(sample.prompt.token_ids) + len(sample.token_ids) - 1


def make_prompt(row: int, num_text: int, num_images: int, rng: np.random.Generator) -> Prompt:
    grids = tuple(GRIDS[int(i)] for i in rng.integers(0, len(GRIDS), num_images))
    ids = rng.integers(FIRST_WORD, LAST_WORD, num_text).tolist()
    for grid in grids:
        ids += [IMAGE] * grid.num_tokens + rng.integers(FIRST_WORD, LAST_WORD, int(rng.integers(0, 3))).tolist()
    positions, following = rope_positions(ids, grids, image_token_id=IMAGE)
    time, height, width = (tuple(axis) for axis in positions.tolist())
    slots = tuple(place for place, token in enumerate(ids) if token == IMAGE)
    return Prompt("train", row, 0, "", "", "", tuple(ids), (time, height, width), following, grids, slots)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Layouts as the plan makes them: a row is a multiple of what is cut, and holds every sample's original view."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    num_updates, samples_per_prompt = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    lengths = draw(st.sampled_from([st.integers(1, 30), st.integers(1, 30), st.just(20)]))  # alike ones fill rows badly
    all_gated = draw(st.sampled_from([False, False, True]))
    groups = []
    for row in range(num_updates * draw(st.sampled_from([1, 1, 2, 3, 5]))):
        prompt = make_prompt(row, draw(st.integers(1, 12)), draw(st.integers(int(all_gated), 2)), rng)
        samples = []
        for index in range(samples_per_prompt):
            answer = tuple(rng.integers(FIRST_WORD, LAST_WORD, draw(lengths)).tolist())
            gate = 1.0 if all_gated or draw(st.booleans()) else -1.0
            samples.append(Sample(prompt, index, answer, (), "", False, 0, advantage=gate))
        groups.append(Group(prompt, tuple(samples)))
    context, tensor = draw(st.sampled_from([1, 2, 3, 4])), draw(st.sampled_from([1, 2, 4]))
    segment = 2 * context if context > 1 else 1
    alignment = draw(st.sampled_from([1, 1, 1, 16, 32]))  # FP8's 128 tokens would hide all else of these short samples
    row_multiple = math.lcm(segment, alignment * context * tensor)
    packing = Packing(
        data_parallel=draw(st.sampled_from([1, 1, 1, 2, 3, 4, 5, 6, 7, 8])),
        segment_multiple=segment,
        row_multiple=row_multiple,
        rows_multiple=draw(st.sampled_from([1, 1, 2, 3, 4])),
    )
    case = Case(groups, num_updates, packing, context, draw(st.sampled_from(["cppo", "cppo", "grpo"])))
    longest = max(case.padded(sample) for sample in case.samples)
    wanted = longest * draw(st.sampled_from([1.0, 1.4, 2.0, 2.7, 3.0, 8.0, 30.0]))
    return replace(case, packing=replace(packing, max_tokens=math.ceil(wanted / row_multiple) * row_multiple))


def rows_of(mini: MiniBatch) -> list[MicroBatch]:
    return [row for rows in mini.microbatches for row in rows]


def views_of(row: MicroBatch, number: int) -> tuple[View, ...]:
    """The views under which the row holds its member `number`, from where its hidden states are."""
    rows = (row.rows_original_N, row.rows_preserving_N, row.rows_removing_N)
    mine = row.sample_N == number
    for view_rows in rows:
        assert len(set((view_rows[mine] >= 0).tolist())) == 1, "a sample is partly under a view"
    return tuple(view for view, view_rows in zip(VIEWS, rows, strict=True) if (view_rows[mine] >= 0).all())


@checked
@given(cases(), st.booleans())
def test_ranks_and_schedule_get_the_rows_that_they_take(case: Case, score: bool) -> None:
    for mini, _, _ in case.parts(case.plan(score=score)):
        assert len(mini.microbatches) == case.packing.data_parallel
        (count,) = {len(rows) for rows in mini.microbatches}
        assert count >= 1
        assert count % case.packing.rows_multiple == 0


@checked
@given(cases(), st.booleans())
def test_every_sample_that_fits_is_in_one_row_under_exactly_its_views(case: Case, score: bool) -> None:
    batch = case.plan(score=score)
    assert batch.samples == tuple(case.samples)
    for mini, expected, original_only in case.parts(batch):
        found: Counter[tuple[int, tuple[View, ...]]] = Counter()
        for row in rows_of(mini):
            assert len(row.sample_N.unique()) == len(row.sample_ids)
            found.update((index, views_of(row, n)) for n, index in enumerate(row.sample_ids) if index >= 0)
        views = [("original",) if original_only else case.views(case.samples[i]) for i in expected]
        assert found == Counter(zip(expected, views, strict=True))


@checked
@given(cases(), st.booleans())
def test_fillers_are_a_sample_of_no_weight_under_the_original_view(case: Case, score: bool) -> None:
    shortest = min(real_tokens(sample) for sample in case.samples)
    for mini, _, _ in case.parts(case.plan(score=score)):
        for row in rows_of(mini):
            if -1 not in row.sample_ids:
                continue
            assert row.sample_ids == (-1,)
            assert views_of(row, 0) == ("original",)
            assert {key.view for key in row.images} <= {"original"}
            assert row.token_ids_T.numel() - row.num_padding_tokens == shortest


def members(row: MicroBatch, case: Case) -> list[tuple[Sample, Sequence[View]]]:
    """The row's samples with their views; a filler is the step's shortest."""
    shortest = min(case.samples, key=real_tokens)
    return [(case.samples[i] if i >= 0 else shortest, views_of(row, n)) for n, i in enumerate(row.sample_ids)]


@checked
@given(cases(), st.booleans())
def test_segments_and_rows_can_be_cut_and_no_row_is_too_long(case: Case, score: bool) -> None:
    for mini, _, _ in case.parts(case.plan(score=score)):
        for row in rows_of(mini):
            tokens, starts = row.token_ids_T.numel(), row.cu_seqlens_S.numpy().astype(np.int64)
            assert tokens <= case.packing.max_tokens
            assert tokens % case.packing.row_multiple == 0
            assert (starts[0], starts[-1]) == (0, tokens)
            lengths = np.diff(starts)
            assert (lengths > 0).all()
            assert (lengths % case.packing.segment_multiple == 0).all()
            assert row.max_seqlen == lengths.max()
            if case.context > 1:
                shares = [context_tokens(starts, rank, case.context) for rank in range(case.context)]
                assert sorted(np.concatenate(shares).tolist()) == list(range(tokens))


@checked
@given(cases(), st.booleans())
def test_padding_is_at_the_ends_of_segments_and_row_and_is_counted(case: Case, score: bool) -> None:
    for mini, _, _ in case.parts(case.plan(score=score)):
        for row in rows_of(mini):
            spans, real = list(itertools.pairwise(row.cu_seqlens_S.tolist())), 0
            wanted = [[*s.prompt.token_ids, *s.token_ids[:-1]] for s, views in members(row, case) for _ in views]
            for (start, end), ids in zip(spans, wanted, strict=False):
                assert end - start == -(-len(ids) // case.packing.segment_multiple) * case.packing.segment_multiple
                assert row.token_ids_T[start:end].tolist() == ids + [0] * (end - start - len(ids))
                real += len(ids)
            assert len(spans) - len(wanted) in (0, 1), "one segment fills the row up"
            if len(spans) > len(wanted):
                start, end = spans[-1]
                assert end - start < case.packing.row_multiple
                assert not row.token_ids_T[start:end].any()
            assert row.num_padding_tokens == row.token_ids_T.numel() - real


@checked
@given(cases(), st.booleans())
def test_hidden_states_of_no_padding_are_asked_for(case: Case, score: bool) -> None:
    """Each predicts its token from the one before; segment by segment, view by view."""
    for mini, _, _ in case.parts(case.plan(score=score)):
        for row in rows_of(mini):
            starts = iter(row.cu_seqlens_S.tolist())
            by_view = dict(zip(VIEWS, (row.rows_original_N, row.rows_preserving_N, row.rows_removing_N), strict=True))
            for number, (sample, views) in enumerate(members(row, case)):
                mine = row.sample_N == number
                assert row.targets_N[mine].tolist() == list(sample.token_ids)
                for view in views:
                    first = next(starts) + len(sample.prompt.token_ids) - 1
                    assert by_view[view][mine].tolist() == list(range(first, first + len(sample.token_ids)))


@checked
@given(cases())
def test_oversized_samples_are_those_that_no_row_holds_and_count_nowhere(case: Case) -> None:
    batch = case.plan()
    assert batch.oversized == tuple(i for i, sample in enumerate(case.samples) if not case.fits(sample))
    for mini, expected, _ in case.parts(batch):
        kept = [case.samples[i] for i in expected]
        trained = [row.targets_N.numel() for row in rows_of(mini) if -1 not in row.sample_ids]
        assert sum(trained) == sum(len(sample.token_ids) for sample in kept)
        # Losses are divided by these; where all were left out there is none.
        assert mini.num_tokens == max(1, sum(trained))
        assert mini.num_samples == max(1, len(kept))
        assert mini.num_gated_samples == sum(s.advantage > 0 and len(s.prompt.grids) > 0 for s in kept)


@checked
@given(cases())
def test_the_scoring_pass_holds_oversized_samples_too(case: Case) -> None:
    """Their old log-probs cost one view, and the log shows them."""
    scoring = case.plan(score=True).scoring
    assert scoring is not None
    assert scoring.num_samples == len(case.samples)
    assert scoring.num_tokens == sum(len(sample.token_ids) for sample in case.samples)


@checked
@given(cases())
def test_a_step_is_refused_exactly_where_samples_would_be_dropped(case: Case) -> None:
    dropped = case.plan().oversized
    if not dropped:
        batch = case.plan(drop=False)
        assert batch.oversized == ()
        kept, refused = (
            [[row.sample_ids for row in rows_of(mini)] for mini in each.updates] for each in (case.plan(), batch)
        )
        assert kept == refused
        return
    sample = case.samples[dropped[0]]
    multiple = case.packing.row_multiple
    cost = -(-len(case.views(sample)) * case.padded(sample) // multiple) * multiple
    with pytest.raises(ValueError, match=f"^row {sample.prompt.row}: .*; raise it to {cost}$"):
        case.plan(drop=False)


def fewest_rows(case: Case, kept: list[int]) -> int:
    """Rows per rank that could hold these samples, if they filled every row to its end."""
    tokens = sum(len(case.views(case.samples[i])) * case.padded(case.samples[i]) for i in kept)
    rows = max(1, math.ceil(tokens / case.packing.max_tokens / case.packing.data_parallel))
    return math.ceil(rows / case.packing.rows_multiple) * case.packing.rows_multiple


def planned_passes(case: Case) -> Batch:
    return build_batch(
        case.groups,
        views_for=OBJECTIVES[case.objective].views_for,
        num_updates=case.num_updates,
        packing=replace(case.packing, drop_oversized=True),
        score=False,
        constant_views=True,
        count_masked=True,
    )


@checked
@given(cases())
def test_every_pass_has_as_many_rows_on_every_rank(case: Case) -> None:
    """Or a rank would wait for ever, whatever its gates are."""
    for mini in planned_passes(case).updates:
        for rows in passes_of(mini):
            assert len(rows) == case.packing.data_parallel
            (count,) = {len(rank) for rank in rows}
            assert count >= 1
            assert count % case.packing.rows_multiple == 0


@checked
@given(cases())
def test_a_constant_view_is_remembered_on_the_rank_that_will_ask_for_it(case: Case) -> None:
    for mini in planned_passes(case).updates:
        every = Counter()
        for number, rows in enumerate(mini.microbatches):
            kept = Counter(
                (index, view)
                for row in (mini.constant_views[number] if mini.constant_views else ())
                for member, index in enumerate(row.sample_ids)
                if index >= 0
                for view in views_of(row, member)
            )
            asked = Counter(key for row in rows for key in row.constants)
            assert kept == asked
            counted = Counter(key for row in (mini.counting[number] if mini.counting else ()) for key in row.constants)
            assert counted == Counter(key for key in asked if key[1] == "removing")
            every += asked
        gated = {i for rank in mini.microbatches for row in rank for i in row.sample_ids if i >= 0}
        gated = {i for i in gated if len(case.views(case.samples[i])) == 3}
        assert every == Counter((i, view) for i in gated for view in ("preserving", "removing"))


@checked
@given(cases())
def test_rows_of_constant_views_are_named_behind_the_rows_end(case: Case) -> None:
    for mini in planned_passes(case).updates:
        for row in (row for rank in mini.microbatches for row in rank):
            named = torch.cat([row.rows_preserving_N, row.rows_removing_N])
            named = named[named >= 0]
            assert (row.rows_original_N < row.token_ids_T.numel()).all()
            expected = row.token_ids_T.numel() + torch.arange(len(named))
            assert torch.equal(named.sort().values, expected)
            lengths = [len(case.samples[index].token_ids) for index, _ in row.constants]
            assert sum(lengths) == len(named)


def test_the_drawn_steps_cover_what_matters() -> None:
    seen: Counter[str] = Counter()

    @checked
    @given(cases())
    def look(case: Case) -> None:
        batch = case.plan()
        rows = [row for mini in batch.updates for row in rows_of(mini)]
        padded = [row for row in rows if row.num_padding_tokens]
        seen["oversized"] += bool(batch.oversized)
        seen["all of an update oversized"] += any(not kept for _, kept, _ in case.parts(batch))
        seen["a filler"] += any(-1 in row.sample_ids for row in rows)
        seen["several rows on a rank"] += any(len(mini.microbatches[0]) > 1 for mini in batch.updates)
        seen["several samples in a row"] += any(len(row.sample_ids) > 1 for row in rows)
        seen["segments padded"] += bool(padded) and case.packing.segment_multiple > 1
        segments = [len(row.cu_seqlens_S) - 1 - sum(len(views) for _, views in members(row, case)) for row in rows]
        seen["a row filled up"] += any(segments)
        seen["more rows than the tokens need"] += any(
            len(mini.microbatches[0]) > fewest_rows(case, kept) for mini, kept, _ in case.parts(batch)
        )

    look()
    assert len(seen) == 8
    assert min(seen.values()) >= 4, seen
