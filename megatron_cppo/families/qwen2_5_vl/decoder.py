"""The decoder of Qwen2.5-VL in the words of Megatron-Core's TransformerConfig."""

from __future__ import annotations

from typing import Any

from torch import nn

from megatron_cppo.architecture import ModelShape


def settings(_: ModelShape) -> dict[str, Any]:
    """What TransformerConfig must say of this family, beyond sizes."""
    return {
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": nn.functional.silu,
        "add_bias_linear": False,
        "add_qkv_bias": True,
    }


def rope_axes(shape: ModelShape) -> list[int]:
    """Which position (0 time, 1 height, 2 width) each frequency pair of a head follows: consecutive sections.

    Source: Qwen2-VL (arXiv 2409.12191), section 2.1.
    """
    return [section % 3 for section, length in enumerate(shape.mrope_section) for _ in range(length)]
