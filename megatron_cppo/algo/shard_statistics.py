"""What one rank can say about its vocabulary shard of a token's logits, and how many such words become one.

Owns the arithmetic of vocab-parallel log-probabilities, entropies and KL divergences, for a token under one or several
views: the sums over some columns, the algebra that merges them (over tiles of columns, splits of a kernel's grid, and
ranks alike), and the coefficients of the gradient. `shard_kernels_torch` and `shard_kernels_triton` do the passes over
columns. It neither communicates nor knows where the logits come from.

With z = (x − max x)/T, p of the first view and q of another, every quantity is a sum over columns that can be rebased
to another maximum:

    tail  = Σ exp(z) without the maximum     log S = log1p(tail)
    slope = Σ exp(z_p)·z_p                   H = log S_p − slope/S_p
    cross = Σ exp(z_p)·(z_p − z_q)           KL(p‖q) = cross/S_p − (log S_p − log S_q)

No raw logit enters a sum, so an offset of the logits costs no precision; and keeping the maximum (whose term is exactly
1) out of the tail keeps entropies of 1e-6 nat accurate to a relative 1e-5, which the perception mask ranks by.

Shapes: N rows (tokens), W views of each, K = W − 1 of them perturbed, V columns of this shard, R parts that are merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

# Stands for −∞ where it gets multiplied: exp(FLOOR) = 0 and 0·FLOOR = 0, while 0·(−∞) is NaN.
FLOOR = -1e30
# The maximum of columns of which none may be sampled: finite, so that nothing minus it is NaN.
LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True, slots=True)
class Shard:
    """Vocabulary columns of one rank (all, or a tile of them), and the temperature that divides every logit.

    Column 0 is the vocabulary's id `start`; columns from `num_valid` on are padding; `banned` lists the columns that
    sampling may not produce.

    >>> shard = Shard.of_rank(1, world_size=2, width=8, vocab_size=13, temperature=1.0, banned_ids=(3, 9))
    >>> shard
    Shard(start=8, num_valid=5, banned=(1,), inverse_temperature=1.0)
    >>> shard.tile(1, 4)
    Shard(start=9, num_valid=3, banned=(0,), inverse_temperature=1.0)
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

    def tile(self, first: int, end: int) -> Shard:
        """The columns from `first` up to `end`, all of them valid, as a shard of their own."""
        assert 0 <= first < end <= self.num_valid, f"columns {first} to {end} of {self.num_valid}"
        banned = tuple(column - first for column in self.banned if first <= column < end)
        return Shard(self.start + first, end - first, banned, self.inverse_temperature)

    def columns_of(self, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        """Each target's column (0 where another rank holds it), and whether this rank may count it as its own."""
        columns_N = targets_N - self.start
        owned_N = (columns_N >= 0) & (columns_N < self.num_valid)
        return columns_N.where(owned_N, 0), owned_N


@dataclass(frozen=True, slots=True)
class Coefficients:
    """The gradient of the loss in a token's logits, as numbers of the token (float32 or float64).

        ∂L/∂x_p = exp(z_p)·(constant + slope·z_p + Σ_k cross_k·(z_p − z_k)) + target_0·1[j = t]
        ∂L/∂x_k = own_k·exp(z_k) − cross_k·exp(z_p) + target_k·1[j = t]

    `slope_N` or `cross_KN` is None where the loss uses no entropy or no divergence; that saves passes over the logits.
    """

    maximum_WN: Tensor
    constant_N: Tensor
    slope_N: Tensor | None
    cross_KN: Tensor | None
    own_KN: Tensor
    target_WN: Tensor

    def rows(self, rows: slice) -> Coefficients:
        """Those of some of the tokens."""
        return Coefficients(
            self.maximum_WN[:, rows],
            self.constant_N[rows],
            None if self.slope_N is None else self.slope_N[rows],
            None if self.cross_KN is None else self.cross_KN[:, rows],
            self.own_KN[:, rows],
            self.target_WN[:, rows],
        )


def statistics_dtype(logits: Tensor) -> torch.dtype:
    """float64 for float64, else float32: the precision that statistics and their gradients are computed in."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def merge(sums_RW4N: Tensor, inverse_temperature: float) -> Tensor:
    """Sums over several sets of columns → the sums over all of them, [W, 4, N]. Associative.

    Sums are (maximum, tail, slope, target logit) of the first view, (maximum, tail, cross, target logit) of the others;
    a target logit is −∞ where the target is none of the columns.
    """
    if sums_RW4N.shape[0] == 1:
        return sums_RW4N[0]
    maximum_RWN, tail_RWN, moment_RWN, target_RWN = sums_RW4N.unbind(2)
    maximum_WN, winner_WN = maximum_RWN.max(0)
    gap_RWN = ((maximum_RWN - maximum_WN) * inverse_temperature).clamp(min=FLOOR)
    weight_RWN = gap_RWN.exp()
    peak_RWN = (maximum_RWN > LOWEST).to(tail_RWN.dtype)
    # Only the maximum of the whole row stays out of the tail; those of the other parts go in.
    others_RWN = tail_RWN + peak_RWN.scatter(0, winner_WN[None], 0.0)
    tail_WN = (weight_RWN * others_RWN).sum(0)
    # A cross sum is rebased in both of its views; a slope is one with a second view that is 0 everywhere.
    own_gap_RWN = torch.cat([torch.zeros_like(gap_RWN[:, :1]), gap_RWN[:, 1:]], dim=1)
    total_R1N = (tail_RWN + peak_RWN)[:, :1]
    moment_WN = (weight_RWN[:, :1] * (moment_RWN + (gap_RWN[:, :1] - own_gap_RWN) * total_R1N)).sum(0)
    return torch.stack([maximum_WN, tail_WN, moment_WN, target_RWN.amax(0)], dim=1)


def finish(sums_W4N: Tensor, inverse_temperature: float) -> Tensor:
    """The sums over the whole vocabulary → statistics [W, 4, N]: (maximum, log S, log-prob of the target, then the
    entropy of the first view and KL(first‖view) of the others), in nats.
    """
    maximum_WN, tail_WN, moment_WN, target_WN = sums_W4N.unbind(1)
    log_sum_WN = tail_WN.log1p()
    logp_WN = (target_WN - maximum_WN) * inverse_temperature - log_sum_WN
    mean_WN = moment_WN / (1 + tail_WN[:1])
    entropy_1N = log_sum_WN[:1] - mean_WN[:1]
    kl_KN = mean_WN[1:] - (log_sum_WN[:1] - log_sum_WN[1:])
    return torch.stack([maximum_WN, log_sum_WN, logp_WN, torch.cat([entropy_1N, kl_KN])], dim=1)


def coefficients(
    statistics_W4N: Tensor,
    logp_grad_WN: Tensor,
    entropy_grad_N: Tensor | None,
    kl_grad_KN: Tensor | None,
    inverse_temperature: float,
) -> Coefficients:
    """The gradient of the loss in the logits, from its gradients in the statistics.

    ∂log p_t/∂x_j = (1[j = t] − p_j)/T, ∂H/∂x_j = −p_j (log p_j + H)/T, ∂KL/∂x_j = p_j (log p_j − log q_j − KL)/T and
    ∂KL/∂y_j = (q_j − p_j)/T, with p_j = exp(z_j)/S.
    """
    maximum_WN, log_sum_WN, _, last_WN = statistics_W4N.unbind(1)
    scale_WN = inverse_temperature * torch.exp(-log_sum_WN)
    constant_N, slope_N, cross_KN, own_KN = -logp_grad_WN[0], None, None, -logp_grad_WN[1:]
    if entropy_grad_N is not None:
        constant_N = constant_N - entropy_grad_N * (last_WN[0] - log_sum_WN[0])
        slope_N = -entropy_grad_N * scale_WN[0]
    if kl_grad_KN is not None:
        constant_N = constant_N - (kl_grad_KN * (last_WN[1:] + log_sum_WN[:1] - log_sum_WN[1:])).sum(0)
        cross_KN = kl_grad_KN * scale_WN[0]
        own_KN = own_KN + kl_grad_KN
    return Coefficients(
        maximum_WN,
        constant_N * scale_WN[0],
        slope_N,
        cross_KN,
        own_KN * scale_WN[1:],
        logp_grad_WN * inverse_temperature,
    )


@lru_cache(maxsize=4096)
def banned_columns(shard: Shard, device: torch.device) -> Tensor:
    """`shard.banned` on a device; kept, as a copy from the host would have a GPU wait."""
    return torch.tensor(shard.banned, device=device)


def sums_of_no_columns(num_views: int, targets_N: Tensor, dtype: torch.dtype) -> Tensor:
    """What a shard of nothing but padding contributes, [W, 4, N]."""
    row = torch.tensor([LOWEST, 0.0, 0.0, -torch.inf], dtype=dtype, device=targets_N.device)
    return row[None, :, None].repeat(num_views, 1, targets_N.numel())
