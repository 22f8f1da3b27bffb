"""Qwen3-VL's config.json. Standard library only."""

from __future__ import annotations

from typing import Any

from megatron_cppo import architecture
from megatron_cppo.architecture import ModelShape, VisionShape


def read(top: dict[str, Any], problems: list[str]) -> ModelShape:
    """The shape, with ones where `problems` were found."""
    text = architecture.text_fields(top, problems)
    return ModelShape(
        **architecture.language_numbers(top, text, problems),
        ffn_size=text.count("intermediate_size"),
        qk_norm=True,
        vision=vision_shape(top, problems),
    )


def vision_shape(top: dict[str, Any], problems: list[str]) -> VisionShape:
    """The tower, which the model with experts shares."""
    fields = architecture.vision_fields(top, problems)
    numbers, deepstack = architecture.vision_numbers(fields), fields.counts("deepstack_visual_indexes", 0)
    positions = fields.count("num_position_embeddings")
    return VisionShape(
        **numbers,
        deepstack_depths=deepstack,
        num_parameters=_tower_parameters(**numbers, num_positions=positions, num_mergers=1 + len(deepstack)),
    )


def _tower_parameters(
    *,
    depth: int,
    hidden_size: int,
    ffn_size: int,
    out_size: int,
    patch_size: int,
    temporal_patch_size: int,
    merge_size: int,
    num_positions: int,
    num_mergers: int,
    **_: int,
) -> int:
    """Layer norms, biased attention and network; learned positions; mergers, of which the first norms patches."""
    h, f, merged = hidden_size, ffn_size, hidden_size * merge_size**2
    block = 4 * h + 4 * h * h + 4 * h + 2 * h * f + f + h
    merger = merged * merged + merged + merged * out_size + out_size
    norms = 2 * h + 2 * merged * (num_mergers - 1)
    patches = (3 * temporal_patch_size * patch_size**2 + 1) * h
    return depth * block + num_mergers * merger + norms + patches + num_positions * h


def unknown_variants(top: dict[str, Any]) -> list[str]:
    """What the config asks for, and the policy would silently compute in another way."""
    text, problems = top.get("text_config", top), architecture.unknown_language(top)
    problems += architecture.unknown_activation("vision", top["vision_config"], "gelu_pytorch_tanh")
    if text.get("attention_bias"):
        problems.append("attention_bias is true, only false is supported; use another checkpoint")
    if not architecture.rope_values(text).get("mrope_interleaved", True):
        problems.append("mrope_interleaved is false, only true is supported; use another checkpoint")
    time, *others = architecture.rope_values(text)["mrope_section"]
    if any(section > time for section in others):
        problems.append(
            f"mrope_section {[time, *others]} gives height or width more pairs than time, which cannot take turns with "
            "them; use another checkpoint"
        )
    return problems
