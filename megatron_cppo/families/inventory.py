"""The tensors that a model's config.json promises: official Hugging Face names and sizes, without any weights.

What a checkpoint must hold, no more and no less. The decoder's follow from the shape; the vision tower's are asked of
Hugging Face's module, built without memory.
"""

from __future__ import annotations

import torch

from megatron_cppo import families
from megatron_cppo.architecture import ModelShape

Sizes = dict[str, tuple[int, ...]]


def tensors(shape: ModelShape, folder: str) -> Sizes:
    """All tensors of the model in `folder` (of which config.json is read), in the order of the model."""
    return vision_tensors(shape, folder) | language_tensors(shape)


def vision_tensors(shape: ModelShape, folder: str) -> Sizes:
    """The vision tower's."""
    tower = families.part(shape.family, "vision").tower(folder, device=torch.device("meta"))
    return {f"visual.{name}": tuple(parameter.shape) for name, parameter in tower.named_parameters()}


def language_tensors(shape: ModelShape) -> Sizes:
    """Embeddings, decoder layers and head; of experts each matrix by itself."""
    h = shape.hidden_size
    found: Sizes = {"model.embed_tokens.weight": (shape.vocab_size, h)}
    for layer in range(shape.num_layers):
        found |= {f"model.layers.{layer}.{name}": size for name, size in _layer(shape).items()}
    found["model.norm.weight"] = (h,)
    if not shape.tied:
        found["lm_head.weight"] = (shape.vocab_size, h)
    return found


def _layer(shape: ModelShape) -> Sizes:
    h, f, d = shape.hidden_size, shape.ffn_size, shape.head_size
    rows = {"q": shape.num_heads * d, "k": shape.num_kv_heads * d, "v": shape.num_kv_heads * d}
    found: Sizes = {"input_layernorm.weight": (h,)}
    found |= {f"self_attn.{part}_proj.weight": (size, h) for part, size in rows.items()}
    if shape.qkv_bias:
        found |= {f"self_attn.{part}_proj.bias": (size,) for part, size in rows.items()}
    found["self_attn.o_proj.weight"] = (h, rows["q"])
    if shape.qk_norm:
        found |= {f"self_attn.{part}_norm.weight": (d,) for part in "qk"}
    found["post_attention_layernorm.weight"] = (h,)
    network: Sizes = {"gate_proj.weight": (f, h), "up_proj.weight": (f, h), "down_proj.weight": (h, f)}
    if not shape.num_experts:
        return found | {f"mlp.{name}": size for name, size in network.items()}
    found["mlp.gate.weight"] = (shape.num_experts, h)
    for expert in range(shape.num_experts):
        found |= {f"mlp.experts.{expert}.{name}": size for name, size in network.items()}
    return found
