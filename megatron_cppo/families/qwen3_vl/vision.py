"""The vision tower of Qwen3-VL: learned positions, full attention, deepstack features."""

import torch
from torch import nn
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from megatron_cppo.families import towers


def tower(model_path: str, *, device: torch.device) -> nn.Module:
    """The tower of a checkpoint, uninitialised weights, in fp32."""
    return towers.build(Qwen3VLVisionModel, model_path, device=device)
