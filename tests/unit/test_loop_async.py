"""How old the tokens of a step are, where answers were cut by a swap of weights, and that none may be older."""

from __future__ import annotations

import pytest

from megatron_cppo.loop_async import staleness
from megatron_cppo.types import Group, Prompt, Sample

PROMPT = Prompt("train", 7, 0, "", "", "", (1,), ((0,), (0,), (0,)), 1, (), ())


def sampled(version: int, *earlier: tuple[int, int], tokens: int = 4) -> Sample:
    return Sample(PROMPT, 0, (3,) * tokens, (-0.5,) * tokens, "", False, version, earlier=earlier)


def ages(*samples: Sample, version: int = 9, max_staleness: int = 2) -> dict[str, float]:
    return staleness([Group(PROMPT, samples)], version=version, max_staleness=max_staleness)


def test_staleness_is_a_mean_over_tokens() -> None:
    assert ages(sampled(9), sampled(9)) == {
        **{"rollout/staleness_mean": 0, "rollout/staleness_max": 0, "rollout/cut_share": 0}
    }
    found = ages(sampled(9), sampled(8, tokens=2), sampled(9, (7, 3), (8, 1), tokens=6))
    assert found["rollout/staleness_mean"] == (2 * 1 + 3 * 2 + 1 * 1) / 12
    assert (found["rollout/staleness_max"], found["rollout/cut_share"]) == (2, 1 / 3)


@pytest.mark.parametrize("sample", [sampled(6), sampled(9, (6, 1)), sampled(9, (6, 1), (8, 2))])
def test_an_older_token_cannot_be_trained_on(sample: Sample) -> None:
    assert ages(sample, max_staleness=3)["rollout/staleness_max"] == 3
    with pytest.raises(AssertionError, match="row 7: tokens of weights 6 would train weights 9, and may be 2 versions"):
        ages(sampled(9), sample)


def test_nor_one_of_weights_that_are_still_to_come() -> None:
    with pytest.raises(AssertionError, match="tokens of weights 10 would train weights 9"):
        ages(sampled(10))
