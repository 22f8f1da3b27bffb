"""Which tokens of a packed row are on which rank: context parallelism, then sequence parallelism.

Under CP every segment is cut into 2 * CP equal chunks, of which rank r holds the r-th and the r-th from the end, so
that causal attention is about as much work everywhere; this is the order of Transformer Engine's packed attention. A
rank's tokens lie segment after segment. Sequence parallelism then cuts them into TP runs of equal length.
Legend: T tokens of the row, C those of a context rank, L those of a rank between the layers (C, or C / TP under
sequence parallelism), N rows asked for, n those of them that this context rank holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cppo.policy.groups import Groups

Places = npt.NDArray[np.int64]


def context_tokens(cu_seqlens_S: Places, rank: int, size: int) -> Places:
    """Places [C] in the row of the tokens that context rank `rank` of `size` holds, in the order of its hidden states.

    >>> context_tokens(np.array([0, 8, 12]), 0, 2).tolist()
    [0, 1, 6, 7, 8, 11]
    """
    starts, lengths = cu_seqlens_S[:-1], np.diff(cu_seqlens_S)
    chunks = lengths // (2 * size)
    assert (chunks * 2 * size == lengths).all(), f"segments of {lengths.tolist()} tokens cannot be cut into {2 * size}"
    return np.concatenate(
        [
            start + number * chunk + np.arange(chunk)
            for start, chunk in zip(starts, chunks, strict=True)
            for number in (rank, 2 * size - 1 - rank)
        ]
    )


@dataclass(frozen=True, slots=True)
class Split:
    """A row's tokens on this rank.

    `context_C` are the places in the row of the context rank's tokens, `mine_L` of those that it holds between layers.
    `rank_T` and `place_T` say of every token which context rank holds it, and where among that rank's tokens.
    """

    context_C: Tensor
    mine_L: Tensor
    rank_T: Tensor
    place_T: Tensor

    @staticmethod
    def of(cu_seqlens_S: Tensor, groups: Groups, *, sequence_parallel: bool) -> Split:
        """Of a row with these segments, on this rank. No communication."""
        starts, size = cu_seqlens_S.numpy().astype(np.int64), groups.context.size()
        every = [context_tokens(starts, rank, size) for rank in range(size)] if size > 1 else [np.arange(starts[-1])]
        rank_T, place_T = np.empty(starts[-1], np.int64), np.empty(starts[-1], np.int64)
        for rank, tokens in enumerate(every):
            rank_T[tokens], place_T[tokens] = rank, np.arange(len(tokens))
        context_C = mine_L = every[groups.context.rank()]
        if sequence_parallel:
            mine_L = context_C.reshape(groups.tensor.size(), -1)[groups.tensor.rank()]
        return Split(*(torch.from_numpy(array) for array in (context_C, mine_L, rank_T, place_T)))

    def followed_by(self, ranks: Sequence[Tensor], group: dist.ProcessGroup) -> Split:
        """This split with more tokens after the row's: `ranks` say which context rank holds each of them; every rank's
        lie behind its own tokens, in their order."""
        if not ranks:
            return self
        rank_M = torch.cat(list(ranks))
        place_M = torch.empty_like(rank_M)
        for rank in range(group.size()):
            mine_M = rank_M == rank
            place_M[mine_M] = len(self.context_C) + torch.arange(int(mine_M.sum()))
        rank_T, place_T = torch.cat([self.rank_T, rank_M]), torch.cat([self.place_T, place_M])
        return Split(self.context_C, self.mine_L, rank_T, place_T)

    def local(self, slots_F: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the places `slots_F` that this rank holds between layers: (indices into slots_F, local places)."""
        at_T = torch.full_like(self.rank_T, -1)
        at_T[self.mine_L] = torch.arange(len(self.mine_L))
        local_F = at_T[slots_F]
        chosen = torch.nonzero(local_F >= 0).squeeze(1)
        return chosen, local_F[chosen]


@dataclass(frozen=True, slots=True)
class Share:
    """Which of N rows of the row this context rank computes, and how the ranks' results become one again.

    `rank_N` says whose each row is. `chosen_n` are indices into the N rows, `local_n` their places among the context
    rank's hidden states. Every context rank ends with all N values, and computes the same loss from them; a gradient
    goes back to the rank whose row it is.
    """

    rank_N: Places
    chosen_n: Tensor
    local_n: Tensor
    order_N: Tensor
    most: int
    group: dist.ProcessGroup

    @staticmethod
    def of(split: Split, rows_N: Tensor, group: dist.ProcessGroup, device: torch.device) -> Share:
        """Of the rows `rows_N` of a row; the same rows on every rank of `group` (CP). No communication."""
        rows_N = rows_N.cpu()
        rank_N = split.rank_T[rows_N]
        counts = torch.bincount(rank_N, minlength=group.size())
        most = int(counts.max()) if len(rows_N) else 0
        # The i-th row of rank r will be at r * most + i of what is gathered.
        order_N = torch.empty_like(rank_N)
        for rank, count in enumerate(counts.tolist()):
            order_N[rank_N == rank] = rank * most + torch.arange(count)
        chosen_n = torch.nonzero(rank_N == group.rank()).squeeze(1)
        local_n = split.place_T[rows_N[chosen_n]]
        return Share(rank_N.numpy(), chosen_n.to(device), local_n.to(device), order_N.to(device), most, group)

    def whole(self, values_Kn: Tensor) -> Tensor:
        """[K, n] of this rank -> [K, N], the same on all ranks; one all-gather forward, nothing backward."""
        return _Gather.apply(values_Kn, self)


class _Gather(torch.autograd.Function):
    """All context ranks' values in the order of the rows; backward: this rank's own (all compute the same loss)."""

    @staticmethod
    def forward(ctx: Any, values_Kn: Tensor, share: Share) -> Tensor:
        ctx.chosen_n = share.chosen_n
        padded = values_Kn.new_zeros(share.most, values_Kn.shape[0])
        padded[: values_Kn.shape[1]] = values_Kn.t()
        gathered = padded.new_empty(share.group.size() * share.most, values_Kn.shape[0])
        if share.most:
            dist.all_gather_into_tensor(gathered, padded, group=share.group)
        return gathered[share.order_N].t().contiguous()

    @staticmethod
    def backward(ctx: Any, grad_KN: Tensor) -> tuple[Tensor, None]:  # pyrefly: ignore[bad-override]
        return grad_KN[:, ctx.chosen_n], None
