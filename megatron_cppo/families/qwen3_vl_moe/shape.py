"""Qwen3-VL-MoE's config.json. Standard library only."""

from __future__ import annotations

from typing import Any

from megatron_cppo import architecture
from megatron_cppo.architecture import ModelShape
from megatron_cppo.families.qwen3_vl import shape as dense


def read(top: dict[str, Any], problems: list[str]) -> ModelShape:
    """The shape, with ones where `problems` were found."""
    text = architecture.text_fields(top, problems)
    return ModelShape(
        **architecture.language_numbers(top, text, problems),
        ffn_size=text.count("moe_intermediate_size"),
        num_experts=text.count("num_local_experts" if "num_local_experts" in text.values else "num_experts"),
        experts_per_token=text.count("num_experts_per_tok"),
        qk_norm=True,
        vision=dense.vision_shape(top, problems),
    )


def unknown_variants(top: dict[str, Any]) -> list[str]:
    """What the config asks for, and the policy would silently compute in another way."""
    text, problems = top.get("text_config", top), dense.unknown_variants(top)
    if text.get("mlp_only_layers") or text.get("decoder_sparse_step", 1) != 1:
        problems.append("some layers have no experts; only models with experts in every layer are supported")
    if not text.get("norm_topk_prob", True):
        problems.append("norm_topk_prob is false, only true is supported; use another checkpoint")
    return problems
