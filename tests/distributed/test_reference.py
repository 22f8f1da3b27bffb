"""The frozen reference: the same scores from either place, no trace in the policy, no trace of updates in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_cppo.algo.objective import OBJECTIVES
from megatron_cppo.data.packing import build_batch
from tests.distributed import tiny_model
from tests.distributed.launch import run_distributed
from tests.distributed.layouts import LAYOUTS, VOCAB, WORLD, checkpoint

PLACES = ("device", "host")
CHECKED = ("TP1", "TP2+SP", "DP2 distributed optimizer", "PP2")
VARIANTS: dict[str, dict[str, Any]] = {"untied": {}, "tied": {"tied": True}}


@dataclass(frozen=True)
class Case:
    """A layout, where the reference lives, and fields beyond the layout's."""

    folder: str
    layout: str
    place: str
    fields: dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """What one rank saw: scores, and weights at four moments."""

    holds_reference: bool
    old: list[Tensor]
    scores_at_start: list[Tensor] | None
    metrics_of_updates: list[dict[str, float]]
    scores_after: list[Tensor] | None
    policy_scores_after: list[Tensor]
    loaded: dict[str, Tensor]
    after_first_scoring: dict[str, Tensor]
    after_updates: dict[str, Tensor]
    after_second_scoring: dict[str, Tensor]
    reference_at_end: dict[str, Tensor] | None
    storage_is_shared: bool
    parameters_in_buffer: bool


def run_cases(rank: int, world_size: int, cases: dict[Any, Case]) -> dict[Any, Answer]:
    return {name: run_case(case, world_size) for name, case in cases.items()}


def run_case(case: Case, world_size: int) -> Answer:
    from megatron_cppo.policy import groups as process_groups
    from megatron_cppo.policy.policy import Policy

    fields = {
        "policy__reference": case.place,
        "algorithm__beta": 0.1,
        "optimizer__learning_rate": 3e-3,
        "optimizer__weight_decay": 0.1,
        **LAYOUTS[case.layout],
        **case.fields,
    }
    config = tiny_model.make_config(case.folder, world_size, **fields)
    plan = tiny_model.make_plan(config)
    policy = Policy(config, plan, pixels=tiny_model.pixels, banned_ids=tiny_model.BANNED)
    pointers = [parameter.data_ptr() for parameter in policy.trained.parameters()]
    batch = build_batch(
        tiny_model.make_groups(4, 3, vocab_size=VOCAB),
        views_for=OBJECTIVES[config.algorithm.objective].views_for,
        num_updates=1,
        packing=plan.packing,
        score=True,
    )
    loaded = copies(policy.weights())
    scored = policy.score(batch, old=True, reference=True)
    after_first_scoring = copies(policy.weights())
    metrics = [policy.update(scored) for _ in range(2)]
    after_updates = copies(policy.weights())
    again = policy.score(batch, old=True, reference=True)
    after_second_scoring = copies(policy.weights())
    reference = policy._reference
    reference_at_end = None
    storage_is_shared = False
    if reference is not None:
        mine = {parameter.data_ptr() for parameter in policy.trained.parameters()}
        storage_is_shared = any(tensor.data_ptr() in mine for weights in reference._weights for tensor in weights)
        with reference.active():
            reference_at_end = copies(policy.weights())
    answer = Answer(
        holds_reference=reference is not None,
        old=list(scored.old_logp or ()),
        scores_at_start=None if scored.reference_logp is None else list(scored.reference_logp),
        metrics_of_updates=metrics,
        scores_after=None if again.reference_logp is None else list(again.reference_logp),
        policy_scores_after=list(again.old_logp or ()),
        loaded=loaded,
        after_first_scoring=after_first_scoring,
        after_updates=after_updates,
        after_second_scoring=after_second_scoring,
        reference_at_end=reference_at_end,
        storage_is_shared=storage_is_shared,
        parameters_in_buffer=pointers == [p.data_ptr() for p in policy.trained.parameters()],
    )
    process_groups.destroy()
    return answer


