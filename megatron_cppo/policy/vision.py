"""The vision tower, data-parallel inside the tensor-parallel group.

The tower is the Hugging Face module, replicated. The distinct images of a microbatch are dealt out over the TP ranks
by patch count; every rank gathers all features. A feature's gradient is already complete on every TP rank, so the
gather's backward is a slice, and the tower's parameter gradients are *summed* over TP after backward (`step.py`).
Legend: I images, P patches, C numbers of one patch, F image tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_cppo.types import ImageGrid, ImageKey

Pixels = Callable[[ImageKey], Tensor]
"""Processed patches [P, C] of an image, fp32."""


def deal(grids: Sequence[ImageGrid], num_ranks: int) -> list[list[int]]:
    """Which images each rank encodes: largest first, to the rank with the fewest patches so far."""
    loads, hands = [0] * num_ranks, [[] for _ in range(num_ranks)]
    for image in sorted(range(len(grids)), key=lambda i: -grids[i].num_patches):
        rank = min(range(num_ranks), key=loads.__getitem__)
        loads[rank] += grids[image].num_patches
        hands[rank].append(image)
    return hands


class _GatherFeatures(torch.autograd.Function):
    """[f, H] of this rank -> [ranks, longest, H] of all; backward: this rank's slice (gradients are complete)."""

    @staticmethod
    def forward(ctx: Any, mine_fH: Tensor, longest: int, group: dist.ProcessGroup) -> Tensor:
        ctx.rank, ctx.count = group.rank(), mine_fH.shape[0]
        padded = mine_fH.new_zeros(longest, mine_fH.shape[1])
        padded[: ctx.count] = mine_fH
        gathered = padded.new_empty(group.size() * longest, mine_fH.shape[1])
        dist.all_gather_into_tensor(gathered, padded, group=group)
        return gathered.unflatten(0, (group.size(), longest))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyrefly: ignore[bad-override]
        return grad[ctx.rank, : ctx.count], None, None


def encode(
    tower: nn.Module,
    images: Sequence[ImageKey],
    grids: Sequence[ImageGrid],
    *,
    pixels: Pixels,
    group: dist.ProcessGroup,
    trainable: bool,
) -> Tensor:
    """Features [F, H] of `images`, in their order, on every rank of `group`.

    Communicates: all ranks of the group enter, whether they hold images or not. A frozen tower runs without gradient.
    """
    hands = deal(grids, group.size())
    hand = hands[group.rank()]
    with torch.set_grad_enabled(trainable and torch.is_grad_enabled()):
        mine = _run(tower, [pixels(images[i]) for i in hand], [grids[i] for i in hand])
    if group.size() == 1:
        ordered = mine.split([grids[i].num_tokens for i in hand])
        return torch.cat([ordered[hand.index(i)] for i in range(len(images))])
    counts = [[grids[i].num_tokens for i in hand] for hand in hands]
    gathered = _GatherFeatures.apply(mine, max(sum(row) for row in counts), group)
    pieces: dict[int, Tensor] = {}
    for rank, hand in enumerate(hands):
        parts = gathered[rank, : sum(counts[rank])].split(counts[rank])
        pieces.update(zip(hand, parts, strict=True))
    return torch.cat([pieces[i] for i in range(len(images))])


def _run(tower: Any, pixels: Sequence[Tensor], grids: Sequence[ImageGrid]) -> Tensor:
    weight = next(tower.parameters())
    if not pixels:
        return weight.new_zeros(0, tower.config.out_hidden_size)
    pixels_PC = torch.cat(list(pixels)).to(weight)
    shape_I3 = torch.tensor([(g.frames, g.height, g.width) for g in grids], device=weight.device)
    return tower(pixels_PC, grid_thw=shape_I3).pooler_output
