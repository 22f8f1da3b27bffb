"""Multimodal rotary positions: those of the dense Qwen3-VL."""

from megatron_cppo.families.qwen3_vl.positions import rope_positions

__all__ = ["rope_positions"]
