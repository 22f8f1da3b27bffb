"""Packed (THD) causal attention: on a GPU Transformer Engine's, elsewhere this file's, on PyTorch's SDPA.

With context parallelism a rank holds some tokens of every segment (`split.py`). Here keys and values are gathered from
all context ranks, so that its queries see all that is before them; the gather's backward adds up what the ranks found.
Legend: T tokens of the row, C those of this context rank, S segments + 1, B pieces of one bucket, Q their longest run
of queries, K of keys, h heads, d head size.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_cppo.config import ConfigError
from megatron_cppo.policy.split import Places, context_tokens

WASTE = 1.5
"""The longest piece of a bucket has at most this many times the keys of its shortest."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Pieces of about equal length that attend together, padded at their ends with their last token.

    `visible_BQK` is None where the pieces are whole segments: causal masking then hides what was padded.
    """

    queries_BQ: Tensor
    keys_BK: Tensor
    visible_BQK: Tensor | None


@dataclass(frozen=True, slots=True)
class Deepstack:
    """Vision features [F, H] to be added to the hidden states at `places_F`, after one decoder layer."""

    places_F: Tensor
    features_FH: Tensor


@dataclass
class Segments(PackedSeqParams):
    """What the decoder's layers are told of a packed row. Made once per microbatch, used by every layer.

    Megatron-Core's own fields describe the row as one segment, as its rope code slices the angles once per segment,
    layer, query and key, and the row's angles are made for the tokens as they lie. `kernel` describes the true ones,
    for Transformer Engine. `output_C` finds every token's output among the buckets' outputs, laid end to end.
    """

    kernel: PackedSeqParams | None = None
    buckets: tuple[Bucket, ...] = ()
    output_C: Tensor | None = None
    deepstack: tuple[Deepstack, ...] = ()


def segments(
    cu_seqlens_S: Tensor, max_seqlen: int, context: dist.ProcessGroup, device: torch.device, *, kernels: bool = False
) -> Segments:
    """Parameters of a packed row for this context rank; with `kernels` for Transformer Engine's. No communication."""
    starts = cu_seqlens_S.numpy().astype(np.int64)
    # On the host: Megatron-Core asks for these lengths in every layer.
    whole = torch.tensor([0, starts[-1]], dtype=torch.int32)
    cu_seqlens = cu_seqlens_S.to(device)
    common: dict[str, Any] = {"qkv_format": "thd", "max_seqlen_q": max_seqlen, "max_seqlen_kv": max_seqlen}
    kernel = PackedSeqParams(cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, **common)
    if context.size() > 1:
        kernel.cu_seqlens_q_padded = kernel.cu_seqlens_kv_padded = cu_seqlens
    common |= {"cu_seqlens_q": whole, "cu_seqlens_kv": whole}
    if kernels:
        return Segments(**common, kernel=kernel)
    buckets, output_C = _buckets(starts, context.rank(), context.size(), device)
    return Segments(**common, kernel=kernel, buckets=buckets, output_C=output_C)


