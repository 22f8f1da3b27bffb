"""Where samples go: what holds of every plan of drawn costs, and how even realistic steps come out."""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_cppo.data.balance import Costs, SampleId, deal, fill, fill_ranks

checked = settings(
    derandomize=True, deadline=None, database=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow]
)


@dataclass(frozen=True)
class Step:
    """Tokens of each group's samples, what encoding its images costs, and the layout that runs them."""

    costs: list[list[int]]
    images: list[int]
    num_ranks: int
    max_tokens: int
    rows_multiple: int

    @property
    def samples(self) -> list[SampleId]:
        return [(group, sample) for group, costs in enumerate(self.costs) for sample in range(len(costs))]

    @property
    def costliest(self) -> int:
        return max((tokens for group in self.costs for tokens in group), default=0)

    def load(self, members: Sequence[SampleId]) -> int:
        return sum(self.costs[group][sample] for group, sample in members)

    def deal(self, tolerance: float = 0.02) -> list[list[SampleId]]:
        return deal(self.costs, self.num_ranks, images=self.images, tolerance=tolerance)

    def plan(self) -> list[list[list[SampleId]]]:
        return plan_rows(
            self.costs,
            num_ranks=self.num_ranks,
            max_tokens=self.max_tokens,
            rows_multiple=self.rows_multiple,
            images=self.images,
        )


def plan_rows(
    costs: Costs, *, num_ranks: int, max_tokens: int, rows_multiple: int, images: Sequence[int] = ()
) -> list[list[list[SampleId]]]:
    """Rank -> rows -> samples: dealt, then filled."""
    ranks = [_by_group(members, costs) for members in deal(costs, num_ranks, images=images)]
    return fill_ranks(ranks, max_tokens=max_tokens, rows_multiple=rows_multiple, images=images)


def _by_group(members: Sequence[SampleId], costs: Costs) -> list[list[tuple[SampleId, int]]]:
    """A rank's members as `fill` takes them."""
    mine = set(members)
    return [
        [((group, sample), tokens) for sample, tokens in enumerate(its) if (group, sample) in mine]
        for group, its in enumerate(costs)
    ]


@st.composite
def steps(draw: st.DrawFn) -> Step:
    """Mini-batches of no sample to some dozens, gated at random, all or none; alike lengths fill rows badly."""
    lengths = draw(st.sampled_from([st.integers(1, 400), st.integers(1, 400), st.integers(90, 110), st.just(100)]))
    gate = draw(st.sampled_from([st.booleans(), st.just(False), st.just(True)]))
    largest = draw(st.sampled_from([1, 5, 12]))
    costs = [
        [draw(lengths) * (3 if draw(gate) else 1) for _ in range(draw(st.integers(0, largest)))]
        for _ in range(draw(st.sampled_from([0, 1, 2, 5, 8])))
    ]
    costliest = max((tokens for group in costs for tokens in group), default=1)
    return Step(
        costs,
        draw(st.sampled_from([[], [draw(st.integers(0, 3)) for _ in costs]])),
        num_ranks=draw(st.sampled_from([1, 1, 1, 2, 3, 4, 8, 40])),
        max_tokens=math.ceil(costliest * draw(st.sampled_from([1.0, 1.3, 1.9, 2.7, 8.0, 100.0]))),
        rows_multiple=draw(st.sampled_from([1, 1, 1, 2, 3, 4])),
    )


@checked
@given(steps())
def test_every_sample_goes_to_one_row_and_no_row_is_too_long(step: Step) -> None:
    rows = [row for rank in step.plan() for row in rank]
    assert Counter(member for row in rows for member in row) == Counter(step.samples)
    assert all(step.load(row) <= step.max_tokens for row in rows)


@checked
@given(steps())
def test_ranks_get_the_same_number_of_rows_a_multiple_of_what_the_schedule_takes(step: Step) -> None:
    planned = step.plan()
    assert len(planned) == step.num_ranks
    (count,) = {len(rank) for rank in planned}
    assert count >= 1
    assert count % step.rows_multiple == 0


@checked
@given(steps())
def test_no_smaller_number_of_rows_does(step: Step) -> None:
    """Below 100 times what the schedule takes; beyond, the search goes on by 1 %."""
    count = len(step.plan()[0])
    smaller = count - step.rows_multiple
    if smaller:
        filled = [
            fill(_by_group(members, step.costs), step.max_tokens, smaller, step.images) for members in step.deal()
        ]
        assert None in filled


