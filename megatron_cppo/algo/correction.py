"""Correction for the gap between the rollout engine's log-probs and the policy's: a constant weight of a token's loss.

An engine with other kernels, another precision or older weights samples from another distribution than the one that the
update takes for the old policy; the importance weight between both makes up for that. Owns the weights, and an estimate
of the gap. Must not know what the weights multiply.

Shapes: N response tokens of S whole samples, one after the other; `sample_N` whose they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_cppo.algo.contrastive import k3
from megatron_cppo.algo.policy_loss import MAX_LOG_RATIO

Level = Callable[[Tensor, Tensor], Tensor]
"""(log ratios [N], `sample_N`) -> the log of each token's weight, [N]."""
Cut = Callable[[Tensor, float], tuple[Tensor, Tensor]]
"""(weights [N], bound) -> weights that stay within the bound, and which were cut."""


def _of_token(log_ratio_N: Tensor, sample_N: Tensor) -> Tensor:
    return log_ratio_N


def _of_sequence(log_ratio_N: Tensor, sample_N: Tensor) -> Tensor:
    """The sum over the token's sample: in float64, as samples are long, and without atomics, whose order is chance."""
    _, length_S = torch.unique_consecutive(sample_N, return_counts=True)
    sums = [sample.sum(dtype=torch.float64) for sample in log_ratio_N.split(length_S.tolist())]
    return torch.stack(sums).repeat_interleave(length_S).to(log_ratio_N.dtype)


def _truncate(weight_N: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    return weight_N.clamp(max=bound), weight_N > bound


def _mask(weight_N: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    out_N = (weight_N > bound) | (weight_N < 1 / bound)
    return weight_N.masked_fill(out_N, 0.0), out_N


CORRECTIONS: dict[str, tuple[Level, Cut]] = {
    "token_truncate": (_of_token, _truncate),
    "token_mask": (_of_token, _mask),
    "sequence_truncate": (_of_sequence, _truncate),
    "sequence_mask": (_of_sequence, _mask),
}


@torch.no_grad()
def correction_weights(
    old_logp_N: Tensor, behaviour_logp_N: Tensor, sample_N: Tensor, *, kind: str, bound: float
) -> tuple[Tensor, Tensor]:
    """(weight of each token's policy loss, whether it was cut), [N] each; no gradient flows through either.

    w = exp(old_logp − behaviour_logp) of the token, or with "sequence_..." exp of the sum over its sample's tokens; the
    exponent is in [−20, 20]. "..._truncate": min(w, bound), truncated importance sampling (F. Yao et al., "Your
    efficient RL framework secretly brings you off-policy RL training", 2025). "..._mask": w where 1/bound ≤ w ≤ bound,
    else 0 (IcePop of Ring-1T, arXiv 2510.18855). Both levels are those of verl's "rollout correction". Raises
    ValueError for an unknown `kind`, and for a bound that is not above 1.
    """
    if kind not in CORRECTIONS:
        raise ValueError(f"unknown correction {kind!r}; choose one of {', '.join(CORRECTIONS)}")
    if not bound > 1:
        raise ValueError(f"the bound of a correction must be > 1, got {bound}; 2.0 is usual")
    level, cut = CORRECTIONS[kind]
    log_weight_N = level(old_logp_N - behaviour_logp_N, sample_N)
    return cut(log_weight_N.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp(), bound)


@torch.no_grad()
def engine_kl(old_logp_N: Tensor, behaviour_logp_N: Tensor) -> Tensor:
    """Estimate of KL(engine‖policy) from each sampled token's log-probs, [N], in nats.

    k3, which is never negative (J. Schulman, "Approximating KL divergence", 2020), with the clamps of `contrastive.k3`;
    without them it is what verl logs as rollout_corr/k3_kl.
    """
    return k3(behaviour_logp_N, old_logp_N)
