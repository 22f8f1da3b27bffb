"""The decoder of Qwen3-VL in the words of Megatron-Core's TransformerConfig."""

from __future__ import annotations

from typing import Any

from megatron_cppo.architecture import ModelShape
from megatron_cppo.families.qwen2_5_vl import decoder as older


def settings(shape: ModelShape) -> dict[str, Any]:
    """What TransformerConfig must say of this family, beyond sizes."""
    return older.settings(shape) | {"add_qkv_bias": False, "qk_layernorm": True}


def rope_axes(shape: ModelShape) -> list[int]:
    """Which position (0 time, 1 height, 2 width) each frequency pair of a head follows: time, height, width in turn.

    Height and width have as many pairs as their section says; time has those, and all that are left at the end.
    Source: Qwen3-VL (arXiv 2511.21631), section 2, "Interleaved MRoPE".
    """
    axes = [0] * (shape.head_size // 2)
    for axis in (1, 2):
        for turn in range(shape.mrope_section[axis]):
            axes[axis + 3 * turn] = axis
    return axes
