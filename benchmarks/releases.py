"""CPPO's update the way that the authors' public implementations compute it (github.com/vbdi/cppo), as an objective.

- Every sample has all three views, forward and backward, whatever its advantage.
- Full-vocabulary fp32 logits of every token of every view, prompt included, and autograd's log_softmax over them:
  log-probs and entropies of the original and the removing view, log-probs of the preserving one.
- Every sample's images are encoded for itself.

The loss is CPPO's, with this package's per-token terms, so that value and gradient can be compared with the objective's
own; only how it is computed differs. Works on one rank (no tensor or context parallelism, no padding in a row).
Legend: T tokens of the row, t those of one view, V vocabulary, N response tokens, M masked ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_cppo.algo import contrastive, policy_loss
from megatron_cppo.algo.objective import Counts, Objective, Outcome, Tokens
from megatron_cppo.algo.perception import perception_mask
from megatron_cppo.config import AlgorithmConfig, PerceptionConfig
from megatron_cppo.types import VIEWS, Group, Sample, View


class MaterialisedHead:
    """Token statistics of whole views from logits that exist, under autograd.

    A row's tokens are told apart by view: a segment ends with the row that predicts its sample's last token.
    """

    def __init__(self, hidden_TH: Tensor, weight_VH: Tensor, tokens: Tokens) -> None:
        self.hidden_TH, self.weight_VH, self.targets_N = hidden_TH, weight_VH, tokens.targets_N
        self.rows: dict[View, Tensor] = {
            "original": tokens.rows_original_N,
            "preserving": tokens.rows_preserving_N,
            "removing": tokens.rows_removing_N,
        }
        last_N = torch.cat([tokens.sample_N.diff() > 0, torch.ones(1, dtype=torch.bool)])
        ends = torch.cat([self.rows[view][last_N] for view in VIEWS]) + 1
        order = ends.argsort()
        assert int(ends[order[-1]]) == hidden_TH.shape[0], "the row has padding, or a sample lacks a view"
        view_of_segment = torch.arange(len(VIEWS)).repeat_interleave(int(last_N.sum()))[order]
        self.view_T = view_of_segment[torch.searchsorted(ends[order], torch.arange(hidden_TH.shape[0]), right=True)]

    def statistics(self, view: View, *, entropy: bool) -> tuple[Tensor, Tensor | None]:
        """Log-probs of the response tokens under `view`, and entropies where they are asked for, [N]."""
        chosen_t = torch.nonzero(self.view_T == VIEWS.index(view)).squeeze(1)
        place_T = torch.empty_like(self.view_T)
        place_T[chosen_t] = torch.arange(chosen_t.numel())
        places_N = place_T[self.rows[view]]
        targets_t = torch.zeros_like(chosen_t).index_copy(0, places_N, self.targets_N)
        logits_tV = (self.hidden_TH[chosen_t] @ self.weight_VH.t()).float()
        logp_tV = torch.log_softmax(logits_tV, dim=-1)
        logp_t = logp_tV.gather(1, targets_t[:, None]).squeeze(1)
        entropy_t = -(logp_tV.exp() * logp_tV).sum(-1) if entropy else None
        return logp_t[places_N], None if entropy_t is None else entropy_t[places_N]


def loss(
    tokens: Tokens, head: Any, counts: Counts, algorithm: AlgorithmConfig, perception: PerceptionConfig
) -> Outcome:
    """The policy's loss and lambda * CPL of a row whose samples all have three views, gated by the advantage's sign.

    Temperature 1, no banned ids, no reference and no entropy bonus; divergences of the sampled token.
    """
    own = MaterialisedHead(head.hidden_CH, head.weight_VH, tokens)
    logp_N, entropy_N = own.statistics("original", entropy=True)
    logp_preserving_N, _ = own.statistics("preserving", entropy=False)
    logp_removing_N, entropy_removing_N = own.statistics("removing", entropy=True)
    assert entropy_N is not None, "the original view's entropies were asked for"
    assert entropy_removing_N is not None, "the removing view's entropies were asked for"
    mask_N = perception_mask(
        entropy_N.detach(),
        entropy_removing_N.detach(),
        tokens.sample_N,
        top_fraction=perception.top_fraction,
        min_entropy_shift=perception.min_entropy_shift,
        rank_by=perception.rank_by,
    ) & (tokens.advantage_N > 0)
    cpl_N = contrastive.contrastive_loss(
        contrastive.divergence(logp_N, logp_preserving_N, perception.divergence),
        contrastive.divergence(logp_N, logp_removing_N, perception.divergence),
        tau=perception.temperature,
    )
    cpl = contrastive.aggregate(
        cpl_N[mask_N],
        tokens.sample_N[mask_N],
        kind=perception.aggregation,
        num_gated_samples=counts.num_gated_samples,
        num_microbatches=counts.num_microbatches,
        num_masked_tokens=counts.num_masked_tokens,
    )
    value = _policy_loss(tokens, counts, algorithm, logp_N) + perception.coefficient * cpl
    return Outcome(value, logp_N=logp_N.detach(), entropy_N=entropy_N.detach(), mask_N=mask_N)


def _policy_loss(tokens: Tokens, counts: Counts, algorithm: AlgorithmConfig, logp_N: Tensor) -> Tensor:
    weight_N = tokens.weight_N * policy_loss.token_weights(
        tokens.length_N,
        kind=algorithm.aggregation,
        num_tokens=counts.num_tokens,
        num_samples=counts.num_samples,
        constant_length=counts.max_response_tokens,
    )
    clipped = policy_loss.clipped_surrogate(
        logp_N,
        logp_N.detach() if tokens.old_logp_N is None else tokens.old_logp_N,
        tokens.advantage_N,
        clip_low=algorithm.clip_low,
        clip_high=algorithm.clip_high,
        dual_clip=algorithm.dual_clip,
    )
    return (clipped.loss_N * weight_N).sum()


def _every_view(_: Sample) -> tuple[View, ...]:
    return VIEWS


RELEASES = Objective(loss, _every_view)


def with_own_images(groups: Sequence[Group]) -> list[Group]:
    """The same groups, each sample with images of its own: other keys, by the epoch, of the same pixels."""

    def alone(sample: Sample) -> Sample:
        return dataclasses.replace(sample, prompt=dataclasses.replace(sample.prompt, epoch=1 + sample.index))

    return [Group(group.prompt, tuple(map(alone, group.samples))) for group in groups]
