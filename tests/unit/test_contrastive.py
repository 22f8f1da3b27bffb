"""Divergence estimates, the contrastive loss and its aggregation, against formulas written out in Python floats."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_cppo.algo.contrastive import aggregate, clamped_share, contrastive_loss, divergence

LOG_RATIOS = [-50.0, -20.5, -12.0, -10.5, -1.0, -1e-3, 0.0, 1e-3, 0.7, 2.6, 2.7, 9.0, 30.0]


def expected_k3(d: float) -> float:
    d = max(-20.0, min(20.0, d))
    return max(-10.0, min(10.0, math.exp(d) - d - 1))


def expected_k1(d: float) -> float:
    return max(-10.0, min(10.0, -d))


@pytest.mark.parametrize(("kind", "expected"), [("k3", expected_k3), ("k1", expected_k1)])
def test_divergence_and_its_clamps(kind: str, expected: Any) -> None:
    original = torch.full((len(LOG_RATIOS),), -30.0, dtype=torch.float64)
    view = original + torch.tensor(LOG_RATIOS, dtype=torch.float64)
    given = divergence(original, view, kind)
    torch.testing.assert_close(given.tolist(), [expected(d) for d in LOG_RATIOS], rtol=1e-12, atol=1e-12)
    share = sum(abs(expected(d)) >= 10 for d in LOG_RATIOS) / len(LOG_RATIOS)
    torch.testing.assert_close(clamped_share(original, view, kind).item(), share)


def test_k3_dies_where_its_value_passes_ten() -> None:
    """exp(d) − d − 1 = 10 at d = 2.61…, and at d = −11."""
    original = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    view = torch.tensor([2.60, 2.62, -10.9, -11.1], dtype=torch.float64, requires_grad=True)
    divergence(original, view, "k3").sum().backward()
    assert view.grad is not None
    assert original.grad is not None
    assert (view.grad != 0).tolist() == [True, False, True, False]
    torch.testing.assert_close(view.grad, -original.grad)
    torch.testing.assert_close(view.grad[0].item(), math.exp(2.60) - 1)


def test_k3_survives_log_ratios_whose_exponential_overflows() -> None:
    view = torch.tensor([1000.0, -1000.0], requires_grad=True)
    divergence(torch.zeros(2), view, "k3").sum().backward()
    assert view.grad is not None
    assert view.grad.tolist() == [0.0, 0.0]


def test_k3_is_accurate_for_close_views() -> None:
    d = torch.tensor([1e-3], dtype=torch.float32)
    exact = math.exp(d.item()) - d.item() - 1
    torch.testing.assert_close(divergence(torch.zeros(1), d, "k3").item(), exact, rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_estimates_are_unbiased_and_pull_the_view_along_the_gradient_of_the_kl(kind: str) -> None:
    """Over tokens sampled from p, the mean is KL(p‖q), and the view's gradient is that of KL(p‖q)."""
    torch.manual_seed(0)
    p = torch.randn(9, dtype=torch.float64).log_softmax(-1)
    logits_q = (p + 0.5 * torch.randn(9, dtype=torch.float64)).requires_grad_()
    estimate = (p.exp() * divergence(p, logits_q.log_softmax(-1), kind)).sum()
    exact = (p.exp() * (p - logits_q.log_softmax(-1))).sum()
    torch.testing.assert_close(estimate, exact)
    (estimate_grad,) = torch.autograd.grad(estimate, logits_q)
    (exact_grad,) = torch.autograd.grad(exact, logits_q)
    torch.testing.assert_close(estimate_grad, exact_grad)


