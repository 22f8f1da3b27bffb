"""The head: token statistics from the last hidden states of a row, on vocabulary shards; what an objective calls.

An objective names rows by their place in the whole row and gets all their values, whatever the layout: under context
parallelism each rank computes the rows that it holds, and a few floats per row are gathered.
Legend: C tokens of this context rank, H hidden size, V vocabulary of this shard, N rows asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from torch import Tensor

from megatron_cppo.algo.vocab_parallel import linear_divergence, linear_statistics
from megatron_cppo.policy.model import VisionLanguageModel
from megatron_cppo.policy.split import Share, Split
from megatron_cppo.types import MicroBatch


@dataclass(frozen=True, slots=True)
class HeadSettings:
    """What turns logits into the distribution that was sampled from, and what computes with it."""

    temperature: float
    banned_ids: tuple[int, ...]
    backend: str


class Head:
    """Token statistics from the hidden states of one row.

    The hidden states enter the TP region once: its backward sums the ranks' partial gradients, by one collective.
    """

    def __init__(self, model: VisionLanguageModel, row: MicroBatch, hidden_L1H: Tensor, settings: HeadSettings) -> None:
        group = model.groups.tensor
        if model.config.sequence_parallel:
            hidden_C1H = tensor_parallel.gather_from_sequence_parallel_region(hidden_L1H, group=group)
        else:
            hidden_C1H = tensor_parallel.copy_to_tensor_model_parallel_region(hidden_L1H, group=group)
        self.hidden_CH = hidden_C1H[:, 0]
        self.weight_VH = model.head_weight()
        self.device = self.hidden_CH.device
        self._context = model.groups.context
        self._split = None
        if self._context.size() > 1:
            self._split = Split.of(row.cu_seqlens_S, model.groups, sequence_parallel=model.config.sequence_parallel)
        common: dict[str, Any] = {
            "group": group,
            "vocab_size": model.shape.vocab_size,
            "temperature": settings.temperature,
            "banned_ids": settings.banned_ids,
            "backend": settings.backend,
        }
        self._statistics = partial(linear_statistics, **common)
        self._divergence = partial(linear_divergence, **common)

    def statistics(self, rows_N: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs of `targets_N` and entropies, [N] fp32, predicted at positions `rows_N` of the row.

        Communicates over TP, then over CP.
        """
        if self._split is None:
            return self._statistics(self.hidden_CH.index_select(0, rows_N), self.weight_VH, targets_N)
        share = self.share(rows_N)
        chosen = self._statistics(
            self.hidden_CH.index_select(0, share.local_n), self.weight_VH, targets_N[share.chosen_n]
        )
        logp_N, entropy_N = share.whole(torch.stack(chosen)).unbind(0)
        return logp_N, entropy_N

    def divergence(self, rows_N: Tensor, other_rows_N: Tensor, *, stop_gradient_other: bool) -> Tensor:
        """Exact KL [N] between the distributions at `rows_N` and at `other_rows_N`. Communicates as `statistics`.

        Under CP the two rows of a pair must be on one rank: so are a token's rows under two views, as its segments are
        equally long.
        """
        divergence = partial(self._divergence, stop_gradient_q=stop_gradient_other)
        if self._split is None:
            p_NH, q_NH = self.hidden_CH.index_select(0, rows_N), self.hidden_CH.index_select(0, other_rows_N)
            return divergence(p_NH, q_NH, self.weight_VH)
        share, other = self.share(rows_N), self.share(other_rows_N)
        assert (share.rank_N == other.rank_N).all(), "the rows of a pair are on two context ranks"
        p_nH, q_nH = (self.hidden_CH.index_select(0, part.local_n) for part in (share, other))
        return share.whole(divergence(p_nH, q_nH, self.weight_VH)[None])[0]

    def share(self, rows_N: Tensor) -> Share:
        """Which of `rows_N` this context rank computes."""
        assert self._split is not None, "there is one context rank, which computes all rows"
        return Share.of(self._split, rows_N, self._context, self.device)
