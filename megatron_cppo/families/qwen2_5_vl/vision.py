"""The vision tower of Qwen2.5-VL: windows of 112 pixels, and four blocks of full attention."""

import torch
from torch import nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from megatron_cppo.families import towers


def tower(model_path: str, *, device: torch.device) -> nn.Module:
    """The tower of a checkpoint, uninitialised weights, in fp32."""
    return towers.build(Qwen2_5_VisionTransformerPretrainedModel, model_path, device=device)