def test_the_loss_is_infonce_with_one_negative() -> None:
    d_preserving = torch.tensor([0.1, 3.0, 0.0, 10.0], dtype=torch.float64)
    d_removing = torch.tensor([0.4, 0.2, 0.0, -10.0], dtype=torch.float64)
    tau = 0.3
    similarity = torch.stack([-d_preserving, -d_removing], dim=1) / tau
    expected = torch.nn.functional.cross_entropy(similarity, torch.zeros(4).long(), reduction="none")
    torch.testing.assert_close(contrastive_loss(d_preserving, d_removing, tau=tau), expected, rtol=1e-8, atol=1e-8)
    with pytest.raises(ValueError, match=r"tau must be > 0, got 0\.0"):
        contrastive_loss(d_preserving, d_removing, tau=0.0)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_gradcheck_through_all_three_views(kind: str) -> None:
    torch.manual_seed(1)
    views = [torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def loss(original: Tensor, preserving: Tensor, removing: Tensor) -> Tensor:
        return contrastive_loss(divergence(original, preserving, kind), divergence(original, removing, kind), tau=0.5)

    assert torch.autograd.gradcheck(loss, views)


def test_k1_cancels_its_anchor() -> None:
    original, preserving, removing = torch.randn(3, 6, dtype=torch.float64).requires_grad_()
    loss = contrastive_loss(divergence(original, preserving, "k1"), divergence(original, removing, "k1"))
    torch.testing.assert_close(loss, torch.nn.functional.softplus((removing - preserving) / 0.1))


LOSSES = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0], dtype=torch.float64)
SAMPLE_IDS = torch.tensor([5, 5, 2, 5, 9, 9, 2])
# Whole samples stay together; micro-batches of two data-parallel ranks, one without a masked token.
CUTS = [
    [[0, 1, 2, 3, 4, 5, 6]],
    [[0, 1, 3], [2, 6], [4, 5]],
    [[4, 5], [6, 0, 2, 1, 3], []],
]
# Four gated samples, of which one has no masked token.
PER_SAMPLE = ((1 + 2 + 8) / 3 + (4 + 64) / 2 + (16 + 32) / 2) / 4


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(("kind", "expected"), [("sample", PER_SAMPLE), ("global", 127 / 7)])
def test_contributions_add_up_however_the_minibatch_is_cut(cut: list[list[int]], kind: str, expected: float) -> None:
    counts: dict[str, Any] = {"num_gated_samples": 4, "num_microbatches": len(cut), "num_masked_tokens": 7}
    total = sum(aggregate(LOSSES[part], SAMPLE_IDS[part], kind=kind, **counts).item() for part in cut)
    assert total == pytest.approx(expected)


def test_the_microbatch_mean_depends_on_the_cut() -> None:
    part_means = [(127 / 7,), (11 / 3, 34.0, 24.0), (24.0, 79 / 5, 0.0)]
    for cut, means in zip(CUTS, part_means, strict=True):
        counts: dict[str, Any] = {"num_gated_samples": 4, "num_microbatches": len(cut)}
        total = sum(aggregate(LOSSES[part], SAMPLE_IDS[part], kind="microbatch", **counts).item() for part in cut)
        assert total == pytest.approx(sum(means) / len(cut))


@pytest.mark.parametrize("kind", ["sample", "microbatch", "global"])
def test_no_masked_token_contributes_a_zero_with_a_gradient(kind: str) -> None:
    loss = torch.zeros(0, requires_grad=True)
    counts: dict[str, Any] = {"num_gated_samples": 0, "num_microbatches": 2, "num_masked_tokens": 0}
    total = aggregate(loss, torch.zeros(0).long(), kind=kind, **counts)
    total.backward()
    assert total == 0
    assert loss.grad is not None


def test_impossible_arguments_are_named() -> None:
    counts: dict[str, Any] = {"num_gated_samples": 1, "num_microbatches": 1}
    with pytest.raises(ValueError, match="unknown aggregation 'mean'; choose one of sample, microbatch, global"):
        aggregate(LOSSES, SAMPLE_IDS, kind="mean", **counts)
    with pytest.raises(ValueError, match='"global" needs num_masked_tokens'):
        aggregate(LOSSES, SAMPLE_IDS, kind="global", **counts)
    with pytest.raises(AssertionError, match="3 masked samples, 1 gated"):
        aggregate(LOSSES, SAMPLE_IDS, kind="sample", **counts)
    with pytest.raises(ValueError, match="unknown divergence 'k4'; choose one of k1, k3"):
        divergence(LOSSES, LOSSES, "k4")
