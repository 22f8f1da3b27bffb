"""The parts of a decoder layer that stock Megatron-Core lacks without Transformer Engine.

Packed (THD) causal attention on PyTorch's SDPA, an RMS norm that works with sequence parallelism, m-rope angles.
Legend: T tokens of the packed row, S segments, B segments of one bucket, L its longest segment, h heads, d head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

WASTE = 1.5
"""A bucket's longest segment is at most this many times its shortest."""


@dataclass
class Segments(PackedSeqParams):
    """Packed sequence parameters, with the segments already sorted into buckets of about equal length.

    `padded_BL` are the rows of the packed row that each bucket gathers; `unpadded_T` finds every token's output again
    among all the buckets' outputs, laid end to end. Made once per microbatch, used by every layer.
    """

    padded_BL: tuple[Tensor, ...] = ()
    unpadded_T: Tensor | None = None


def segments(cu_seqlens_S: Tensor, max_seqlen: int, device: torch.device) -> Segments:
    """Parameters of a packed row for `PackedAttention`.

    Rotary angles cover the whole row, so Megatron's rope code is told of one segment, [0, T], through the `padded`
    lengths: it would else slice the row once per segment, layer, query and key.
    """
    starts = cu_seqlens_S.numpy()
    lengths = np.diff(starts)
    order = np.argsort(lengths, kind="stable")
    padded, unpadded, offset, first = [], np.empty(starts[-1], dtype=np.int64), 0, 0
    while first < len(order):
        last = first
        while last < len(order) and lengths[order[last]] <= max(WASTE * lengths[order[first]], 1):
            last += 1
        chosen = order[first:last]
        longest = int(lengths[chosen[-1]])
        columns = np.arange(longest)
        inside = columns[None, :] < lengths[chosen][:, None]
        rows = starts[chosen][:, None] + np.minimum(columns[None, :], lengths[chosen][:, None] - 1)
        unpadded[rows[inside]] = offset + np.flatnonzero(inside.reshape(-1))
        padded.append(torch.from_numpy(rows).to(device))
        offset += rows.size
        first = last
    whole = torch.tensor([0, starts[-1]], dtype=torch.int32, device=device)
    cu_seqlens = cu_seqlens_S.to(device)
    upstream: dict[str, Any] = {
        "qkv_format": "thd",
        "cu_seqlens_q": cu_seqlens,
        "cu_seqlens_kv": cu_seqlens,
        "cu_seqlens_q_padded": whole,
        "cu_seqlens_kv_padded": whole,
        "max_seqlen_q": max_seqlen,
        "max_seqlen_kv": max_seqlen,
    }
    return Segments(**upstream, padded_BL=tuple(padded), unpadded_T=torch.from_numpy(unpadded).to(device))


class PackedAttention(nn.Module):
    """Causal self-attention within each segment of a packed row; grouped queries; exact.

    Segments are padded at their end only, inside buckets of about equal length: with a causal mask no valid query
    sees a padded key, so no mask tensor exists.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: object,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: object,
    ) -> None:
        super().__init__()
        assert attention_type == "self", f"PackedAttention is for self-attention, got {attention_type!r}"
        assert config.context_parallel_size == 1, f"context parallel size {config.context_parallel_size} is not 1"
        self.softmax_scale = softmax_scale

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
        """query [T, h, d], key and value [T, h_kv, d] -> [T, h * d]."""
        outputs = []
        for rows_BL in packed_seq_params.padded_BL:
            shape = rows_BL.shape
            q, k, v = (
                x.index_select(0, rows_BL.reshape(-1)).unflatten(0, shape).transpose(1, 2) for x in (query, key, value)
            )
            out = nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
            )
            outputs.append(out.transpose(1, 2).reshape(shape.numel(), -1))
        stacked = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        assert packed_seq_params.unpadded_T is not None, "the segments carry no bucket indices"
        return stacked.index_select(0, packed_seq_params.unpadded_T)


class RMSNorm(nn.RMSNorm):
    """torch's RMS norm, marked for Megatron-Core's gradient all-reduce over TP under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object) -> None:
        super().__init__(hidden_size, eps=eps)
        weight: Any = self.weight
        weight.sequence_parallel = config.sequence_parallel


def decoder_spec(num_layers: int) -> TransformerBlockSubmodules:
    """The modules of a stage of `num_layers`: Megatron-Core's local ones, with this file's attention and norm."""
    layer: ModuleSpec = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    layer.submodules.self_attention.submodules.core_attention = PackedAttention
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)


def rope_angles(positions_3T: Tensor, *, head_size: int, theta: float, section: tuple[int, ...]) -> Tensor:
    """m-rope angles [T, 1, 1, head_size] fp32 of a whole packed row, in the layout of Megatron's unfused rope.

    Frequency pair i of the head turns with the time, height or width position according to `section`, whose parts
    are consecutive (Qwen2.5-VL; Wang et al. 2024, arXiv 2409.12191).
    """
    exponent = torch.arange(0, head_size, 2, dtype=torch.float32, device=positions_3T.device) / head_size
    angles_3TF = positions_3T[..., None].float() * theta**-exponent
    parts = angles_3TF.split(section, dim=-1)
    half = torch.cat([part[axis % 3] for axis, part in enumerate(parts)], dim=-1)
    return torch.cat([half, half], dim=-1)[:, None, None, :]
