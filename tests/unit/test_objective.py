"""The objectives on real packed rows and a real head, in float64: what must hold whatever the numbers are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_cppo.algo.objective import OBJECTIVES
from megatron_cppo.algo.perception import mask_margin
from megatron_cppo.config import AlgorithmConfig, PerceptionConfig
from tests.unit import objective_case
from tests.unit.objective_case import (
    GATED,
    SAMPLES,
    Gradients,
    Problem,
    RowResult,
    dense_cpl,
    dense_mask,
    dense_policy,
    gradients_of,
    log_probs,
)

SPLITS: dict[str, list[list[int]]] = {
    "one row": [[0, 1, 2, 3, 4, 5, 6, 7]],
    "one row each": [[i] for i in range(8)],
    "reversed": [[7, 6, 5], [4, 3, 2, 1, 0]],
    "with fillers": [[3, 0], [-1], [5, 2, 6, 7], [-1], [1, 4]],
}
ON_POLICY = AlgorithmConfig(beta=0.0)
EVERYTHING = AlgorithmConfig(beta=0.2, entropy_coefficient=0.05, clip_high=0.3, dual_clip=1.5)
# A tau at which no softplus is flat.
CPL = PerceptionConfig(coefficient=0.5, temperature=0.5)


def run(
    split: Sequence[Sequence[int]],
    *,
    objective: str = "cppo",
    algorithm: AlgorithmConfig = ON_POLICY,
    perception: PerceptionConfig = CPL,
    scored: bool = False,
    problem: Problem | None = None,
) -> tuple[Tensor, Gradients, list[RowResult]]:
    return objective_case.run(
        problem or Problem(), split, objective=objective, algorithm=algorithm, perception=perception, scored=scored
    )


def assert_same(found: Gradients, expected: Gradients, tolerance: float) -> None:
    for name, gradient in expected.items():
        error = (found[name] - gradient).abs().max().item()
        assert error <= tolerance * max(1.0, gradient.abs().max().item()), f"gradient of {name}: {error}"


def test_no_mask_hangs_on_rounding() -> None:
    """And the problem has what the other tests need: gated samples with some tokens masked, and some not."""
    problem = Problem()
    statistics = [(log_probs(problem, i, "original")[1], log_probs(problem, i, "removing")[1]) for i in GATED]
    original, removing = (torch.cat(column).detach() for column in zip(*statistics, strict=True))
    owner = torch.tensor([i for i in GATED for _ in problem.samples[i].token_ids])
    assert mask_margin(original, removing, owner) > 1e-4
    masked = [len(dense_mask(a, b)) for a, b in statistics]
    assert all(0 < count <= len(problem.samples[i].token_ids) for count, i in zip(masked, GATED, strict=True))
    assert 6 <= sum(masked) < len(owner) - 6
    assert tuple(i for i, sample in enumerate(problem.samples) if sample.gated) == GATED


@pytest.mark.parametrize("stop_gradient_views", [False, True])
@pytest.mark.parametrize("aggregation", ["sample", "global", "microbatch"])
@pytest.mark.parametrize("divergence", ["k3", "k1", "exact"])
def test_cppo_equals_the_equations(divergence: str, aggregation: str, stop_gradient_views: bool) -> None:
    perception = replace(
        CPL,
        divergence=divergence,  # pyrefly: ignore[bad-argument-type]
        aggregation=aggregation,  # pyrefly: ignore[bad-argument-type]
        stop_gradient_views=stop_gradient_views,
    )
    problem, split = Problem(), SPLITS["reversed"]
    loss, gradients, _ = run(split, algorithm=EVERYTHING, perception=perception, scored=True, problem=problem)
    expected = dense_policy(problem, EVERYTHING, scored=True) + 0.5 * dense_cpl(problem, split, perception)
    # Weights such as 1 / 43 are fp32 in the product.
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=1e-7)
    assert_same(gradients, gradients_of(expected, problem), 1e-6)


@pytest.mark.parametrize("split", SPLITS)
def test_without_a_coefficient_cppo_is_grpo(split: str) -> None:
    settings: dict[str, Any] = {"algorithm": EVERYTHING, "scored": True}
    loss, gradients, _ = run(SPLITS[split], objective="cppo", perception=replace(CPL, coefficient=0.0), **settings)
    wanted, wanted_gradients, _ = run(SPLITS[split], objective="grpo", **settings)
    torch.testing.assert_close(loss, wanted, rtol=0, atol=1e-14)
    assert_same(gradients, wanted_gradients, 1e-13)
    assert run(SPLITS[split], **settings)[0] > wanted + 0.01, "CPL is nothing here, the test proves nothing"


@pytest.mark.parametrize("advantage", [0.0, -0.4])
def test_with_nobody_gated_cppo_is_grpo(advantage: float) -> None:
    """No views, no mask, no second call of the head; the metrics of the mask are there, with a count of zero."""
    problem = Problem()
    problem.samples = [
        replace(sample, advantage=advantage) if sample.prompt.grids else sample for sample in problem.samples
    ]
    loss, gradients, results = run(SPLITS["reversed"], problem=problem)
    wanted, wanted_gradients, _ = run(SPLITS["reversed"], objective="grpo", problem=problem)
    assert loss == wanted
    assert_same(gradients, wanted_gradients, 0.0)
    for result in results:
        assert [len(rows) for rows in result.head.asked] == [result.tokens.targets_N.numel()]
        assert result.outcome.metrics["perception/masked_share"] == (0, 0)
        assert "perception/cpl" not in result.outcome.metrics
        assert result.outcome.mask_N is not None
        assert not result.outcome.mask_N.any()
        assert result.outcome.entropy_removing_N is not None
        assert result.outcome.entropy_removing_N.isnan().all()


@pytest.mark.parametrize("divergence", ["k3", "k1", "exact"])
def test_stopping_the_views_gradient_changes_nothing_else(divergence: str) -> None:
    flowing = replace(CPL, divergence=divergence)  # pyrefly: ignore[bad-argument-type]
    problem = Problem()
    loss, gradients, _ = run(SPLITS["one row"], perception=flowing, problem=problem)
    stopped = replace(flowing, stop_gradient_views=True)
    stopped_loss, stopped_gradients, _ = run(SPLITS["one row"], perception=stopped, problem=problem)
    assert torch.equal(loss, stopped_loss)
    for i in GATED:
        for view in ("preserving", "removing"):
            assert gradients[i, view].abs().max() > 0
            assert (stopped_gradients[i, view] == 0).all()
        torch.testing.assert_close(stopped_gradients[i, "original"], gradients[i, "original"], rtol=0, atol=1e-15)
    # The head's weight loses what came through the views.
    assert (stopped_gradients["weight"] - gradients["weight"]).abs().max() > 1e-3


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("aggregation", ["sample", "global"])
@pytest.mark.parametrize("divergence", ["k3", "exact"])
def test_contributions_of_rows_add_up_however_they_are_cut(divergence: str, aggregation: str, scored: bool) -> None:
    perception = replace(CPL, divergence=divergence, aggregation=aggregation)  # pyrefly: ignore[bad-argument-type]
    settings: dict[str, Any] = {"algorithm": EVERYTHING, "perception": perception, "scored": scored}
    loss, gradients, _ = run(SPLITS["one row"], **settings)
    assert max(gradient.abs().max() for gradient in gradients.values()) > 1e-2
    for name, split in SPLITS.items():
        other_loss, other_gradients, _ = run(split, **settings)
        torch.testing.assert_close(other_loss, loss, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
        assert_same(other_gradients, gradients, 1e-10)


@pytest.mark.parametrize("aggregation", ["token_mean", "sample_mean", "sum_over_length"])
@pytest.mark.parametrize("objective", ["cppo", "grpo", "supervised"])
def test_no_policy_aggregation_depends_on_the_cut(objective: str, aggregation: str) -> None:
    algorithm = replace(EVERYTHING, aggregation=aggregation)  # pyrefly: ignore[bad-argument-type]
    answers = [run(split, objective=objective, algorithm=algorithm, scored=True) for split in SPLITS.values()]
    for loss, gradients, _ in answers[1:]:
        torch.testing.assert_close(loss, answers[0][0], rtol=1e-10, atol=1e-10)
        assert_same(gradients, answers[0][1], 1e-10)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_filler_contributes_exactly_nothing(objective: str) -> None:
    """Not to the loss, nor to a gradient or a metric, and nothing of it is NaN."""
    loss, gradients, (result,) = run([[-1]], objective=objective, algorithm=EVERYTHING, scored=True)
    assert loss == 0
    for name, gradient in gradients.items():
        assert (gradient == 0).all(), name
    assert result.outcome.logp_N is not None
    assert result.outcome.logp_N.isfinite().all()
    for name, (total, count) in result.outcome.metrics.items():
        assert total == 0, name
        assert count == (1 if name == "policy/loss" and objective != "supervised" else 0), name


def test_metrics_do_not_depend_on_fillers() -> None:
    sums: dict[str, dict[str, tuple[float, float]]] = {}
    for name in ("one row", "with fillers"):
        results = run(SPLITS[name], algorithm=EVERYTHING, scored=True)[2]
        metrics = sorted({metric for result in results for metric in result.outcome.metrics})
        pairs = {m: [r.outcome.metrics[m] for r in results if m in r.outcome.metrics] for m in metrics}
        sums[name] = {m: (sum(float(a) for a, _ in p), sum(float(b) for _, b in p)) for m, p in pairs.items()}
    assert sums["one row"].keys() == sums["with fillers"].keys()
    for metric, pair in sums["one row"].items():
        assert sums["with fillers"][metric] == pytest.approx(pair, rel=1e-6, abs=1e-9), metric
    assert {"policy/loss", "policy/kl", "policy/clip_high_share", "perception/cpl"} <= sums["one row"].keys()


@pytest.mark.parametrize("divergence", ["k3", "exact"])
def test_the_head_computes_only_the_rows_that_the_loss_needs(divergence: str) -> None:
    """Original rows, the removing rows of gated samples, and of the preserving view the masked tokens' only."""
    perception = replace(CPL, divergence=divergence)  # pyrefly: ignore[bad-argument-type]
    _, _, results = run(SPLITS["reversed"], perception=perception)
    for result in results:
        tokens, head, mask_N = result.tokens, result.head, result.outcome.mask_N
        assert mask_N is not None
        has_removing_N = tokens.rows_removing_N >= 0
        assert 0 < mask_N.sum() < has_removing_N.sum()
        first = [*tokens.rows_original_N.tolist(), *tokens.rows_removing_N[has_removing_N].tolist()]
        original, preserving, removing = (
            rows[mask_N].tolist() for rows in (tokens.rows_original_N, tokens.rows_preserving_N, tokens.rows_removing_N)
        )
        if divergence == "exact":
            assert head.asked == [first]
            assert head.divergences_asked == [[original, preserving, removing]]
        else:
            assert head.asked == [first, preserving]
            assert head.divergences_asked == []
        assert min(row for rows in head.asked for row in rows) >= 0


