"""The decoder layer: Megatron-Core's, with the parts that it lacks without Transformer Engine, and m-rope's angles.

Legend: T tokens of the packed row, C those of this context rank, f frequency pairs of a head.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from megatron_cppo.config import ConfigError
from megatron_cppo.policy.attention import PackedAttention, transformer_engine_attention


class RMSNorm(nn.RMSNorm):
    """torch's RMS norm, marked for Megatron-Core's gradient all-reduce over TP under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object) -> None:
        super().__init__(hidden_size, eps=eps)
        weight: Any = self.weight
        weight.sequence_parallel = config.sequence_parallel


class DecoderLayer(TransformerLayer):
    """Megatron-Core's layer, after which the first layers add deepstack features (arXiv 2406.04334).

    The features come with the row's parameters: several rows are on their way through a stage, and recomputation runs
    a layer again for one that is long past.
    """

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """As TransformerLayer's: hidden states and context."""
        hidden, context = super().forward(*args, **kwargs)
        deepstack = kwargs["packed_seq_params"].deepstack
        if self.layer_number <= len(deepstack):
            added = deepstack[self.layer_number - 1]
            hidden = hidden.index_add(0, added.places_F, added.features_FH[:, None].to(hidden.dtype))
        return hidden, context


def decoder_spec(config: TransformerConfig, num_layers: int, *, kernels: bool) -> TransformerBlockSubmodules:
    """The modules of a stage of `num_layers`: Megatron-Core's local ones, with this package's attention and norms.

    With `kernels` attention is Transformer Engine's, and with `config.fp8` the matrices are; raises ConfigError when it
    is not installed.
    """
    layer: ModuleSpec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=False,
        qk_layernorm=config.qk_layernorm,
        normalization="RMSNorm",
    )
    layer.module = DecoderLayer
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = transformer_engine_attention() if kernels else PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if config.num_moe_experts:
        _name_norm_as_transformer_engine_does(layer)
    if config.fp8:
        place_linears(layer, *transformer_engine_linears())
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)


def place_linears(layer: ModuleSpec, column: type, row: type) -> None:
    """Let `column` and `row` be the modules of the layer's matrices, its experts' too; not of the router."""
    attention, mlp = layer.submodules.self_attention.submodules, layer.submodules.mlp.submodules
    attention.linear_qkv, attention.linear_proj = column, row
    experts = getattr(mlp, "experts", None)
    matrices = mlp if experts is None else experts.submodules
    matrices.linear_fc1, matrices.linear_fc2 = column, row


def transformer_engine_linears() -> tuple[type, type]:
    """Transformer Engine's column- and row-parallel matrices: parameters are named, cut and reduced as Megatron-Core's.

    Not those that are fused with a norm, whose parameters have other names. Raises ConfigError where it is not
    installed.
    """
    if importlib.util.find_spec("transformer_engine") is None:
        raise ConfigError(
            "policy.precision: FP8 is computed by Transformer Engine, which is not installed; "
            "pip install 'transformer-engine[pytorch]', or use bf16"
        )
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

    return TEColumnParallelLinear, TERowParallelLinear


def _name_norm_as_transformer_engine_does(layer: ModuleSpec) -> None:
    """Megatron-Core 0.16.1 saves the norm before experts under another key with its local layers than with those of
    Transformer Engine: as if it were fused with a dense layer's first matrix, so that neither can load the other.
    """
    layer.submodules.sharded_state_dict_keys_map = {
        name: key
        for name, key in layer.submodules.sharded_state_dict_keys_map.items()
        if not name.startswith("pre_mlp_layernorm")
    }


def rope_angles(positions_3C: Tensor, *, head_size: int, theta: float, axes: Sequence[int]) -> Tensor:
    """m-rope angles [C, 1, 1, head_size] fp32 of a context rank's tokens, in the layout of Megatron's unfused rope.

    Frequency pair i of a head turns with the time, height or width position, as axes[i] says.
    """
    exponent_f = torch.arange(0, head_size, 2, dtype=torch.float32, device=positions_3C.device) / head_size
    positions_Cf = positions_3C[torch.tensor(axes, device=positions_3C.device)].t().float()
    half = positions_Cf * theta**-exponent_f
    return torch.cat([half, half], dim=-1)[:, None, None, :]


def where_rope_looks(angles_C: Tensor, context: dist.ProcessGroup) -> Tensor:
    """The angles of this context rank's tokens, in a tensor for the whole row, where Megatron-Core's rope will look.

    Megatron-Core 0.16.1 cuts a context rank's part out of a packed row's angles as if the row were one segment (and
    its multimodal rope cuts another time): the first and second halves of these angles are put where it cuts.
    """
    size, rank = context.size(), context.rank()
    if size == 1:
        return angles_C
    half, total = angles_C.shape[0] // 2, angles_C.shape[0] * size
    placed_T = angles_C.new_zeros(total, *angles_C.shape[1:])
    placed_T[rank * half : (rank + 1) * half] = angles_C[:half]
    placed_T[total - (rank + 1) * half : total - rank * half] = angles_C[half:]
    return placed_T