def copies(stream: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in stream}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, list[Answer]]:
    folders = {variant: checkpoint(tmp_path_factory.mktemp("hf"), **fields) for variant, fields in VARIANTS.items()}
    cases: dict[int, dict[Any, Case]] = {1: {}, 2: {}}
    for layout in CHECKED:
        for place in PLACES:
            for variant, folder in folders.items():
                cases[WORLD[layout]][layout, place, variant] = Case(folder, layout, place, {})
        cases[WORLD[layout]][layout, "none"] = Case(folders["untied"], layout, "device", {"algorithm__beta": 0.0})
        grpo = {"algorithm__objective": "grpo"}
        cases[WORLD[layout]][layout, "same rows"] = Case(folders["untied"], layout, "device", grpo)
    found: dict[Any, list[Answer]] = {}
    for world, chosen in cases.items():
        results = run_distributed(run_cases, world, chosen, timeout_seconds=300)
        found |= {name: [result[name] for result in results] for name in chosen}
    return found


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    assert found.keys() == wanted.keys()
    return all(torch.equal(found[name], wanted[name]) for name in wanted)


def equal_scores(found: list[Tensor] | None, wanted: list[Tensor] | None) -> bool:
    assert found
    assert wanted
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("layout", CHECKED)
class TestReference:
    def test_kl_is_exactly_zero_at_the_start(self, layout: str, place: str, variant: str, answers: Any) -> None:
        for answer in answers[layout, place, variant]:
            assert equal_scores(answer.scores_at_start, answer.old)
            # The update packs three views of a sample into a row, and rounds otherwise than the scoring pass.
            assert 0 <= answer.metrics_of_updates[0]["policy/kl"] <= 1e-10
            assert answer.metrics_of_updates[1]["policy/kl"] > 1e-4

    def test_scoring_leaves_the_policy_as_it_was(self, layout: str, place: str, variant: str, answers: Any) -> None:
        for answer in answers[layout, place, variant]:
            assert same(answer.after_first_scoring, answer.loaded)
            assert same(answer.after_second_scoring, answer.after_updates)
            assert answer.parameters_in_buffer, "a parameter left the gradient reduction's buffer"
            assert not answer.storage_is_shared

    def test_updates_leave_the_reference_as_it_was(self, layout: str, place: str, variant: str, answers: Any) -> None:
        for answer in answers[layout, place, variant]:
            moved = [name for name, w in answer.loaded.items() if not torch.equal(w, answer.after_updates[name])]
            assert len(moved) > 0.9 * len(answer.loaded)
            assert same(answer.reference_at_end, answer.loaded)
            assert equal_scores(answer.scores_after, answer.scores_at_start)
            assert not equal_scores(answer.policy_scores_after, answer.old)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", CHECKED)
def test_both_places_give_the_same_training(layout: str, variant: str, answers: Any) -> None:
    for device, host in zip(answers[layout, "device", variant], answers[layout, "host", variant], strict=True):
        assert equal_scores(host.scores_at_start, device.scores_at_start)
        assert equal_scores(host.scores_after, device.scores_after)
        assert host.metrics_of_updates == device.metrics_of_updates
        assert same(host.after_updates, device.after_updates)


@pytest.mark.parametrize("layout", CHECKED)
def test_kl_of_rows_that_are_packed_alike_is_zero(layout: str, answers: Any) -> None:
    for answer in answers[layout, "same rows"]:
        assert answer.metrics_of_updates[0]["policy/kl"] == 0.0
        assert answer.metrics_of_updates[1]["policy/kl"] > 1e-4


@pytest.mark.parametrize("layout", CHECKED)
def test_without_beta_nothing_is_held(layout: str, answers: Any) -> None:
    for answer in answers[layout, "none"]:
        assert not answer.holds_reference
        assert answer.scores_at_start is None
        assert "policy/kl" not in answer.metrics_of_updates[0]
