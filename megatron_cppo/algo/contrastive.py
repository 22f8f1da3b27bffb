"""The contrastive perception loss of CPPO (arXiv 2601.00501): sampled-token divergences, loss, aggregation.

Owns what happens to masked tokens once their log-probs are known. It must not know the mask's rule, the vocabulary or
the parallel layout. The clamps are those of the authors' release; they stop values and gradients.

Shapes: N tokens, M masked tokens of one micro-batch, `sample_id_M` whose tokens they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
MAX_DIVERGENCE = 10.0


def k3(logp_N: Tensor, other_logp_N: Tensor) -> Tensor:
    """exp(d) − d − 1 with d = other − logp in [−20, 20], at most 10, [N]; no gradient outside d ∈ (−11, 2.61).

    Over tokens sampled from p = exp(logp) an unbiased estimate of KL(p‖other), never negative
    (J. Schulman, "Approximating KL divergence", 2020).
    """
    d_N = (other_logp_N - logp_N).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return (d_N.expm1() - d_N).clamp(-MAX_DIVERGENCE, MAX_DIVERGENCE)


def k1(logp_N: Tensor, other_logp_N: Tensor) -> Tensor:
    """logp − other in [−10, 10], [N]; no gradient outside."""
    return (logp_N - other_logp_N).clamp(-MAX_DIVERGENCE, MAX_DIVERGENCE)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k3": k3}


def divergence(logp_original_N: Tensor, logp_view_N: Tensor, kind: str) -> Tensor:
    """Estimate of KL(original‖view) from each sampled token's log-probs, [N], in nats, differentiable in both.

    Raises ValueError for a `kind` other than "k1" and "k3".
    """
    return _divergence(kind)(logp_original_N, logp_view_N)


@torch.no_grad()
def clamped_share(logp_original_N: Tensor, logp_view_N: Tensor, kind: str) -> Tensor:
    """The share of tokens whose divergence a clamp has cut off from its gradient, a scalar; 0 without tokens.

    Raises ValueError for a `kind` other than "k1" and "k3".
    """
    size_N = divergence(logp_original_N, logp_view_N, kind).abs()
    clamped_N = (size_N >= MAX_DIVERGENCE) | ((logp_view_N - logp_original_N).abs() > MAX_LOG_RATIO)
    return clamped_N.float().sum() / max(clamped_N.numel(), 1)


def contrastive_loss(d_preserving_N: Tensor, d_removing_N: Tensor, *, tau: float = 0.1) -> Tensor:
    """softplus((D(original, preserving) − D(original, removing))/τ), [N]: InfoNCE with one negative.

    Raises ValueError for τ ≤ 0.
    """
    if tau <= 0:
        raise ValueError(f"tau must be > 0, got {tau}; the paper uses 0.1")
    return torch.nn.functional.softplus((d_preserving_N - d_removing_N) / tau)


def _per_sample(
    sample_id_M: Tensor, num_gated_samples: int, num_microbatches: int, num_masked_tokens: int | None
) -> Tensor:
    _, sample_M, length_S = torch.unique(sample_id_M, return_inverse=True, return_counts=True)
    assert length_S.numel() <= num_gated_samples, f"{length_S.numel()} masked samples, {num_gated_samples} gated"
    return 1.0 / (length_S[sample_M] * num_gated_samples)


def _per_microbatch(
    sample_id_M: Tensor, num_gated_samples: int, num_microbatches: int, num_masked_tokens: int | None
) -> Tensor:
    num_tokens = sample_id_M.numel()
    return sample_id_M.new_full((num_tokens,), 1.0 / (max(num_tokens, 1) * num_microbatches), dtype=torch.float32)


def _per_token(
    sample_id_M: Tensor, num_gated_samples: int, num_microbatches: int, num_masked_tokens: int | None
) -> Tensor:
    if num_masked_tokens is None:
        raise ValueError(
            'aggregation "global" needs num_masked_tokens, got None; count them in a pass without gradient'
        )
    return sample_id_M.new_full(sample_id_M.shape, 1.0 / max(num_masked_tokens, 1), dtype=torch.float32)


AGGREGATIONS: dict[str, Callable[[Tensor, int, int, int | None], Tensor]] = {
    "sample": _per_sample,
    "microbatch": _per_microbatch,
    "global": _per_token,
}


def aggregate(
    loss_M: Tensor,
    sample_id_M: Tensor,
    *,
    kind: str,
    num_gated_samples: int,
    num_microbatches: int,
    num_masked_tokens: int | None = None,
) -> Tensor:
    """This micro-batch's contribution to the mini-batch's loss, a scalar; the contributions add up to the whole.

    All counts are of the mini-batch over all data-parallel ranks:

    - "sample": mean over each sample's masked tokens, summed, over `num_gated_samples` (the plan knows it; samples
      without a masked token count). A sample's tokens must all be here. Independent of the cut.
    - "microbatch": mean over the masked tokens here, over `num_microbatches` (the plan knows it). Parity with the
      authors' release; depends on the cut.
    - "global": sum over `num_masked_tokens` (from a counting pass without gradient, whose rows are packed in another
      way: a token whose place in the mask hangs on rounding may be counted and not used, or the other way round).
      Independent of the cut but for that.

    Raises ValueError for an unknown `kind`, and for "global" without its count.
    """
    if kind not in AGGREGATIONS:
        raise ValueError(f"unknown aggregation {kind!r}; choose one of {', '.join(AGGREGATIONS)}")
    weight_M = AGGREGATIONS[kind](sample_id_M, num_gated_samples, num_microbatches, num_masked_tokens)
    return (loss_M * weight_M).sum()


def _divergence(kind: str) -> Callable[[Tensor, Tensor], Tensor]:
    if kind not in DIVERGENCES:
        raise ValueError(f"unknown divergence {kind!r}; choose one of {', '.join(DIVERGENCES)}")
    return DIVERGENCES[kind]
