"""What one rank can say about its vocabulary shard of a row of logits, and how the ranks' words become one.

Owns the arithmetic of vocab-parallel log-probabilities, entropies and KL divergences: the local sums, the algebra that
merges them over shards, and the local gradients. It neither communicates nor knows where the logits come from.

With z = (x − max x)/T, every quantity is a sum over columns that can be rebased to another maximum:

    tail = Σ exp(z) without the maximum      log S = log1p(tail)
    slope = Σ exp(z)·z                       H = log S − slope/S
    cross = Σ exp(z_p)·(z_p − z_q)           KL(p‖q) = cross/S_p − (log S_p − log S_q)

No raw logit enters a sum, so an offset of the logits costs no precision; and keeping the maximum (whose term is exactly
1) out of the tail keeps entropies of 1e-6 nat accurate to a relative 1e-5, which the perception mask ranks by.

Shapes: N rows (tokens), V columns of this shard, R ranks, K statistics per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Stands for −∞ where it gets multiplied: exp(FLOOR) = 0 and 0·FLOOR = 0, while 0·(−∞) is NaN.
FLOOR = -1e30
# The maximum of a shard in which no column may be sampled: finite, so that nothing minus it is NaN.
LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True, slots=True)
class Shard:
    """The vocabulary columns of one rank, and the temperature that divides every logit.

    Column 0 is the vocabulary's id `start`; columns from `num_valid` on are padding; `banned` lists the columns that
    sampling may not produce.

    >>> Shard.of_rank(1, world_size=2, width=8, vocab_size=13, temperature=1.0, banned_ids=(3, 9))
    Shard(start=8, num_valid=5, banned=(1,), inverse_temperature=1.0)
    """

    start: int
    num_valid: int
    banned: tuple[int, ...]
    inverse_temperature: float

    @classmethod
    def of_rank(
        cls, rank: int, *, world_size: int, width: int, vocab_size: int, temperature: float, banned_ids: Sequence[int]
    ) -> Shard:
        """The shard of `rank` among `world_size` shards of `width` columns each; ValueError if they cannot be."""
        if not 1 <= vocab_size <= world_size * width:
            raise ValueError(
                f"vocab_size {vocab_size} does not fit {world_size} shards of {width} columns; "
                f"give the number of real tokens, between 1 and {world_size * width}"
            )
        if temperature <= 0:
            raise ValueError(f"temperature must be > 0, got {temperature}; 1.0 leaves the logits as they are")
        start = rank * width
        num_valid = max(0, min(width, vocab_size - start))
        banned = tuple(sorted({i - start for i in banned_ids if 0 <= i - start < num_valid}))
        return cls(start, num_valid, banned, 1.0 / temperature)

    def columns_of(self, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        """Each target's column (0 where another rank holds it), and whether this rank may count it as its own."""
        columns_N = targets_N - self.start
        owned_N = (columns_N >= 0) & (columns_N < self.num_valid)
        return columns_N.where(owned_N, 0), owned_N

    def forbid_(self, x_NV: Tensor, value: float) -> Tensor:
        """Overwrite the banned columns in place, whatever they hold."""
        if self.banned:
            x_NV.index_fill_(1, torch.tensor(self.banned, device=x_NV.device), value)
        return x_NV