def _buckets(starts: Places, rank: int, size: int, device: torch.device) -> tuple[tuple[Bucket, ...], Tensor]:
    """A rank's pieces, in buckets, and where each of its tokens finds its output.

    A piece is a run of queries with all keys of its segment up to its last query: a segment, or one of its two chunks.
    """
    gathered_T = np.concatenate([context_tokens(starts, r, size) for r in range(size)]) if size > 1 else None
    key_at_T = np.argsort(gathered_T) if gathered_T is not None else np.arange(starts[-1])
    chunks_of_rank = (rank, 2 * size - 1 - rank) if size > 1 else (0,)
    parts = 2 * size if size > 1 else 1
    first_key, first_query, num_queries = [], [], []
    for start, length in zip(starts[:-1], np.diff(starts), strict=True):
        for chunk in chunks_of_rank:
            first_key.append(start)
            first_query.append(start + chunk * (length // parts))
            num_queries.append(length // parts)
    keys_at, queries_at, queries = (np.array(values) for values in (first_key, first_query, num_queries))
    keys = queries_at + queries - keys_at  # up to the piece's last query
    local_at = np.cumsum(queries) - queries
    order = np.argsort(keys, kind="stable")
    buckets, output, offset, first = [], np.empty(queries.sum(), dtype=np.int64), 0, 0
    while first < len(order):
        last = first
        while last < len(order) and keys[order[last]] <= max(WASTE * keys[order[first]], 1):
            last += 1
        chosen = order[first:last]
        query = np.arange(queries[chosen].max())
        inside = query[None, :] < queries[chosen][:, None]
        rows = local_at[chosen][:, None] + np.minimum(query[None, :], queries[chosen][:, None] - 1)
        output[rows[inside]] = offset + np.flatnonzero(inside.reshape(-1))
        key = np.arange(keys[chosen].max())
        columns = keys_at[chosen][:, None] + np.minimum(key[None, :], keys[chosen][:, None] - 1)
        visible = None
        if size > 1:
            reach = (queries_at - keys_at)[chosen][:, None] + query[None, :]
            visible = torch.from_numpy(key[None, None, :] <= reach[:, :, None]).to(device)
        buckets.append(
            Bucket(torch.from_numpy(rows).to(device), torch.from_numpy(key_at_T[columns]).to(device), visible)
        )
        offset += rows.size
        first = last
    return tuple(buckets), torch.from_numpy(output).to(device)


class PackedAttention(nn.Module):
    """Causal self-attention within each segment of a packed row; grouped queries; exact; any context parallelism."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: object,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **_: object,
    ) -> None:
        super().__init__()
        assert attention_type == "self", f"PackedAttention is for self-attention, got {attention_type!r}"
        self.softmax_scale = softmax_scale
        self.context: dist.ProcessGroup = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: Segments,
        **_: object,
    ) -> Tensor:
        """query [C, h, d], key and value [C, h_kv, d] -> [C, h * d]. Communicates over CP."""
        if self.context.size() > 1:
            key, value = _GatherTokens.apply(torch.stack([key, value], dim=1), self.context).unbind(1)
        outputs = []
        for bucket in packed_seq_params.buckets:
            q = _rows(query, bucket.queries_BQ)
            out = nn.functional.scaled_dot_product_attention(
                q,
                _rows(key, bucket.keys_BK),
                _rows(value, bucket.keys_BK),
                attn_mask=None if bucket.visible_BQK is None else bucket.visible_BQK[:, None],
                is_causal=bucket.visible_BQK is None,
                scale=self.softmax_scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
            outputs.append(out.transpose(1, 2).reshape(bucket.queries_BQ.numel(), -1))
        stacked = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        assert packed_seq_params.output_C is not None, "the segments were made for Transformer Engine"
        return stacked.index_select(0, packed_seq_params.output_C)


def _rows(tokens: Tensor, rows_BR: Tensor) -> Tensor:
    """[tokens, h, d] -> [B, h, R, d]."""
    return tokens.index_select(0, rows_BR.reshape(-1)).unflatten(0, rows_BR.shape).transpose(1, 2)


class _GatherTokens(torch.autograd.Function):
    """[C, ...] of this context rank -> [T, ...] of all, rank after rank; backward: the ranks' sum, this rank's part."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.count = group, mine.shape[0]
        gathered = mine.new_empty(group.size() * mine.shape[0], *mine.shape[1:])
        dist.all_gather_into_tensor(gathered, mine.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyrefly: ignore[bad-override]
        mine = grad.new_empty(ctx.count, *grad.shape[1:])
        dist.reduce_scatter_tensor(mine, grad.contiguous(), group=ctx.group)
        return mine, None


def transformer_engine_attention() -> type[nn.Module]:
    """Transformer Engine's attention, told of a row's true segments. Raises ConfigError where it is not installed."""
    if importlib.util.find_spec("transformer_engine") is None:
        raise ConfigError(
            "policy.attention: on cuda the default is Transformer Engine's, which is not installed; "
            "pip install 'transformer-engine[pytorch]', or use --policy.attention torch"
        )
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    class KernelAttention(TEDotProductAttention):
        def forward(self, *args: Any, packed_seq_params: Segments, **kwargs: Any) -> Tensor:
            return super().forward(*args, packed_seq_params=packed_seq_params.kernel, **kwargs)

    return KernelAttention
