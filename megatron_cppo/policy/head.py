"""The head: token statistics from the last hidden states of a row, on vocabulary shards; what an objective calls.

An objective names rows by their place in the whole row and gets all their values, whatever the layout: under context
parallelism each rank computes the rows that it holds, and a few floats per row are gathered. Places from the row's end
on name rows that an earlier pass without gradient has left behind (`Remembered`), ordered as `MicroBatch.constants`.
Legend: T tokens of the row, C those of this context rank, H hidden size, V vocabulary of this shard, N rows asked for,
n those of them that this context rank holds, K other views.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from torch import Tensor

from megatron_cppo.algo.vocab_parallel import linear_statistics, linear_view_statistics
from megatron_cppo.policy.model import VisionLanguageModel
from megatron_cppo.policy.split import Share, Split
from megatron_cppo.types import VIEWS, MicroBatch, View


@dataclass(frozen=True, slots=True)
class HeadSettings:
    """What turns logits into the distribution that was sampled from, and what computes with it.

    The weight's gradient goes straight into Megatron-Core's fp32 buffer, where there is one, so that none of the head's
    size is made, or rounded, beside it; with `hooked` it takes autograd's way, where hooks see it.
    """

    temperature: float
    banned_ids: tuple[int, ...]
    backend: str
    hooked: bool = False


@dataclass(frozen=True, slots=True)
class Remembered:
    """The hidden rows [n, H] of a sample's response tokens under one view that this context rank holds, and which
    context rank holds each of its N tokens; constants."""

    hidden_nH: Tensor
    rank_N: Tensor


Memory = Mapping[tuple[int, View], Remembered]
"""By sample (its index in the step) and view."""
NOTHING: Memory = {}


class Head:
    """Token statistics from the hidden states of one row, and from what `memory` holds of its samples.

    The hidden states enter the TP region once: its backward sums the ranks' partial gradients, by one collective.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        row: MicroBatch,
        hidden_L1H: Tensor,
        settings: HeadSettings,
        memory: Memory = NOTHING,
    ) -> None:
        group = model.groups.tensor
        if model.config.sequence_parallel:
            hidden_C1H = tensor_parallel.gather_from_sequence_parallel_region(hidden_L1H, group=group)
        else:
            hidden_C1H = tensor_parallel.copy_to_tensor_model_parallel_region(hidden_L1H, group=group)
        self.hidden_CH = hidden_C1H[:, 0]
        self.weight_VH = model.head_weight()
        self.device = self.hidden_CH.device
        self._context = model.groups.context
        remembered = [memory[key] for key in row.constants]
        self._constant_RH = torch.cat([part.hidden_nH for part in remembered]) if remembered else None
        self._split = None
        if self._context.size() > 1:
            self._split = Split.of(row.cu_seqlens_S, model.groups, sequence_parallel=model.config.sequence_parallel)
            self._split = self._split.followed_by([part.rank_N for part in remembered], self._context)
        common: dict[str, Any] = {
            "group": group,
            "vocab_size": model.shape.vocab_size,
            "temperature": settings.temperature,
            "banned_ids": settings.banned_ids,
            "backend": settings.backend,
            "weight_total_VH": None if settings.hooked else getattr(self.weight_VH, "main_grad", None),
        }
        self._statistics = partial(linear_statistics, **common)
        self._view_statistics = partial(linear_view_statistics, **common)

    def statistics(self, rows_N: Tensor, targets_N: Tensor, *, num_constant: int = 0) -> tuple[Tensor, Tensor]:
        """Log-probs of `targets_N` and entropies, [N] fp32, predicted at positions `rows_N` of the row.

        The last `num_constant` rows are constants: no gradient flows through them, and they cost nothing backward.
        Communicates over TP, then over CP.
        """
        if self._split is None:
            hidden_NH = self._hidden(rows_N, num_constant)
            return self._statistics(hidden_NH, self.weight_VH, targets_N, num_constant=num_constant)
        share = self.share(rows_N)
        num_constant = int((share.rank_N[len(rows_N) - num_constant :] == self._context.rank()).sum())
        hidden_nH = self._hidden(share.local_n, num_constant)
        targets_n = targets_N[share.chosen_n]
        chosen = self._statistics(hidden_nH, self.weight_VH, targets_n, num_constant=num_constant)
        logp_N, entropy_N = share.whole(torch.stack(chosen)).unbind(0)
        return logp_N, entropy_N

    def divergences(self, rows_N: Tensor, others: Sequence[Tensor], *, constant_others: bool) -> Tensor:
        """Exact KL [K, N] between the distributions at `rows_N` and at each of K other rows [N] of the same tokens.

        Communicates as `statistics`, once for all. Under CP a token's rows must be on one rank: so they are under all
        views, as its segments are equally long.
        """
        if self._split is None:
            return self._divergences(rows_N, others, constant_others)
        share, other_shares = self.share(rows_N), [self.share(rows) for rows in others]
        assert all((other.rank_N == share.rank_N).all() for other in other_shares), "a token is on two context ranks"
        return share.whole(self._divergences(share.local_n, [o.local_n for o in other_shares], constant_others))

    def keep(self, row: MicroBatch) -> Iterator[tuple[tuple[int, View], Remembered]]:
        """What `memory` holds of a row: every sample's response rows under the perturbed views that it carries."""
        counts = torch.bincount(row.sample_N, minlength=len(row.sample_ids)).tolist()
        for view, rows_N in zip(VIEWS[1:], (row.rows_preserving_N, row.rows_removing_N), strict=True):
            for index, rows_n in zip(row.sample_ids, rows_N.split(counts), strict=True):
                if index < 0 or (rows_n < 0).any():
                    continue
                if self._split is None:
                    local_n, rank_N = rows_n.to(self.device), torch.zeros_like(rows_n)
                else:
                    share = self.share(rows_n)
                    local_n, rank_N = share.local_n, torch.from_numpy(share.rank_N)
                yield (index, view), Remembered(self.hidden_CH.detach().index_select(0, local_n), rank_N)

    def share(self, rows_N: Tensor) -> Share:
        """Which of `rows_N` this context rank computes."""
        assert self._split is not None, "there is one context rank, which computes all rows"
        return Share.of(self._split, rows_N, self._context, self.device)

    def _divergences(self, places_n: Tensor, others: Sequence[Tensor], constant_others: bool) -> Tensor:
        hiddens = [self._hidden(places_n, 0), *(self._hidden(o, len(o) if constant_others else 0) for o in others)]
        no_targets_n = torch.full_like(places_n, -1)
        return self._view_statistics(hiddens, self.weight_VH, no_targets_n, stop_gradient_views=constant_others).kl_KN

    def _hidden(self, places_n: Tensor, num_constant: int) -> Tensor:
        """Hidden rows at local places, of which the last `num_constant` are remembered where anything is."""
        if self._constant_RH is None or num_constant == 0:
            return self.hidden_CH.index_select(0, places_n)
        differentiable_n, constant_n = places_n.split([len(places_n) - num_constant, num_constant])
        constant_nH = self._constant_RH.index_select(0, constant_n - len(self.hidden_CH))
        return torch.cat([self.hidden_CH.index_select(0, differentiable_n), constant_nH])
