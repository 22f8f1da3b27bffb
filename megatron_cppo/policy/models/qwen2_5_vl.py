"""Qwen2.5-VL: Hugging Face vision tower, Megatron-Core decoder with m-rope, and the mapping between the two worlds."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from megatron_cppo.policy.mapping import Rule, join_qkv, join_rows, split_halves, split_qkv

_MEGATRON = "language_model.decoder.layers.{layer}."
_HF = "model.layers.{layer}."
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

RULES = (
    Rule("visual.{rest}", ("visual.{rest}",)),
    Rule("language_model.embedding.word_embeddings.weight", ("model.embed_tokens.weight",), axis=0, vocab=True),
    Rule("language_model.output_layer.weight", ("lm_head.weight",), axis=0, vocab=True),
    Rule("language_model.decoder.final_layernorm.weight", ("model.norm.weight",)),
    Rule(_MEGATRON + "input_layernorm.weight", (_HF + "input_layernorm.weight",)),
    Rule(_MEGATRON + "pre_mlp_layernorm.weight", (_HF + "post_attention_layernorm.weight",)),
    Rule(
        _MEGATRON + "self_attention.linear_qkv.weight",
        tuple(f"{_HF}{part}.weight" for part in _QKV),
        axis=0,
        join=join_qkv,
        split=split_qkv,
    ),
    Rule(
        _MEGATRON + "self_attention.linear_qkv.bias",
        tuple(f"{_HF}{part}.bias" for part in _QKV),
        axis=0,
        join=join_qkv,
        split=split_qkv,
    ),
    Rule(_MEGATRON + "self_attention.linear_proj.weight", (_HF + "self_attn.o_proj.weight",), axis=1),
    Rule(
        _MEGATRON + "mlp.linear_fc1.weight",
        (_HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight"),
        axis=0,
        join=join_rows,
        split=split_halves,
    ),
    Rule(_MEGATRON + "mlp.linear_fc2.weight", (_HF + "mlp.down_proj.weight",), axis=1),
)

DECODER = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": nn.functional.silu,
    "add_bias_linear": False,
    "add_qkv_bias": True,
}
"""What Megatron-Core's TransformerConfig must say of this family, beyond sizes."""


def vision_tower(model_path: str, *, device: torch.device) -> nn.Module:
    """The Hugging Face vision tower of the checkpoint, uninitialised weights, in fp32."""
    config = AutoConfig.from_pretrained(model_path, local_files_only=True).vision_config
    with torch.device(device):
        return Qwen2_5_VisionTransformerPretrainedModel._from_config(config, attn_implementation="sdpa")