@checked
@given(steps())
def test_the_plan_runs_what_was_dealt_fullest_row_first(step: Step) -> None:
    for members, rows in zip(step.deal(), step.plan(), strict=True):
        assert sorted(member for row in rows for member in row) == members
        loads = [step.load(row) for row in rows]
        assert loads == sorted(loads, reverse=True)
        assert all(row == sorted(row) for row in rows)


@checked
@given(steps())
def test_a_row_is_empty_only_where_its_rank_has_fewer_samples_than_rows(step: Step) -> None:
    for rank in step.plan():
        assert sum(not row for row in rank) == max(0, len(rank) - sum(map(len, rank)))


@checked
@given(steps())
def test_a_plan_depends_on_its_inputs_alone(step: Step) -> None:
    assert step.plan() == step.plan()


@checked
@given(steps(), st.sampled_from([0.0, 0.02, 0.5]))
def test_samples_are_dealt_once_and_about_evenly(step: Step, tolerance: float) -> None:
    dealt = step.deal(tolerance)
    assert len(dealt) == step.num_ranks
    assert Counter(member for members in dealt for member in members) == Counter(step.samples)
    assert sum(not members for members in dealt) == max(0, step.num_ranks - len(step.samples))
    # Dealt longest first, the rank that ends up fullest was the emptiest, so below the mean, before its last sample.
    mean = step.load(step.samples) / step.num_ranks
    assert max(map(step.load, dealt)) <= (1 + tolerance) * mean + step.costliest


@checked
@given(st.lists(st.integers(1, 400), min_size=1, max_size=12), st.integers(1, 4), st.sampled_from([1, 2, 8]))
def test_no_group_is_cut_where_whole_ones_are_even(group: list[int], groups_per_rank: int, num_ranks: int) -> None:
    dealt = deal([group] * groups_per_rank * num_ranks, num_ranks)
    assert all(len(members) == groups_per_rank * len(group) for members in dealt)
    assert [len({group for group, _ in members}) for members in dealt] == [groups_per_rank] * num_ranks


@checked
@given(steps(), st.integers(1, 60))
def test_a_rank_is_filled_within_its_rows_or_not_at_all(step: Step, num_rows: int) -> None:
    rows = fill(_by_group(step.samples, step.costs), step.max_tokens, num_rows)
    if rows is None:
        assert num_rows < len(step.samples), "a row for each sample is always enough"
        return
    assert len(rows) == num_rows
    assert sorted(member for row in rows for member in row) == step.samples
    assert all(step.load(row) <= step.max_tokens for row in rows)


def test_an_empty_mini_batch_is_empty_rows() -> None:
    for costs in ([], [[], []]):
        assert plan_rows(costs, num_ranks=3, max_tokens=10, rows_multiple=2) == [[[], []]] * 3


def test_a_sample_longer_than_a_row_is_refused() -> None:
    with pytest.raises(AssertionError, match="longer than 10"):
        plan_rows([[3, 11]], num_ranks=1, max_tokens=10, rows_multiple=1)


@pytest.mark.parametrize("cheapest", [0, 1, 2])
@pytest.mark.parametrize("images", [0, 2])
def test_the_group_whose_images_cost_least_is_cut(cheapest: int, images: int) -> None:
    costs = [[10, 10, 10, 10]] * 3
    dealt = deal(costs, 2, images=[images if group == cheapest else 3 for group in range(3)])
    assert [tokens_of(members, costs) for members in dealt] == [60, 60]
    assert {group for group, _ in dealt[0]} & {group for group, _ in dealt[1]} == {cheapest}


def test_rows_that_only_a_tight_packing_holds_are_found() -> None:
    """Evenly filled, the small samples would leave no room for the long ones."""
    rows = fill([[(f"long {i}", 60) for i in range(3)], [(f"short {i}", 20) for i in range(6)]], 100, 3)
    assert rows is not None
    assert [sorted(name.split()[0] for name in row) for row in rows] == [["long", "short", "short"]] * 3


