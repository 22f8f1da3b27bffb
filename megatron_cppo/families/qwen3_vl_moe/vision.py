"""The vision tower: that of the dense Qwen3-VL, as transformers' class for this family."""

import torch
from torch import nn
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeVisionModel

from megatron_cppo.families import towers


def tower(model_path: str, *, device: torch.device) -> nn.Module:
    """The tower of a checkpoint, uninitialised weights, in fp32."""
    return towers.build(Qwen3VLMoeVisionModel, model_path, device=device)
