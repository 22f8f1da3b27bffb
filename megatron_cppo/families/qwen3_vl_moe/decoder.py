"""The decoder of Qwen3-VL-MoE: the dense one's, with a router and experts in every layer."""

from __future__ import annotations

from typing import Any

from megatron_cppo.architecture import ModelShape
from megatron_cppo.families.qwen3_vl import decoder as dense

rope_axes = dense.rope_axes


def settings(shape: ModelShape) -> dict[str, Any]:
    """What TransformerConfig must say of this family, beyond sizes.

    The chosen experts' weights are a softmax over their own scores alone, which is Hugging Face's softmax over all,
    cut to the chosen and divided by its sum. There is no auxiliary loss: it would pull the policy away from its
    rewards, and add a term of its own to the gradient norm.
    """
    return dense.settings(shape) | {
        "num_moe_experts": shape.num_experts,
        "moe_ffn_hidden_size": shape.ffn_size,
        "moe_router_topk": shape.experts_per_token,
        "moe_router_pre_softmax": False,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
    }
