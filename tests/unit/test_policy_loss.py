"""The policy-gradient terms against the same formulas in Python floats, and their aggregation in any cut."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatron_cppo.algo.policy_loss import clipped_surrogate, kl_estimate, token_weights

LOG_RATIOS = [-3.0, -0.5, -0.1, 0.0, 0.1, 0.5, 3.0, 45.0, -45.0]


def expected_loss(log_ratio: float, advantage: float, low: float, high: float, dual: float) -> tuple[float, str]:
    """The token's loss, and which clip replaced its ratio."""
    ratio = math.exp(max(-20.0, min(20.0, log_ratio)))
    if advantage > 0 and ratio > 1 + high:
        return -advantage * (1 + high), "high"
    if advantage < 0 and ratio < 1 - low:
        return -advantage * (1 - low), "low"
    if dual and advantage < 0 and ratio > dual:
        return -advantage * dual, "dual"
    return -advantage * ratio, ""


@pytest.mark.parametrize(("low", "high", "dual"), [(0.2, 0.2, 0.0), (0.2, 0.28, 3.0), (1.0, 0.4, 10.0)])
@pytest.mark.parametrize("advantage", [-1.5, 0.0, 0.7])
def test_clipped_surrogate(low: float, high: float, dual: float, advantage: float) -> None:
    old = torch.full((len(LOG_RATIOS),), -1.0, dtype=torch.float64)
    logp = (old + torch.tensor(LOG_RATIOS, dtype=torch.float64)).requires_grad_()
    given = clipped_surrogate(logp, old, torch.full_like(old, advantage), clip_low=low, clip_high=high, dual_clip=dual)
    values, clips = zip(*(expected_loss(d, advantage, low, high, dual) for d in LOG_RATIOS), strict=True)
    torch.testing.assert_close(given.loss_N.tolist(), list(values), rtol=1e-12, atol=1e-12)
    assert given.clipped_low_N.tolist() == [clip == "low" for clip in clips]
    assert given.clipped_high_N.tolist() == [clip == "high" for clip in clips]
    assert given.dual_clipped_N.tolist() == [clip == "dual" for clip in clips]

    given.loss_N.sum().backward()
    gradients = [
        0.0 if clip or abs(d) > 20 else -advantage * math.exp(d) for d, clip in zip(LOG_RATIOS, clips, strict=True)
    ]
    assert logp.grad is not None
    torch.testing.assert_close(logp.grad.tolist(), gradients, rtol=1e-12, atol=1e-12)


def test_on_policy_gradient_is_that_of_the_policy_gradient() -> None:
    logp = torch.randn(6, dtype=torch.float64, requires_grad=True)
    advantage = torch.randn(6, dtype=torch.float64)
    clipped = clipped_surrogate(logp, logp.detach(), advantage)
    clipped.loss_N.sum().backward()
    assert logp.grad is not None
    torch.testing.assert_close(logp.grad, -advantage)
    assert not (clipped.clipped_low_N | clipped.clipped_high_N | clipped.dual_clipped_N).any()


def test_gradcheck() -> None:
    torch.manual_seed(0)
    logp, old, advantage = torch.randn(3, 8, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: clipped_surrogate(x, old, advantage, dual_clip=3.0).loss_N, (logp.requires_grad_(),)
    )
    for kind in ("k1", "k2", "k3"):
        assert torch.autograd.gradcheck(lambda x, k=kind: kl_estimate(x, old, k), (logp,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_low": 1.2}, "clip bounds must be 0 ≤ low ≤ 1 and high ≥ 0, got 1.2 and 0.2"),
        ({"clip_high": -0.1}, "got 0.2 and -0.1"),
        ({"dual_clip": 0.5}, "dual_clip must be > 1, or 0 to turn it off, got 0.5"),
    ],
)
def test_impossible_clips_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clipped_surrogate(torch.zeros(1), torch.zeros(1), torch.zeros(1), **options)


LENGTHS = [3, 1, 4]
LOSSES = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0])
EXPECTED = {
    "token_mean": 255 / 8,
    "sample_mean": (7 / 3 + 8 / 1 + 240 / 4) / 3,
    "sum_over_length": (7 + 8 + 240) / 10 / 3,
}


@pytest.mark.parametrize("kind", EXPECTED)
@pytest.mark.parametrize("cut", [[range(8)], [range(3), range(3, 8)], [range(5, 8), [], range(5)]])
def test_weighted_sums_add_up_however_the_minibatch_is_cut(kind: str, cut: list[Any]) -> None:
    """Even a cut through a sample: the weights need counts only."""
    length = torch.tensor(LENGTHS).repeat_interleave(torch.tensor(LENGTHS))
    counts: dict[str, Any] = {"num_tokens": 8, "num_samples": 3, "constant_length": 10}
    total = sum(
        (LOSSES[list(part)] * token_weights(length[list(part)], kind=kind, **counts)).sum().item() for part in cut
    )
    assert total == pytest.approx(EXPECTED[kind])


def test_impossible_aggregations_are_named() -> None:
    with pytest.raises(ValueError, match="unknown aggregation 'mean'; choose one of token_mean, sample_mean"):
        token_weights(torch.ones(2), kind="mean", num_tokens=2, num_samples=1)
    with pytest.raises(ValueError, match='"sum_over_length" needs constant_length'):
        token_weights(torch.ones(2), kind="sum_over_length", num_tokens=2, num_samples=1)


def test_kl_estimates() -> None:
    logp = torch.zeros(len(LOG_RATIOS), dtype=torch.float64)
    reference = torch.tensor(LOG_RATIOS, dtype=torch.float64)
    torch.testing.assert_close(kl_estimate(logp, reference, "k1").tolist(), [-d for d in LOG_RATIOS])
    torch.testing.assert_close(kl_estimate(logp, reference, "k2").tolist(), [d * d / 2 for d in LOG_RATIOS])
    low_var_kl = [min(10.0, math.exp(max(-20, min(20, d))) - max(-20, min(20, d)) - 1) for d in LOG_RATIOS]
    torch.testing.assert_close(kl_estimate(logp, reference, "k3").tolist(), low_var_kl, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="unknown KL estimate 'k5'; choose one of k1, k2, k3"):
        kl_estimate(logp, reference, "k5")


def test_what_the_kl_estimates_gradients_mean() -> None:
    """In expectation over the policy's tokens: k1 has no gradient, k2 that of KL(π‖ref), k3 that of KL(ref‖π)."""
    torch.manual_seed(1)
    logits = torch.randn(9, dtype=torch.float64, requires_grad=True)
    policy = logits.log_softmax(-1)
    reference = (logits.detach() + 0.5 * torch.randn(9, dtype=torch.float64)).log_softmax(-1)

    def gradient(value: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    def estimated(kind: str) -> torch.Tensor:
        return gradient((policy.exp().detach() * kl_estimate(policy, reference, kind)).sum())

    torch.testing.assert_close(estimated("k1"), torch.zeros(9, dtype=torch.float64))
    torch.testing.assert_close(estimated("k2"), gradient((policy.exp() * (policy - reference)).sum()))
    torch.testing.assert_close(estimated("k3"), gradient((reference.exp() * (reference - policy)).sum()))