@pytest.mark.parametrize("objective", ["grpo", "supervised"])
def test_objectives_without_views_ask_for_original_rows_only(objective: str) -> None:
    _, gradients, results = run(SPLITS["reversed"], objective=objective)
    for result in results:
        assert result.head.asked == [result.tokens.rows_original_N.tolist()]
        assert (result.outcome.mask_N, result.outcome.entropy_removing_N) == (None, None)
    assert all((gradients[i, view] == 0).all() for i in GATED for view in ("preserving", "removing"))


def test_supervised_is_the_mean_negative_log_likelihood() -> None:
    problem = Problem()
    loss, _, _ = run(SPLITS["with fillers"], objective="supervised", problem=problem)
    logp = torch.cat([log_probs(problem, i, "original")[0] for i in range(len(SAMPLES))])
    torch.testing.assert_close(loss, -logp.mean().detach(), rtol=1e-12, atol=0)


def test_outcomes_keep_the_tokens_statistics_for_the_log() -> None:
    """In the order of the row's tokens; the removing view's entropy is NaN where there is no such view."""
    problem = Problem()
    for members, result in zip(SPLITS["reversed"], run(SPLITS["reversed"], problem=problem)[2], strict=True):
        outcome = result.outcome
        assert outcome.logp_N is not None
        assert outcome.entropy_N is not None
        assert outcome.entropy_removing_N is not None
        assert outcome.mask_N is not None
        for place, i in enumerate(members):
            mine = result.tokens.sample_N == place
            logp, entropy, _ = log_probs(problem, i, "original")
            torch.testing.assert_close(outcome.logp_N[mine], logp.detach(), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(outcome.entropy_N[mine], entropy.detach(), rtol=1e-12, atol=1e-12)
            if i not in GATED:
                assert outcome.entropy_removing_N[mine].isnan().all()
                assert not outcome.mask_N[mine].any()
                continue
            removing = log_probs(problem, i, "removing")[1]
            torch.testing.assert_close(outcome.entropy_removing_N[mine], removing.detach(), rtol=1e-12, atol=1e-12)
            assert torch.nonzero(outcome.mask_N[mine])[:, 0].tolist() == dense_mask(entropy, removing)
