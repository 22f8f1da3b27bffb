"""What the families' vision towers have in common: Hugging Face's modules, with patches embedded by a matrix product.

Legend: I images, P patches, C numbers of one patch, D the tower's width, F image tokens, H hidden size, K deepstack
features.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig


class PatchProduct(nn.Module):
    """A patch embedding whose stride is its kernel, as the matrix product that it is.

    The parameters keep their names and shapes (`proj.weight` [D, channels, frames, height, width]). As a convolution
    it is slow in bf16 on several versions of cuDNN (github.com/huggingface/transformers, issues 45750 and 45041).
    """

    def __init__(self, proj: nn.Conv3d) -> None:
        super().__init__()
        assert proj.kernel_size == proj.stride, f"a patch of {proj.kernel_size} at a stride of {proj.stride}"
        self.proj = proj

    def forward(self, pixels_PC: Tensor) -> Tensor:
        """[P, C] -> [P, D]."""
        weight_DC = self.proj.weight.flatten(1)
        return nn.functional.linear(pixels_PC.to(weight_DC.dtype), weight_DC, self.proj.bias)


def build(kind: Any, model_path: str, *, device: torch.device) -> nn.Module:
    """The tower of class `kind` for a checkpoint's config.json: uninitialised weights, in fp32."""
    config = AutoConfig.from_pretrained(model_path, local_files_only=True).vision_config
    with torch.device(device):
        tower: Any = kind._from_config(config, attn_implementation="sdpa")
    tower.patch_embed = PatchProduct(tower.patch_embed.proj)
    return tower


def recompute(tower: Any) -> None:
    """Keep only the blocks' inputs of a forward pass, and compute the blocks again in backward."""
    for block in tower.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def features(tower: Any, pixels_PC: Tensor, shape_I3: Tensor) -> list[Tensor]:
    """[F, H] of the images, and K more of the same shape where the tower has deepstack features."""
    output = tower(pixels_PC, grid_thw=shape_I3)
    return [output.pooler_output, *getattr(output, "deepstack_features", ())]
