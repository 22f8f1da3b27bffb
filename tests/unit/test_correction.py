"""The correction for the engine's gap: weights against Python floats, the objective against loops in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_cppo.algo.correction import CORRECTIONS, correction_weights, engine_kl
from megatron_cppo.algo.objective import Outcome
from megatron_cppo.config import AlgorithmConfig
from megatron_cppo.data.packing import Member, pack
from megatron_cppo.plan import Packing
from megatron_cppo.policy.nonfinite import _row_finding
from megatron_cppo.policy.step import response_tokens
from megatron_cppo.types import Batch
from tests.unit.objective_case import (
    SAMPLES,
    Gradients,
    Problem,
    dense_correction,
    dense_cpl,
    dense_policy,
    gradients_of,
    make_samples,
)
from tests.unit.test_objective import CPL, EVERYTHING, SPLITS, assert_same, run

LENGTHS = (4, 1, 3, 2, 2, 1)
GAPS = (0.1, -0.2, 0.3, 0.05, 3.0, -0.3, -0.6, -0.4, 45.0, -44.9, 30.0, 0.5, -50.0)
"""Log ratios, so that each level and cut has tokens that are left, too heavy and too light, and some are clamped."""
METRICS = ("policy/correction_weight", "policy/correction_hit_share", "policy/engine_kl")


def corrected(kind: str, base: AlgorithmConfig = EVERYTHING, bound: float = 1.6) -> AlgorithmConfig:
    return replace(base, correction=kind, correction_bound=bound)  # pyrefly: ignore[bad-argument-type]


def expected_weights(kind: str, bound: float) -> tuple[list[float], list[bool]]:
    """The weights of `GAPS`, and which were cut, token by token."""
    weights, cut, start = [], [], 0
    for length in LENGTHS:
        sample = GAPS[start : start + length]
        for gap in sample:
            exponent = math.fsum(sample) if kind.startswith("sequence") else gap
            weight = math.exp(max(-20.0, min(20.0, exponent)))
            heavy, light = weight > bound, weight < 1 / bound
            masks = kind.endswith("mask")
            cut.append(heavy or (masks and light))
            weights.append((0.0 if masks else bound) if cut[-1] else weight)
        start += length
    return weights, cut


@pytest.mark.parametrize("bound", [1.3, 2.0, 1e9])
@pytest.mark.parametrize("kind", CORRECTIONS)
def test_weights_are_those_of_the_published_formulas(kind: str, bound: float) -> None:
    wanted, cut = expected_weights(kind, bound)
    assert len(set(cut)) == 2 or bound == 1e9, "nothing is cut, or everything; the test proves too little"
    old_N = torch.full((len(GAPS),), -1.5, dtype=torch.float64)
    behaviour_N = old_N - torch.tensor(GAPS, dtype=torch.float64)
    sample_N = torch.repeat_interleave(torch.tensor([0, 1, 2, 5, 7, 8]), torch.tensor(LENGTHS))
    weight_N, cut_N = correction_weights(old_N, behaviour_N, sample_N, kind=kind, bound=bound)
    torch.testing.assert_close(weight_N, torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=1e-15)
    assert cut_N.tolist() == cut
    # The same tokens in another order of samples.
    order = torch.argsort(-sample_N, stable=True)
    again_N, _ = correction_weights(old_N[order], behaviour_N[order], sample_N[order], kind=kind, bound=bound)
    torch.testing.assert_close(again_N, weight_N[order], rtol=1e-12, atol=0)


def test_sums_of_long_answers_are_exact_in_fp32() -> None:
    """Thousands of tokens whose gaps nearly cancel."""
    gap_N = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * 3
    gap_N -= gap_N.mean()
    assert abs(math.fsum(gap_N.tolist())) < 5
    weight_N, _ = correction_weights(
        gap_N, torch.zeros_like(gap_N), torch.zeros(len(gap_N), dtype=torch.int64), kind="sequence_truncate", bound=1e9
    )
    wanted = math.exp(math.fsum(gap_N.tolist()))
    assert weight_N.dtype == torch.float32
    assert weight_N.tolist() == pytest.approx([wanted] * len(gap_N), rel=1e-6)


def test_nan_is_never_masked() -> None:
    """An engine that says NaN must make the loss NaN, so that the update is skipped and the row named."""
    old_N, behaviour_N = torch.zeros(4), torch.tensor([0.0, torch.nan, 0.0, 0.1])
    sample_N = torch.tensor([0, 0, 1, 1])
    for kind in CORRECTIONS:
        weight_N, _ = correction_weights(old_N, behaviour_N, sample_N, kind=kind, bound=2.0)
        assert weight_N.isnan().tolist() == [kind.startswith("sequence"), True, False, False], kind


def test_no_gradient_flows_through_the_weight() -> None:
    old_N, behaviour_N = (torch.randn(4, requires_grad=True) for _ in range(2))
    for kind in CORRECTIONS:
        found = correction_weights(old_N, behaviour_N, torch.tensor([0, 0, 1, 1]), kind=kind, bound=2.0)
        assert not any(tensor.requires_grad for tensor in found)
    assert not engine_kl(old_N, behaviour_N).requires_grad


def test_impossible_corrections_are_named() -> None:
    nothing = torch.zeros(1)
    with pytest.raises(ValueError, match="unknown correction 'auto'; choose one of token_truncate, token_mask, seq"):
        correction_weights(nothing, nothing, nothing, kind="auto", bound=2.0)
    for bound in (1.0, math.nan):
        with pytest.raises(ValueError, match=f"bound of a correction must be > 1, got {bound}; 2.0 is usual"):
            correction_weights(nothing, nothing, nothing, kind="token_mask", bound=bound)


def test_the_kl_is_the_engines_to_the_policy() -> None:
    """In expectation over the engine's tokens, exactly."""
    engine, policy = torch.randn(2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).log_softmax(-1)
    estimate = (engine.exp() * engine_kl(policy, engine)).sum()
    torch.testing.assert_close(estimate, (engine.exp() * (engine - policy)).sum())
    assert (estimate - (policy.exp() * (policy - engine)).sum()).abs() > 1e-2