def statistics_dtype(logits: Tensor) -> torch.dtype:
    """float64 for float64, else float32: the precision that statistics and their gradients are computed in."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def token_sums(x_NV: Tensor, targets_N: Tensor, shard: Shard) -> Tensor:
    """The local (maximum, tail, slope, target logit) of each row, [4, N]; overwrites `x_NV`, the valid columns."""
    if shard.num_valid == 0:
        return _sums_of_no_columns(x_NV, [LOWEST, 0.0, 0.0, -torch.inf])
    shard.forbid_(x_NV, -torch.inf)
    columns_N, owned_N = shard.columns_of(targets_N)
    target_N = x_NV.gather(1, columns_N[:, None]).squeeze(1).where(owned_N, -torch.inf)
    maximum_N, weight_NV, tail_N = _exponentials(x_NV, shard)
    slope_N = x_NV.mul_(weight_NV).sum(-1)
    return torch.stack([maximum_N, tail_N, slope_N, target_N])


def merge_token_sums(sums_R4N: Tensor, inverse_temperature: float) -> Tensor:
    """All ranks' `token_sums` → the row's (maximum, log S, log-prob of the target, entropy), [4, N]."""
    maximum_RN, tail_RN, slope_RN, target_RN = sums_R4N.unbind(1)
    maximum_N, gap_RN, tail_N, total_RN = _merge_tails(maximum_RN, tail_RN, inverse_temperature)
    slope_N = (gap_RN.exp() * (slope_RN + gap_RN * total_RN)).sum(0)
    log_sum_N = tail_N.log1p()
    logp_N = (target_RN.amax(0) - maximum_N) * inverse_temperature - log_sum_N
    entropy_N = log_sum_N - slope_N / (1 + tail_N)
    return torch.stack([maximum_N, log_sum_N, logp_N, entropy_N])


def token_gradient(
    x_NV: Tensor,
    targets_N: Tensor,
    merged_4N: Tensor,
    logp_grad_N: Tensor,
    entropy_grad_N: Tensor | None,
    shard: Shard,
) -> Tensor:
    """The loss's gradient in the valid columns' logits; overwrites `x_NV`. No entropy gradient saves two passes.

    ∂log p_t/∂x_j = (1[j = t] − p_j)/T and ∂H/∂x_j = −p_j (log p_j + H)/T.
    """
    maximum_N, log_sum_N, _, entropy_N = merged_4N
    logp_NV = _log_probabilities(x_NV, maximum_N, log_sum_N, shard)
    if entropy_grad_N is None:
        gradient_NV = logp_NV.exp_().mul_(-logp_grad_N[:, None])
    else:
        p_NV = logp_NV.exp()
        gradient_NV = logp_NV.add_(entropy_N[:, None]).mul_(-entropy_grad_N[:, None]).sub_(logp_grad_N[:, None])
        gradient_NV.mul_(p_NV)
    columns_N, owned_N = shard.columns_of(targets_N)
    if shard.num_valid > 0:
        gradient_NV.scatter_add_(1, columns_N[:, None], logp_grad_N.where(owned_N, 0.0)[:, None])
    # A banned target has no log-probability to raise.
    return shard.forbid_(gradient_NV.mul_(shard.inverse_temperature), 0.0)


def divergence_sums(x_NV: Tensor, y_NV: Tensor, shard: Shard) -> Tensor:
    """The local (maximum_p, tail_p, maximum_q, tail_q, cross) of each row, [5, N]; overwrites both arguments."""
    if shard.num_valid == 0:
        return _sums_of_no_columns(x_NV, [LOWEST, 0.0, LOWEST, 0.0, 0.0])
    maximum_q_N, _, tail_q_N = _exponentials(shard.forbid_(y_NV, -torch.inf), shard)
    maximum_p_N, weight_NV, tail_p_N = _exponentials(shard.forbid_(x_NV, -torch.inf), shard)
    cross_N = x_NV.sub_(y_NV).mul_(weight_NV).sum(-1)
    return torch.stack([maximum_p_N, tail_p_N, maximum_q_N, tail_q_N, cross_N])


def merge_divergence_sums(sums_R5N: Tensor, inverse_temperature: float) -> Tensor:
    """All ranks' `divergence_sums` → the row's (maximum_p, log S_p, maximum_q, log S_q, KL(p‖q)), [5, N]."""
    maximum_p_RN, tail_p_RN, maximum_q_RN, tail_q_RN, cross_RN = sums_R5N.unbind(1)
    maximum_p_N, gap_p_RN, tail_p_N, total_RN = _merge_tails(maximum_p_RN, tail_p_RN, inverse_temperature)
    maximum_q_N, gap_q_RN, tail_q_N, _ = _merge_tails(maximum_q_RN, tail_q_RN, inverse_temperature)
    cross_N = (gap_p_RN.exp() * (cross_RN + (gap_p_RN - gap_q_RN) * total_RN)).sum(0)
    log_sum_p_N, log_sum_q_N = tail_p_N.log1p(), tail_q_N.log1p()
    kl_N = cross_N / (1 + tail_p_N) - (log_sum_p_N - log_sum_q_N)
    return torch.stack([maximum_p_N, log_sum_p_N, maximum_q_N, log_sum_q_N, kl_N])


def divergence_gradients(
    x_NV: Tensor, y_NV: Tensor, merged_5N: Tensor, kl_grad_N: Tensor, shard: Shard
) -> tuple[Tensor, Tensor]:
    """The loss's gradients in p's and in q's valid columns; overwrites both arguments.

    ∂KL/∂x_j = p_j (log p_j − log q_j − KL)/T and ∂KL/∂y_j = (q_j − p_j)/T.
    """
    maximum_p_N, log_sum_p_N, maximum_q_N, log_sum_q_N, kl_N = merged_5N
    logp_NV = _log_probabilities(x_NV, maximum_p_N, log_sum_p_N, shard)
    logq_NV = _log_probabilities(y_NV, maximum_q_N, log_sum_q_N, shard)
    scale_N1 = (kl_grad_N * shard.inverse_temperature)[:, None]
    p_NV = logp_NV.exp()
    gradient_p_NV = logp_NV.sub_(logq_NV).sub_(kl_N[:, None]).mul_(p_NV).mul_(scale_N1)
    gradient_q_NV = logq_NV.exp_().sub_(p_NV).mul_(scale_N1)
    return shard.forbid_(gradient_p_NV, 0.0), shard.forbid_(gradient_q_NV, 0.0)


def _shifted_(x: Tensor, maximum: Tensor, inverse_temperature: float) -> Tensor:
    """(x − maximum)/T in place, −∞ replaced by FLOOR; dividing first would round the logits and their maximum apart."""
    return x.sub_(maximum).mul_(inverse_temperature).clamp_(min=FLOOR)


def _exponentials(x_NV: Tensor, shard: Shard) -> tuple[Tensor, Tensor, Tensor]:
    """(maximum, exp(z), tail) of rows that become z in place."""
    maximum_N, argmax_N = x_NV.max(-1)
    maximum_N = maximum_N.clamp(min=LOWEST)
    weight_NV = _shifted_(x_NV, maximum_N[:, None], shard.inverse_temperature).exp()
    argmax_N1 = argmax_N[:, None]
    peak_N1 = weight_NV.gather(1, argmax_N1)
    tail_N = weight_NV.scatter_(1, argmax_N1, 0.0).sum(-1)
    return maximum_N, weight_NV.scatter_(1, argmax_N1, peak_N1), tail_N


def _sums_of_no_columns(x_N0: Tensor, values: list[float]) -> Tensor:
    """What a shard of nothing but padding contributes."""
    return x_N0.new_tensor(values)[:, None].repeat(1, x_N0.shape[0])


def _merge_tails(
    maximum_RN: Tensor, tail_RN: Tensor, inverse_temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(maximum, each shard's gap below it, tail) of the whole row, and each shard's Σ exp(z) before rebasing."""
    maximum_N, winner_N = maximum_RN.max(0)
    gap_RN = _shifted_(maximum_RN.clone(), maximum_N, inverse_temperature)
    peak_RN = (maximum_RN > LOWEST).to(tail_RN.dtype)
    # Only the maximum of the whole row stays out of the tail; the other shards' maxima go in.
    others_RN = tail_RN + peak_RN.scatter(0, winner_N[None], 0.0)
    return maximum_N, gap_RN, (gap_RN.exp() * others_RN).sum(0), tail_RN + peak_RN


def _log_probabilities(x_NV: Tensor, maximum_N: Tensor, log_sum_N: Tensor, shard: Shard) -> Tensor:
    """Log-probabilities in place of the logits; FLOOR where there is none."""
    shard.forbid_(x_NV, -torch.inf)
    return _shifted_(x_NV, maximum_N[:, None], shard.inverse_temperature).sub_(log_sum_N[:, None])