def test_the_drawn_steps_cover_what_matters() -> None:
    seen: Counter[str] = Counter()

    # More than are checked: what is drawn depends on the constants of all modules that are imported by then.
    @settings(checked, max_examples=1000)
    @given(steps())
    def look(step: Step) -> None:
        planned = step.plan()
        fewest = max(1, math.ceil(step.load(step.samples) / step.num_ranks / step.max_tokens))
        pieces = sum(len({group for group, _ in members}) for members in step.deal())
        groups = sum(map(bool, step.costs))
        seen["no samples"] += not step.samples
        seen["more ranks than samples"] += 0 < len(step.samples) < step.num_ranks
        seen["several rows on a rank"] += len(planned[0]) > 1
        seen["several samples in a row"] += any(len(row) > 1 for rank in planned for row in rank)
        seen["a group on several ranks"] += pieces > groups
        seen["several groups, all whole, on several ranks"] += step.num_ranks > 1 and pieces == groups > 1
        seen["more rows than the tokens need"] += (
            len(planned[0]) > math.ceil(fewest / step.rows_multiple) * step.rows_multiple
        )

    look()
    assert len(seen) == 7
    assert min(seen.values()) >= 8, seen


def realistic(seed: int, gated: float, num_prompts: int = 64, samples_per_prompt: int = 5) -> list[list[int]]:
    """Costs of a step: prompts of 200 to 512 tokens, log-normal responses, `gated` of the samples in three segments."""
    rng = random.Random(seed)
    costs = []
    for _ in range(num_prompts):
        prompt, group = rng.randint(200, 512), []
        for _ in range(samples_per_prompt):
            response = min(4096, max(1, round(rng.lognormvariate(math.log(350), 0.6))))
            group.append((prompt + response - 1) * (3 if rng.random() < gated else 1))
        costs.append(group)
    return costs


def tokens_of(members: Sequence[SampleId], costs: Sequence[Sequence[int]]) -> int:
    return sum(costs[group][sample] for group, sample in members)


@pytest.mark.parametrize("gated", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize(("num_ranks", "bar"), [(8, 0.05), (32, 0.10)])
def test_realistic_steps_are_even_and_their_groups_mostly_whole(gated: float, num_ranks: int, bar: float) -> None:
    """64 prompts of 5 samples, rows of 16384 tokens; the fewest pairs of a row and a group in it would be 64."""
    imbalances, pairs = [], []
    for seed in range(8):
        costs = realistic(seed, gated)
        planned = plan_rows(costs, num_ranks=num_ranks, max_tokens=16384, rows_multiple=1)
        loads = [sum(tokens_of(row, costs) for row in rank) for rank in planned]
        mean = sum(loads) / num_ranks
        imbalances.append(max(loads) / mean - 1)
        bound = max(map(max, costs)) / mean - 1
        assert imbalances[-1] <= max(bar, bound), f"seed {seed}: {imbalances[-1]:.3f}, at least {bound:.3f}"
        pairs.append(sum(len({group for group, _ in row}) for rank in planned for row in rank))
        assert pairs[-1] <= 110, f"seed {seed}: {pairs[-1]} pairs of a row and a group"
    print(
        f"DP {num_ranks:2}, {gated:.0%} gated: imbalance at most {max(imbalances):.1%}, bar {bar:.0%}; "
        f"{min(pairs)}-{max(pairs)} pairs of a row and a prompt in it, at least 64"
    )


def test_a_rank_s_rows_are_about_equally_full() -> None:
    for seed in range(8):
        costs = realistic(seed, gated=0.3)
        for rank in plan_rows(costs, num_ranks=8, max_tokens=16384, rows_multiple=4):
            loads = [tokens_of(row, costs) for row in rank]
            assert max(loads) * len(loads) / sum(loads) <= 1.1, f"seed {seed}: rows of {loads} tokens"


def test_large_groups_are_even_on_many_ranks() -> None:
    """Four samples a rank: where cutting groups does not get there, samples are dealt one by one."""
    rng = random.Random(0)
    costs = [[rng.randint(300, 9000) for _ in range(64)] for _ in range(16)]
    loads = [tokens_of(members, costs) for members in deal(costs, 256)]
    assert max(loads) * len(loads) / sum(loads) <= 1.05


def test_large_steps_are_dealt_within_seconds() -> None:
    """In processor time, which other processes on the machine lengthen little: some 50 times what it takes."""
    costs = realistic(0, gated=0.3, num_prompts=512, samples_per_prompt=10)
    start = time.process_time()
    deal(costs, 64)
    assert time.process_time() - start < 2
