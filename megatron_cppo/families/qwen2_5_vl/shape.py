"""Qwen2.5-VL's config.json. Standard library only."""

from __future__ import annotations

from typing import Any

from megatron_cppo import architecture
from megatron_cppo.architecture import ModelShape, VisionShape

VISION_DEFAULTS = {"depth": 32, "num_heads": 16, "patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2}
"""What transformers takes for fields that config.json leaves out; the official files of 32B and 72B leave out these."""


def read(top: dict[str, Any], problems: list[str]) -> ModelShape:
    """The shape, with ones where `problems` were found."""
    text = architecture.text_fields(top, problems)
    fields = architecture.vision_fields(top, problems)
    fields.values = VISION_DEFAULTS | fields.values
    vision = architecture.vision_numbers(fields)
    language = architecture.language_numbers(top, text, problems)
    # transformers ties this family where either level says so: 4.x may leave the top level's field out.
    language["tied"] |= bool(text.values.get("tie_word_embeddings"))
    return ModelShape(
        **language,
        ffn_size=text.count("intermediate_size"),
        qkv_bias=True,
        vision=VisionShape(**vision, num_parameters=_tower_parameters(**vision)),
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
    **_: int,
) -> int:
    """RMS norms, biased attention, a biased gated network; a merger of two layers; patches without bias."""
    h, f, merged = hidden_size, ffn_size, hidden_size * merge_size**2
    block = 2 * h + 4 * h * h + 4 * h + 3 * h * f + 2 * f + h
    merger = h + merged * merged + merged + merged * out_size + out_size
    return depth * block + merger + 3 * temporal_patch_size * patch_size**2 * h


def unknown_variants(top: dict[str, Any]) -> list[str]:
    """What the config asks for, and the policy would silently compute in another way."""
    return architecture.unknown_language(top) + architecture.unknown_activation("vision", top["vision_config"], "silu")
