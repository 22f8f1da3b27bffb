"""The truth check: each threshold from both sides, NaN, which tokens count, and what a failure says."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from megatron_cppo.selfcheck import (
    MAX_KL,
    MAX_LOG_RATIO,
    MAX_LOGP_GAP,
    SelfCheckError,
    check_engine,
    check_first_step,
    engine_gap,
)
from megatron_cppo.types import Batch, ImageGrid, Prompt, Sample, SampleStatistics

PROMPT = Prompt("train", 0, 0, "", "", "", (1,), ((0,), (0,), (0,)), 1, (), ())
LOGP = (-0.5, -2.0, -0.25)
NUM_SAMPLES = 4


def check(
    *,
    ratios: Sequence[float] = (0.0, 0.0, 0.0),
    reference: Sequence[float] | None = None,
    engine: Sequence[float] = (0.0, 0.0, 0.0),
    max_logp_gap: float = 0.1,
    precision: str = "fp32",
    at_sample: int = 1,
    first_update_samples: int = NUM_SAMPLES,
) -> None:
    """Check samples of which one differs from the scoring pass: in the update by `ratios`, in the engine by `engine`.

    The reference's scores differ by `reference`.
    """
    sampled = tuple(a + b for a, b in zip(LOGP, engine, strict=True))
    samples = tuple(
        Sample(PROMPT, i, (3, 4, 5), sampled if i == at_sample else LOGP, "", False, 0) for i in range(NUM_SAMPLES)
    )
    old = [torch.tensor(LOGP, dtype=torch.float64) for _ in samples]
    references = [values.clone() for values in old]
    if reference is not None:
        references[at_sample] -= torch.tensor(reference, dtype=torch.float64)
    statistics = [
        SampleStatistics(
            sample_id=i,
            logp=tuple(a + b for a, b in zip(LOGP, ratios, strict=True)) if i == at_sample else LOGP,
            entropy=(1.0, 1.0, 1.0),
            entropy_removing=None,
            mask=None,
        )
        for i in range(NUM_SAMPLES)
    ]
    check_first_step(
        Batch(samples, None, (), tuple(old), tuple(references) if reference is not None else None),
        statistics,
        precision=precision,
        max_logp_gap=max_logp_gap,
        first_update_samples=first_update_samples,
    )


def failure(**options: Any) -> list[str]:
    """The lines of problems that `check` raises."""
    with pytest.raises(SelfCheckError, match="the first step's self-check failed:") as caught:
        check(**options)
    return str(caught.value).splitlines()[1:]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_equal_log_probs_pass_and_a_log_ratio_does_not(precision: str) -> None:
    limit = MAX_LOG_RATIO[precision]
    check(ratios=(0.99 * limit, -0.99 * limit, 0.0), precision=precision)
    for sign in (1, -1):
        (line,) = failure(ratios=(0.0, 0.0, sign * 1.01 * limit), precision=precision)
        assert f"|log ratio| is {1.01 * limit:.2e}, not <= {limit:.0e}" in line
        assert "attention" in line


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_reference_must_be_the_policy(precision: str) -> None:
    limit = math.sqrt(2 * MAX_KL[precision])
    check(reference=(0.0, 0.99 * limit, -0.99 * limit), precision=precision)
    for sign in (1, -1):
        (line,) = failure(reference=(sign * 1.01 * limit, 0.0, 0.0), precision=precision)
        assert f"KL to the reference is about {(1.01 * limit) ** 2 / 2:.2e} before any update" in line
        assert "wrong reference weights" in line


def test_the_engine_must_agree_with_the_scoring_pass_on_average() -> None:
    num_tokens = NUM_SAMPLES * len(LOGP)
    for sign in (1, -1):
        check(engine=(sign * 0.0999 * num_tokens, 0.0, 0.0))
        (line,) = failure(engine=(0.0, sign * 0.05005 * num_tokens, -sign * 0.05005 * num_tokens))
        assert "differ by 1.00e-01 on text prompts, in nats a token on average, more than 0.1 (rollout.max_log" in line
        assert "weight sync" in line


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_without_a_bound_of_the_user_the_engines_follows_from_the_precision(precision: str) -> None:
    total = MAX_LOGP_GAP[precision] * NUM_SAMPLES * len(LOGP)
    check(engine=(0.99 * total, 0.0, 0.0), precision=precision, max_logp_gap=0.0)
    (line,) = failure(engine=(0.0, 1.01 * total, 0.0), precision=precision, max_logp_gap=0.0)
    assert f"more than {MAX_LOGP_GAP[precision]} (rollout.max_logp_gap)" in line


def test_bf16_is_allowed_what_fp32_is_not() -> None:
    check(ratios=(1e-2, 0.0, 0.0), precision="bf16")
    failure(ratios=(1e-2, 0.0, 0.0), precision="fp32")


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("at_sample", range(NUM_SAMPLES))
def test_not_a_number_fails_wherever_it_stands(place: int, at_sample: int) -> None:
    values = [0.0] * 3
    values[place] = math.nan
    (line,) = failure(ratios=values, at_sample=at_sample)
    assert "|log ratio| is nan" in line
    (line,) = failure(reference=values, at_sample=at_sample)
    assert "KL to the reference is about nan" in line


def test_an_engine_gap_that_is_not_a_number_fails() -> None:
    (line,) = failure(engine=(0.0, math.nan, 0.0))
    assert "differ by nan on text prompts" in line


def test_all_problems_are_said_at_once() -> None:
    lines = failure(ratios=(1.0, 0.0, 0.0), reference=(1.0, 0.0, 0.0), engine=(2.0, 0.0, 0.0))
    assert [word in line for word, line in zip(("log ratio", "KL", "engine"), lines, strict=True)] == [True] * 3


def test_only_samples_before_the_first_update_must_have_ratio_one() -> None:
    check(ratios=(1.0, 1.0, 1.0), at_sample=2, first_update_samples=2)
    failure(ratios=(1.0, 1.0, 1.0), at_sample=1, first_update_samples=2)


WITH_IMAGE = dataclasses.replace(PROMPT, row=1, grids=(ImageGrid(1, 2, 2, 2),))
VERSION = 6


def answer(prompt: Prompt, *errors: float, version: int = VERSION, earlier: tuple[tuple[int, int], ...] = ()) -> Sample:
    """An answer whose engine's log-probs differ from the policy's by `errors`."""
    logp = tuple(-1.0 - error for error in errors)
    return Sample(prompt, 0, (3,) * len(errors), logp, "", False, version, earlier=earlier)


def gap_of(*samples: Sample) -> dict[str, float]:
    old = tuple(torch.full((len(sample.token_ids),), -1.0) for sample in samples)
    found = engine_gap(Batch(samples, None, (), old), version=VERSION)
    return {name.removeprefix("rollout/logp_gap_"): value for name, value in found.items()}


def engine_failure(*samples: Sample) -> str:
    gap = {f"rollout/logp_gap_{name}": value for name, value in gap_of(*samples).items()}
    with pytest.raises(SelfCheckError, match=f"step {VERSION + 1}: the check of the engine against") as caught:
        check_engine(gap, step=VERSION + 1, precision="fp32", max_logp_gap=0.1)
    return str(caught.value).splitlines()[1]


def test_the_gap_is_that_of_tokens() -> None:
    found = gap_of(answer(WITH_IMAGE, 0.5), answer(PROMPT, *[0.25] * 98, -0.375))
    assert found == {"mean": (0.5 + 98 * 0.25 + 0.375) / 100, "p99": 0.375, "max": 0.5} | {
        **{"image": 0.5, "text": (98 * 0.25 + 0.375) / 99}
    }
    assert gap_of(answer(PROMPT, 0.25, 0.5)) == {"mean": 0.375, "p99": 0.5, "max": 0.5, "text": 0.375}


def test_an_engine_that_is_wrong_on_images_alone_is_caught_and_named() -> None:
    """Few as they are: over all tokens the mean is below the bound."""
    samples = [answer(WITH_IMAGE, 0.25, 0.5), *(answer(PROMPT, 0.0, 0.0) for _ in range(50))]
    assert gap_of(*samples)["mean"] < 0.1
    said = engine_failure(*samples)
    assert "differ by 3.75e-01 on image prompts, in nats a token on average, more than 0.1" in said
    assert "(text prompts: 0.00e+00)" in said
    assert "vision features or a prefix cache" in said
    assert "the weight sync" not in said


def test_an_engine_that_is_wrong_everywhere_is_another_suspect() -> None:
    said = engine_failure(answer(WITH_IMAGE, 0.5), answer(PROMPT, 0.25))
    assert "differ by 5.00e-01 on image prompts and 2.50e-01 on text prompts" in said
    assert "suspect the weight sync, banned ids, the temperature" in said


def test_tokens_of_other_weights_do_not_count() -> None:
    fresh = answer(PROMPT, 0.125, 0.25)
    cut = answer(WITH_IMAGE, 9.0, 9.0, 9.0, 0.5, version=VERSION, earlier=((VERSION - 2, 1), (VERSION - 1, 2)))
    stale = [answer(PROMPT, 9.0, version=VERSION - 1), answer(PROMPT, 9.0, 9.0, version=0, earlier=())]
    found = gap_of(*stale, fresh, cut)
    assert found == {"mean": 0.875 / 3, "p99": 0.5, "max": 0.5, "image": 0.5, "text": 0.1875}
    assert gap_of(*stale) == {}
    check_engine({}, step=VERSION + 1, precision="fp32", max_logp_gap=0.1)


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("prompt", [PROMPT, WITH_IMAGE])
def test_an_engine_that_says_nan_is_caught_at_any_step(prompt: Prompt, place: int) -> None:
    errors = [0.0] * 4
    errors[place] = math.nan
    assert math.isnan(gap_of(answer(prompt, *errors), answer(PROMPT, 0.0))["max"])
    kind = "image" if prompt.grids else "text"
    assert f"differ by nan on {kind} prompts" in engine_failure(answer(prompt, *errors), answer(PROMPT, 0.0))
