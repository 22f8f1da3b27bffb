"""The mapping rules of Qwen's decoders; a family's `mapping` puts together those that it has.

Hugging Face names are those of `rules.py`: `model.layers...` whatever the checkpoint's prefix, and one name for each
matrix of each expert, however a checkpoint stacks them.
"""

from __future__ import annotations

from megatron_cppo.families.rules import Rule, join_qkv, join_rows, split_halves, split_qkv

_MEGATRON = "language_model.decoder.layers.{layer}."
_HF = "model.layers.{layer}."
_EXPERT = _MEGATRON + "mlp.experts.local_experts.{expert}."
_HF_EXPERT = _HF + "mlp.experts.{expert}."


def _qkv(kind: str) -> Rule:
    return Rule(
        f"{_MEGATRON}self_attention.linear_qkv.{kind}",
        tuple(f"{_HF}self_attn.{part}_proj.{kind}" for part in "qkv"),
        axis=0,
        join=join_qkv,
        split=split_qkv,
    )


EMBEDDINGS = (
    Rule("language_model.embedding.word_embeddings.weight", ("model.embed_tokens.weight",), axis=0, vocab=True),
    Rule("language_model.output_layer.weight", ("lm_head.weight",), axis=0, vocab=True),
    Rule("language_model.decoder.final_layernorm.weight", ("model.norm.weight",)),
)
ATTENTION = (
    Rule(
        _MEGATRON + "input_layernorm.weight",
        (_HF + "input_layernorm.weight",),
        stored=_MEGATRON + "self_attention.linear_qkv.layer_norm_weight",
    ),
    _qkv("weight"),
    Rule(_MEGATRON + "self_attention.linear_proj.weight", (_HF + "self_attn.o_proj.weight",), axis=1),
)
QKV_BIAS = _qkv("bias")
QK_NORM = (
    Rule(_MEGATRON + "self_attention.q_layernorm.weight", (_HF + "self_attn.q_norm.weight",)),
    Rule(_MEGATRON + "self_attention.k_layernorm.weight", (_HF + "self_attn.k_norm.weight",)),
)
DENSE_NETWORK = (
    Rule(
        _MEGATRON + "pre_mlp_layernorm.weight",
        (_HF + "post_attention_layernorm.weight",),
        stored=_MEGATRON + "mlp.linear_fc1.layer_norm_weight",
    ),
    Rule(
        _MEGATRON + "mlp.linear_fc1.weight",
        (_HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight"),
        axis=0,
        join=join_rows,
        split=split_halves,
    ),
    Rule(_MEGATRON + "mlp.linear_fc2.weight", (_HF + "mlp.down_proj.weight",), axis=1),
)
EXPERTS = (
    Rule(
        _MEGATRON + "pre_mlp_layernorm.weight",
        (_HF + "post_attention_layernorm.weight",),
        # Megatron-Core 0.16.1 without Transformer Engine asks for it as if the network were dense.
        also=_MEGATRON + "mlp.linear_fc1.layer_norm_weight",
    ),
    Rule(_MEGATRON + "mlp.router.weight", (_HF + "mlp.gate.weight",)),
    Rule(
        _EXPERT + "linear_fc1.weight",
        (_HF_EXPERT + "gate_proj.weight", _HF_EXPERT + "up_proj.weight"),
        axis=0,
        join=join_rows,
        split=split_halves,
        expert=True,
    ),
    Rule(_EXPERT + "linear_fc2.weight", (_HF_EXPERT + "down_proj.weight",), axis=1, expert=True),
)
