"""The objectives: which views a sample needs, and the loss of one packed row.

    L = L_policy + beta * KL(policy || reference) + lambda * CPL - (entropy coefficient) * H
    (CPPO, arXiv 2601.00501; `correction` may weigh the tokens of L_policy, and of nothing else)

An objective sees rows of hidden states only through a `Head` and chooses which rows the head computes: the original
view's response tokens, the removing view's of gated samples, the preserving view's masked tokens. It returns the row's
contribution to the total, already divided by counts known before the update, so that contributions of all rows and
all data-parallel ranks add up to the loss of the mini-batch, however it was cut.
Legend: N response tokens of the row, G those of gated samples, M masked ones, S samples of the row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from megatron_cppo.algo import contrastive, correction, policy_loss
from megatron_cppo.algo.perception import perception_mask
from megatron_cppo.config import AlgorithmConfig, PerceptionConfig
from megatron_cppo.types import Sample, View


class Head(Protocol):
    """Token statistics at rows of one packed row's hidden states."""

    def statistics(self, rows_N: Tensor, targets_N: Tensor, *, num_constant: int = 0) -> tuple[Tensor, Tensor]:
        """Log-probs of the targets and entropies, fp32, differentiable but for the last `num_constant`."""
        ...

    def divergences(self, rows_N: Tensor, others: Sequence[Tensor], *, constant_others: bool) -> Tensor:
        """Exact KL [K, N] between the distributions at one set of rows and at each of K others."""
        ...


@dataclass(frozen=True, slots=True)
class Tokens:
    """The response tokens of one packed row; `rows_*_N` is -1 where a sample lacks the view.

    `weight_N` is 0 for filler samples, else 1. `length_N` is the response length of the token's sample. `old_logp_N`
    None: the policy is the one that sampled, so the old log-probs are the current ones, detached. `behaviour_logp_N` is
    the engine's, and inf where a sample has none; None: nothing corrects for its gap to the old ones.
    """

    targets_N: Tensor
    sample_N: Tensor
    weight_N: Tensor
    length_N: Tensor
    advantage_N: Tensor
    rows_original_N: Tensor
    rows_preserving_N: Tensor
    rows_removing_N: Tensor
    old_logp_N: Tensor | None = None
    behaviour_logp_N: Tensor | None = None
    reference_logp_N: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Counts:
    """Of the whole mini-batch, over all data-parallel ranks; known before the update.

    `num_masked_tokens` is known only to the "global" aggregation, by a counting pass.
    """

    num_tokens: int
    num_samples: int
    num_gated_samples: int
    num_microbatches: int
    max_response_tokens: int
    num_masked_tokens: int | None = None


@dataclass(slots=True)
class Outcome:
    """What a row's loss brings: the differentiable contribution, sums of metrics, and per-token values for the log.

    A metric is a (sum, count) pair; pairs are added over rows and ranks before they are divided.
    """

    loss: Tensor
    metrics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    logp_N: Tensor | None = None
    entropy_N: Tensor | None = None
    entropy_removing_N: Tensor | None = None
    mask_N: Tensor | None = None


LossFunction = Callable[[Tokens, Head, Counts, AlgorithmConfig, PerceptionConfig], Outcome]


@dataclass(frozen=True, slots=True)
class Objective:
    """A loss and the views that it needs; `count_masked` where it has a perception mask."""

    loss: LossFunction
    views_for: Callable[[Sample], Sequence[View]]
    count_masked: Callable[[Tokens, Head, PerceptionConfig], int] | None = None


def supervised(
    tokens: Tokens, head: Head, counts: Counts, algorithm: AlgorithmConfig, perception: PerceptionConfig
) -> Outcome:
    """Negative log-likelihood, mean over the mini-batch's response tokens."""
    logp_N, entropy_N = head.statistics(tokens.rows_original_N, tokens.targets_N)
    nll = -(logp_N * tokens.weight_N).sum()
    outcome = Outcome(nll / counts.num_tokens, logp_N=logp_N.detach(), entropy_N=entropy_N.detach())
    weight = tokens.weight_N.sum()
    outcome.metrics["policy/loss"] = (nll.detach(), weight)
    outcome.metrics["policy/entropy"] = ((entropy_N.detach() * tokens.weight_N).sum(), weight)
    return outcome


def grpo(
    tokens: Tokens, head: Head, counts: Counts, algorithm: AlgorithmConfig, perception: PerceptionConfig
) -> Outcome:
    """L_policy + beta * KL - (entropy coefficient) * H."""
    logp_N, entropy_N = head.statistics(tokens.rows_original_N, tokens.targets_N)
    return _policy_terms(tokens, counts, algorithm, logp_N, entropy_N)


