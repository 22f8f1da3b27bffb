"""Qwen3-VL: Megatron-Core's parameters and Hugging Face's tensors, both directions."""

from megatron_cppo.families import qwen_decoder as qwen
from megatron_cppo.families.rules import Rule

RULES = (
    Rule("visual.{rest}", ("visual.{rest}",)),
    *qwen.EMBEDDINGS,
    *qwen.ATTENTION,
    *qwen.QK_NORM,
    *qwen.DENSE_NETWORK,
)