def mean(results: list[Any], metric: str) -> float:
    pairs = [result.outcome.metrics[metric] for result in results]
    return sum(float(a) for a, _ in pairs) / sum(float(b) for _, b in pairs)


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("kind", CORRECTIONS)
def test_the_corrected_objective_equals_the_equations(kind: str, scored: bool) -> None:
    """Loss, gradients and metrics, with every other term on: the weight multiplies the policy's loss alone."""
    algorithm, problem, split = corrected(kind), Problem(), SPLITS["with fillers"]
    loss, gradients, results = run(split, algorithm=algorithm, perception=CPL, scored=scored, problem=problem)
    expected = dense_policy(problem, algorithm, scored) + 0.5 * dense_cpl(problem, split, CPL)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=1e-7)
    assert_same(gradients, gradients_of(expected, problem), 1e-6)
    uncorrected = dense_policy(problem, EVERYTHING, scored) + 0.5 * dense_cpl(problem, split, CPL)
    assert (uncorrected - expected).abs() > 0.01, "the correction is nothing here, the test proves nothing"

    weights = [weight for i in range(len(SAMPLES)) for weight in dense_correction(problem, i, algorithm, scored)]
    whole = [
        w
        for i in range(len(SAMPLES))
        for w in dense_correction(problem, i, replace(algorithm, correction_bound=1e9), scored)
    ]
    cut = [a != b for a, b in zip(weights, whole, strict=True)]
    assert 0 < sum(cut) < len(cut)
    assert mean(results, METRICS[0]) == pytest.approx(sum(weights) / len(weights), rel=1e-6)
    assert mean(results, METRICS[1]) == pytest.approx(sum(cut) / len(cut), rel=1e-6)


def test_the_kl_that_is_logged() -> None:
    problem = Problem()
    gaps = [
        a - b
        for old, behaviour in zip(problem.old_logp, problem.behaviour_logp, strict=True)
        for a, b in zip(old.tolist(), behaviour.tolist(), strict=True)
    ]
    wanted = sum(math.exp(gap) - gap - 1 for gap in gaps) / len(gaps)
    for split in SPLITS.values():
        results = run(split, algorithm=corrected("token_mask"), scored=True, problem=problem)[2]
        assert mean(results, METRICS[2]) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("objective", ["cppo", "grpo"])