def cppo(
    tokens: Tokens, head: Head, counts: Counts, algorithm: AlgorithmConfig, perception: PerceptionConfig
) -> Outcome:
    """GRPO's terms, plus lambda * CPL on the perception tokens of gated samples.

    The head is asked twice: for original and removing rows (their entropies make the mask), then for the preserving
    rows of masked tokens, or their exact divergences. Every TP rank asks the same.
    """
    gated_G, (logp_N, logp_removing_G), (entropy_N, entropy_removing_G) = _both_views(tokens, head, perception)
    outcome = _policy_terms(tokens, counts, algorithm, logp_N, entropy_N)
    mask_G = _mask(entropy_N[gated_G], entropy_removing_G, tokens.sample_N[gated_G], perception)
    absent_N = torch.full_like(entropy_N, torch.nan).detach()
    outcome.entropy_removing_N = absent_N.index_copy(0, gated_G, entropy_removing_G.detach())
    outcome.mask_N = torch.zeros_like(tokens.targets_N, dtype=torch.bool).index_copy(0, gated_G, mask_G)
    masked_M = gated_G[mask_G]
    _log_mask(outcome, entropy_N[gated_G], entropy_removing_G, mask_G)
    if masked_M.numel():
        cpl = _contrastive_term(tokens, head, counts, perception, outcome, masked_M, logp_N, logp_removing_G[mask_G])
        outcome.loss = outcome.loss + perception.coefficient * cpl
    return outcome


def count_masked(tokens: Tokens, head: Head, perception: PerceptionConfig) -> int:
    """How many tokens of a row the perception mask picks; needs no gradient and no preserving view."""
    gated_G, _, (entropy_N, entropy_removing_G) = _both_views(tokens, head, perception)
    return int(_mask(entropy_N[gated_G], entropy_removing_G, tokens.sample_N[gated_G], perception).sum())


