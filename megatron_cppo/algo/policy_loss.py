"""The policy-gradient terms: clipped surrogate, KL to the reference, and how tokens are weighted.

Owns per-token losses and per-token weights. It must not know samples' texts, views or the parallel layout: weights come
from counts known before the update, so the contributions of micro-batches and ranks add up to the mini-batch's loss.

Shapes: N response tokens; scalars are counts of the mini-batch over all data-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_cppo.algo.contrastive import k3

MAX_LOG_RATIO = 20.0


@dataclass(frozen=True, slots=True)
class ClippedLoss:
    """Per-token loss, and which clip (if any) replaced the token's ratio and so stopped its gradient."""

    loss_N: Tensor
    clipped_low_N: Tensor
    clipped_high_N: Tensor
    dual_clipped_N: Tensor


def clipped_surrogate(
    logp_N: Tensor,
    old_logp_N: Tensor,
    advantage_N: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 0.0,
) -> ClippedLoss:
    """max(−A·r, −A·clip(r, 1 − low, 1 + high)) per token with r = exp(logp − old_logp), |logp − old_logp| ≤ 20.

    PPO (arXiv 1707.06347); unequal bounds are DAPO's clip-higher (arXiv 2503.14476). `dual_clip` c > 1 bounds the loss
    of negative advantages by −A·c (arXiv 1912.09729); 0 turns it off. Raises ValueError for bounds that hold no ratio
    of 1, and for 0 < c ≤ 1.
    """
    if not (0 <= clip_low <= 1 and clip_high >= 0):
        raise ValueError(f"clip bounds must be 0 ≤ low ≤ 1 and high ≥ 0, got {clip_low} and {clip_high}; 0.2 is usual")
    if dual_clip and dual_clip <= 1:
        raise ValueError(f"dual_clip must be > 1, or 0 to turn it off, got {dual_clip}; 3.0 is usual")
    ratio_N = (logp_N - old_logp_N).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    plain_N = -advantage_N * ratio_N
    clipped_N = -advantage_N * ratio_N.clamp(1 - clip_low, 1 + clip_high)
    loss_N = torch.maximum(plain_N, clipped_N)
    hit_N = clipped_N > plain_N
    dual_clipped_N = torch.zeros_like(hit_N)
    if dual_clip:
        bound_N = -advantage_N * dual_clip
        dual_clipped_N = (advantage_N < 0) & (loss_N > bound_N)
        loss_N = torch.where(dual_clipped_N, bound_N, loss_N)
    return ClippedLoss(loss_N, hit_N & (advantage_N < 0), hit_N & (advantage_N > 0), dual_clipped_N)


def _token_mean(length_N: Tensor, num_tokens: int, num_samples: int, constant_length: int | None) -> Tensor:
    return torch.full_like(length_N, 1.0 / num_tokens, dtype=torch.float32)


def _sample_mean(length_N: Tensor, num_tokens: int, num_samples: int, constant_length: int | None) -> Tensor:
    return 1.0 / (length_N.float() * num_samples)


def _sum_over_length(length_N: Tensor, num_tokens: int, num_samples: int, constant_length: int | None) -> Tensor:
    if constant_length is None:
        raise ValueError(
            'aggregation "sum_over_length" needs constant_length, got None; give the longest response allowed'
        )
    return torch.full_like(length_N, 1.0 / (num_samples * constant_length), dtype=torch.float32)


AGGREGATIONS: dict[str, Callable[[Tensor, int, int, int | None], Tensor]] = {
    "token_mean": _token_mean,
    "sample_mean": _sample_mean,
    "sum_over_length": _sum_over_length,
}


def token_weights(
    length_N: Tensor, *, kind: str, num_tokens: int, num_samples: int, constant_length: int | None = None
) -> Tensor:
    """The weight of each token's loss, [N], so that the weighted sum over the mini-batch is its aggregate.

    `length_N` is the number of response tokens of the token's own sample. "token_mean": every token alike (DAPO, arXiv
    2503.14476). "sample_mean": every sample alike, by the mean of its tokens (GRPO, arXiv 2402.03300).
    "sum_over_length": sums over tokens, divided by `constant_length` (Dr. GRPO, arXiv 2503.20783). Raises ValueError
    for an unknown `kind`, and for "sum_over_length" without its constant.
    """
    if kind not in AGGREGATIONS:
        raise ValueError(f"unknown aggregation {kind!r}; choose one of {', '.join(AGGREGATIONS)}")
    return AGGREGATIONS[kind](length_N, num_tokens, num_samples, constant_length)


def _k1(logp_N: Tensor, reference_logp_N: Tensor) -> Tensor:
    return logp_N - reference_logp_N


def _k2(logp_N: Tensor, reference_logp_N: Tensor) -> Tensor:
    return 0.5 * (logp_N - reference_logp_N).square()


KL_ESTIMATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": _k1, "k2": _k2, "k3": k3}


def kl_estimate(logp_N: Tensor, reference_logp_N: Tensor, kind: str) -> Tensor:
    """Estimate of KL(policy‖reference) from each sampled token's log-probs, [N], in nats.

    As a loss, only "k2" has the gradient of that KL in the policy in expectation: "k1" has none and "k3" that of
    KL(reference‖policy). "k3", the releases' "low_var_kl", is clamped as they do; the others are not. Raises ValueError
    for another `kind`.
    """
    if kind not in KL_ESTIMATES:
        raise ValueError(f"unknown KL estimate {kind!r}; choose one of {', '.join(KL_ESTIMATES)}")
    return KL_ESTIMATES[kind](logp_N, reference_logp_N)