@pytest.mark.parametrize("kind", CORRECTIONS)
def test_no_correction_depends_on_the_cut(kind: str, objective: str) -> None:
    settings: dict[str, Any] = {"objective": objective, "algorithm": corrected(kind), "scored": True}
    loss, gradients, whole = run(SPLITS["one row"], **settings)
    for split in SPLITS.values():
        other_loss, other_gradients, results = run(split, **settings)
        torch.testing.assert_close(other_loss, loss, rtol=1e-10, atol=1e-10)
        assert_same(other_gradients, gradients, 1e-10)
        for metric in METRICS:
            assert mean(results, metric) == pytest.approx(mean(whole, metric), rel=1e-6), metric


def bits(gradients: Gradients) -> dict[Any, list[float]]:
    return {name: gradient.flatten().tolist() for name, gradient in gradients.items()}


@pytest.mark.parametrize("kind", CORRECTIONS)
def test_without_a_gap_nothing_is_corrected_to_the_bit(kind: str) -> None:
    problem = Problem()
    problem.behaviour_logp = problem.old_logp
    wanted, wanted_gradients, plain = run(SPLITS["with fillers"], algorithm=EVERYTHING, scored=True, problem=problem)
    found, gradients, results = run(SPLITS["with fillers"], algorithm=corrected(kind), scored=True, problem=problem)
    assert found.item() == wanted.item()
    assert bits(gradients) == bits(wanted_gradients)
    assert [mean(results, metric) for metric in METRICS] == [1.0, 0.0, 0.0]
    assert not any(metric in result.outcome.metrics for result in plain for metric in METRICS)


@pytest.mark.parametrize("kind", CORRECTIONS)
def test_samples_without_the_engines_log_probs_weigh_one(kind: str) -> None:
    """Beside others that have them; of the gap they say nothing."""
    problem, absent = Problem(), (1, 4)
    full_like = {i: torch.full_like(problem.old_logp[i], torch.inf) for i in absent}
    problem.behaviour_logp = [full_like.get(i, logp) for i, logp in enumerate(problem.behaviour_logp)]
    loss, gradients, results = run(SPLITS["reversed"], algorithm=corrected(kind), scored=True, problem=problem)
    same = Problem()
    same.behaviour_logp = [same.old_logp[i] if i in absent else logp for i, logp in enumerate(same.behaviour_logp)]
    wanted, wanted_gradients, others = run(SPLITS["reversed"], algorithm=corrected(kind), scored=True, problem=same)
    assert loss.item() == wanted.item()
    assert bits(gradients) == bits(wanted_gradients)
    tokens = sum(length for _, length, _ in SAMPLES)
    known = tokens - sum(SAMPLES[i][1] for i in absent)
    assert mean(results, METRICS[2]) == pytest.approx(mean(others, METRICS[2]) * tokens / known, rel=1e-6)


def test_tokens_get_the_engines_log_probs_of_their_own_samples() -> None:
    samples = [
        replace(sample, logp=tuple(-0.25 * (i + 1) - 0.5 * t for t in range(len(sample.token_ids))))
        for i, sample in enumerate(make_samples())
    ]
    samples[2] = replace(samples[2], logp=())
    order = (3, -1, 2, 0)
    row = pack([Member(i, samples[i], ("original",)) for i in order], Packing())
    batch, cpu = Batch(tuple(samples), None, ()), torch.device("cpu")
    behaviour_N = response_tokens(row, batch, cpu, corrected=True).behaviour_logp_N
    filler = (math.inf,) * len(samples[-1].token_ids)
    assert behaviour_N is not None
    assert behaviour_N.tolist() == [*samples[3].logp, *filler, math.inf, *samples[0].logp]
    assert response_tokens(row, batch, cpu).behaviour_logp_N is None


def test_a_replay_names_an_engine_that_said_nan() -> None:
    """Only where its log-probs are in the loss."""
    sample = make_samples()[3]
    sample = replace(sample, logp=(math.nan, *(-1.0,) * (len(sample.token_ids) - 1)))
    row = pack([Member(0, sample, ("original",))], Packing())
    some_N = torch.zeros(len(sample.token_ids))
    outcome = Outcome(torch.tensor(math.nan), logp_N=some_N, entropy_N=some_N)
    batch = Batch((sample,), None, ())
    assert _row_finding(0, 0, row, outcome, batch, True).num_not_finite == {"given engine log-probs": 1}
    assert _row_finding(0, 0, row, outcome, batch, False).num_not_finite == {}