def _both_views(
    tokens: Tokens, head: Head, perception: PerceptionConfig
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The tokens of gated samples [G], and log-probs and entropies of the original [N] and removing view [G]."""
    gated_G = torch.nonzero(tokens.rows_removing_N >= 0).squeeze(1)
    sizes = [tokens.targets_N.numel(), gated_G.numel()]
    logp, entropy = head.statistics(
        torch.cat([tokens.rows_original_N, tokens.rows_removing_N[gated_G]]),
        torch.cat([tokens.targets_N, tokens.targets_N[gated_G]]),
        num_constant=gated_G.numel() if perception.stop_gradient_views else 0,
    )
    return gated_G, logp.split(sizes), entropy.split(sizes)


def _mask(entropy_G: Tensor, entropy_removing_G: Tensor, sample_id_G: Tensor, perception: PerceptionConfig) -> Tensor:
    return perception_mask(
        entropy_G.detach(),
        entropy_removing_G.detach(),
        sample_id_G,
        top_fraction=perception.top_fraction,
        min_entropy_shift=perception.min_entropy_shift,
        rank_by=perception.rank_by,
    )


def _contrastive_term(
    tokens: Tokens,
    head: Head,
    counts: Counts,
    perception: PerceptionConfig,
    outcome: Outcome,
    masked_M: Tensor,
    logp_N: Tensor,
    logp_removing_M: Tensor,
) -> Tensor:
    preserving_M = tokens.rows_preserving_N[masked_M]
    logp_original_M = logp_N[masked_M]
    constant = perception.stop_gradient_views
    if perception.divergence == "exact":
        views = (preserving_M, tokens.rows_removing_N[masked_M])
        d_preserving_M, d_removing_M = head.divergences(
            tokens.rows_original_N[masked_M], views, constant_others=constant
        ).unbind(0)
    else:
        num_constant = masked_M.numel() if constant else 0
        logp_preserving_M, _ = head.statistics(preserving_M, tokens.targets_N[masked_M], num_constant=num_constant)
        d_preserving_M = contrastive.divergence(logp_original_M, logp_preserving_M, perception.divergence)
        d_removing_M = contrastive.divergence(logp_original_M, logp_removing_M, perception.divergence)
        shares = [
            contrastive.clamped_share(logp_original_M, logp_view_M, perception.divergence)
            for logp_view_M in (logp_preserving_M, logp_removing_M)
        ]
        outcome.metrics["perception/clamped_share"] = _weighted(torch.stack(shares).mean(), masked_M.numel())
    loss_M = contrastive.contrastive_loss(d_preserving_M, d_removing_M, tau=perception.temperature)
    outcome.metrics["perception/cpl"] = (loss_M.detach().sum(), _count(loss_M))
    return contrastive.aggregate(
        loss_M,
        tokens.sample_N[masked_M],
        kind=perception.aggregation,
        num_gated_samples=counts.num_gated_samples,
        num_microbatches=counts.num_microbatches,
        num_masked_tokens=counts.num_masked_tokens,
    )


def _policy_terms(
    tokens: Tokens, counts: Counts, algorithm: AlgorithmConfig, logp_N: Tensor, entropy_N: Tensor
) -> Outcome:
    weight_N = tokens.weight_N * policy_loss.token_weights(
        tokens.length_N,
        kind=algorithm.aggregation,
        num_tokens=counts.num_tokens,
        num_samples=counts.num_samples,
        constant_length=counts.max_response_tokens,
    )
    old_logp_N = logp_N.detach() if tokens.old_logp_N is None else tokens.old_logp_N
    clipped = policy_loss.clipped_surrogate(
        logp_N,
        old_logp_N,
        tokens.advantage_N,
        clip_low=algorithm.clip_low,
        clip_high=algorithm.clip_high,
        dual_clip=algorithm.dual_clip,
    )
    correction_N, metrics = _correction(tokens, algorithm, old_logp_N)
    policy = (clipped.loss_N * correction_N * weight_N).sum()
    outcome = Outcome(policy, metrics, logp_N=logp_N.detach(), entropy_N=entropy_N.detach())
    total = tokens.weight_N.sum()
    one = torch.ones((), device=logp_N.device)
    outcome.metrics["policy/loss"] = (policy.detach(), one / counts.num_microbatches)
    outcome.metrics["policy/entropy"] = ((entropy_N.detach() * tokens.weight_N).sum(), total)
    hits = {"clip_low": clipped.clipped_low_N, "clip_high": clipped.clipped_high_N}
    if algorithm.dual_clip:
        hits["dual_clip"] = clipped.dual_clipped_N
    for name, hit_N in hits.items():
        outcome.metrics[f"policy/{name}_share"] = ((hit_N * tokens.weight_N).sum(), total)
    if tokens.reference_logp_N is not None:
        kl_N = policy_loss.kl_estimate(logp_N, tokens.reference_logp_N, algorithm.kl_estimator)
        outcome.loss = outcome.loss + algorithm.beta * (kl_N * weight_N).sum()
        outcome.metrics["policy/kl"] = ((kl_N.detach() * tokens.weight_N).sum(), total)
    if algorithm.entropy_coefficient:
        outcome.loss = outcome.loss - algorithm.entropy_coefficient * (entropy_N * weight_N).sum()
    return outcome


def _correction(
    tokens: Tokens, algorithm: AlgorithmConfig, old_logp_N: Tensor
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """The constant weight of each token's policy loss, [N], and its metrics; one and none where nothing is corrected.

    A sample without the engine's log-probs is taken for the old policy's own.
    """
    if tokens.behaviour_logp_N is None:
        return torch.ones_like(old_logp_N), {}
    known_N = tokens.behaviour_logp_N != torch.inf
    behaviour_logp_N = torch.where(known_N, tokens.behaviour_logp_N, old_logp_N)
    correction_N, cut_N = correction.correction_weights(
        old_logp_N, behaviour_logp_N, tokens.sample_N, kind=algorithm.correction, bound=algorithm.correction_bound
    )
    engine_kl_N = correction.engine_kl(old_logp_N, behaviour_logp_N)
    total = tokens.weight_N.sum()
    return correction_N, {
        "policy/correction_weight": ((correction_N * tokens.weight_N).sum(), total),
        "policy/correction_hit_share": ((cut_N * tokens.weight_N).sum(), total),
        "policy/engine_kl": ((engine_kl_N * tokens.weight_N).sum(), (known_N * tokens.weight_N).sum()),
    }


def _log_mask(outcome: Outcome, entropy_G: Tensor, entropy_removing_G: Tensor, mask_G: Tensor) -> None:
    shift_G = (entropy_removing_G - entropy_G).detach()
    outcome.metrics["perception/masked_share"] = (mask_G.sum().float(), _count(mask_G))
    outcome.metrics["perception/entropy_shift"] = (shift_G.sum(), _count(shift_G))


def _count(values: Tensor) -> Tensor:
    return torch.tensor(float(values.numel()), device=values.device)


def _weighted(mean: Tensor, count: int) -> tuple[Tensor, Tensor]:
    number = torch.tensor(float(count), device=mean.device)
    return mean.detach() * number, number


def _original(_: Sample) -> tuple[View, ...]:
    return ("original",)


def _gated(sample: Sample) -> tuple[View, ...]:
    return ("original", "preserving", "removing") if sample.gated else ("original",)


OBJECTIVES = {
    "cppo": Objective(cppo, _gated, count_masked),
    "grpo": Objective(grpo, _original),
    "supervised": Objective(supervised, _original),
}
