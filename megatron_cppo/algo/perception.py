"""Which response tokens read the image: the perception mask of CPPO (arXiv 2601.00501), from entropies of two views.

Owns the ranking of tokens within their samples. It must not know where entropies come from, what the gate is, or which
loss uses the mask. There is no gradient.

Shapes: N response tokens of whole samples, in any order; `sample_id_N` says whose token it is, by any integers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Keeps the relative score finite where the model has no doubt at all.
EPSILON = 1e-6


def _relative(shift_N: Tensor, entropy_removing_N: Tensor) -> Tensor:
    return shift_N.relu() / (entropy_removing_N + EPSILON)


def _absolute(shift_N: Tensor, entropy_removing_N: Tensor) -> Tensor:
    return shift_N.relu()


RANKINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"relative": _relative, "absolute": _absolute}

# The change of both entropies that it takes to move a score by a gap. Changes of at most ε nats move a relative score
# s = ΔH/R, R = H_removing + 1e-6, by at most ε(2 − s)/(R − ε), and an absolute one by at most 2ε.
SCORE_TO_NATS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "relative": lambda gap_N, score_N, entropy_N: gap_N * (entropy_N + EPSILON) / (2 - score_N + gap_N),
    "absolute": lambda gap_N, score_N, entropy_N: gap_N / 2,
}


@torch.no_grad()
def perception_scores(entropy_original_N: Tensor, entropy_removing_N: Tensor, *, rank_by: str = "relative") -> Tensor:
    """How much of a token's doubt comes from losing the image, [N]: relu(ΔH)/(H_removing + 1e-6), or relu(ΔH) in nats.

    ΔH = H_removing − H_original. Raises ValueError for a `rank_by` other than "relative" and "absolute".
    """
    if rank_by not in RANKINGS:
        raise ValueError(f"unknown rank_by {rank_by!r}; choose one of {', '.join(RANKINGS)}")
    return RANKINGS[rank_by](entropy_removing_N - entropy_original_N, entropy_removing_N)


@torch.no_grad()
def perception_mask(
    entropy_original_N: Tensor,
    entropy_removing_N: Tensor,
    sample_id_N: Tensor,
    *,
    top_fraction: float = 0.5,
    min_entropy_shift: float = 0.0,
    rank_by: str = "relative",
) -> Tensor:
    """The tokens of highest score of each sample, [N] bool, among those whose entropy rises when the image is removed.

    A token is a candidate if ΔH > 0 and ΔH ≥ `min_entropy_shift` (nats). A sample with c > 0 candidates keeps the
    k = max(1, floor(`top_fraction`·c)) best, and all that tie with the k-th. Raises ValueError for a `top_fraction`
    outside (0, 1], a negative `min_entropy_shift` or an unknown `rank_by`.
    """
    score_N = perception_scores(entropy_original_N, entropy_removing_N, rank_by=rank_by)
    candidate_N = _candidates(entropy_removing_N - entropy_original_N, min_entropy_shift)
    lowest_kept_N, _ = _boundary(score_N, candidate_N, sample_id_N, top_fraction)
    return candidate_N & (score_N >= lowest_kept_N)


@torch.no_grad()
def mask_margin(
    entropy_original_N: Tensor,
    entropy_removing_N: Tensor,
    sample_id_N: Tensor,
    *,
    top_fraction: float = 0.5,
    min_entropy_shift: float = 0.0,
    rank_by: str = "relative",
) -> Tensor:
    """How safe a mask is: no change of the entropies by less than this many nats can flip a token of it; a scalar.

    It is the least over tokens of the change that could carry ΔH across the candidates' threshold, or a candidate's
    score across the middle of the gap between its sample's lowest kept and highest dropped score. A tie at the
    k-th place gives 0, no tokens +∞. Errors as `perception_mask`.
    """
    score_N = perception_scores(entropy_original_N, entropy_removing_N, rank_by=rank_by)
    shift_N = entropy_removing_N - entropy_original_N
    candidate_N = _candidates(shift_N, min_entropy_shift)
    lowest_kept_N, highest_dropped_N = _boundary(score_N, candidate_N, sample_id_N, top_fraction)
    gap_N = (score_N - (lowest_kept_N + highest_dropped_N) / 2).abs()
    by_rank_N = SCORE_TO_NATS[rank_by](gap_N, score_N, entropy_removing_N)
    decided_by_rank_N = candidate_N & highest_dropped_N.isfinite()
    candidacy_N = (shift_N - min_entropy_shift).abs() / 2
    no_limit = shift_N.new_full((1,), torch.inf)
    return torch.cat([no_limit, candidacy_N, by_rank_N[decided_by_rank_N]]).amin()


def _candidates(shift_N: Tensor, min_entropy_shift: float) -> Tensor:
    if min_entropy_shift < 0:
        raise ValueError(f"min_entropy_shift must be ≥ 0 nats, got {min_entropy_shift}; 0 admits every rise")
    return (shift_N > 0) & (shift_N >= min_entropy_shift)


def _boundary(score_N: Tensor, candidate_N: Tensor, sample_id_N: Tensor, top_fraction: float) -> tuple[Tensor, Tensor]:
    """For each token, the k-th and the (k+1)-th highest score of its sample's candidates; −∞ where there is none."""
    if not 0 < top_fraction <= 1:
        raise ValueError(f"top_fraction must be in (0, 1], got {top_fraction}; 0.5 keeps the better half")
    _, sample_N, length_S = torch.unique(sample_id_N, return_inverse=True, return_counts=True)
    candidate_score_N = score_N.masked_fill(~candidate_N, -torch.inf)
    # Sample by sample, best first: the later sort is stable, so it keeps the order of the earlier.
    best_first_N = candidate_score_N.argsort(descending=True)
    best_first_N = best_first_N[sample_N[best_first_N].argsort(stable=True)]
    ranked_N = torch.cat([candidate_score_N[best_first_N], score_N.new_full((1,), -torch.inf)])

    num_candidates_S = torch.zeros_like(length_S).index_add(0, sample_N, candidate_N.long())
    num_kept_S = (top_fraction * num_candidates_S.double()).floor().long().clamp(min=1)
    first_S = length_S.cumsum(0) - length_S
    lowest_kept_S = ranked_N[first_S + num_kept_S - 1]
    next_S = ranked_N[first_S + num_kept_S].where(num_kept_S < num_candidates_S, -torch.inf)
    return lowest_kept_S[sample_N], next_S[sample_N]
