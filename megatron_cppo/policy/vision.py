"""The vision tower, data-parallel inside the group of TP x CP ranks.

The tower is the Hugging Face module, replicated on the first stage. The distinct images of a row are dealt out over the
ranks by patch count; all ranks gather all features, and take those whose tokens they hold. A rank's gradient of the
features covers its own tokens, so the gather's backward adds up the ranks that cut the row (CP, and TP under sequence
parallelism; without it TP ranks hold the same tokens and the same gradient) and keeps the rank's own images. The
tower's parameter gradients are summed over TP after backward (`step.py`), and over CP by DDP.
Legend: I images, P patches, C numbers of one patch, F image tokens, H hidden size, K deepstack features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_cppo.families import towers
from megatron_cppo.types import VIEWS, ImageGrid, ImageKey

Pixels = Callable[[ImageKey], Tensor]
"""Processed patches [P, C] of an image, fp32."""
Encode = Callable[[Sequence[ImageKey], Sequence[ImageGrid]], Sequence[Tensor]]
"""Images and their grids -> features [F, 1 + K, H] of each."""
CACHED_BYTES = 2 * 2**30


def deal(patches: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Which images each rank encodes: largest first, to the rank with the fewest patches so far."""
    loads, hands = [0] * num_ranks, [[] for _ in range(num_ranks)]
    for image in sorted(range(len(patches)), key=lambda i: -patches[i]):
        rank = min(range(num_ranks), key=loads.__getitem__)
        loads[rank] += patches[image]
        hands[rank].append(image)
    return hands


def deal_for_good(images: Sequence[ImageKey], num_ranks: int) -> list[list[int]]:
    """Which images each rank encodes when features are kept: an image belongs to the same rank in every row."""
    hands: list[list[int]] = [[] for _ in range(num_ranks)]
    for number, key in enumerate(images):
        hands[(key.row + key.index + VIEWS.index(key.view)) % num_ranks].append(number)
    return hands


@dataclass(slots=True)
class Kept:
    """Features [1 + K, F, H] of a frozen tower that this rank has encoded in this step, up to `CACHED_BYTES`."""

    features: dict[ImageKey, Tensor] = field(default_factory=dict)
    num_bytes: int = 0

    def of(self, images: Sequence[ImageKey], grids: Sequence[ImageGrid], encode: Encode) -> list[Tensor]:
        """The features of each image; `encode` is asked for those that are not kept, and they are kept."""
        new = [(key, grid) for key, grid in zip(images, grids, strict=True) if key not in self.features]
        keys = [key for key, _ in new]
        fresh = dict(zip(keys, encode(keys, [grid for _, grid in new]), strict=True))
        found = [fresh[key] if key in fresh else self.features[key] for key in images]
        for key, features in fresh.items():
            self._keep(key, features)
        return found

    def _keep(self, key: ImageKey, features: Tensor) -> None:
        if self.num_bytes + features.nbytes <= CACHED_BYTES:
            self.features[key] = features.clone()  # a part of a pass would keep the whole
            self.num_bytes += features.nbytes

    def clear(self) -> None:
        self.features.clear()
        self.num_bytes = 0


@dataclass(frozen=True, slots=True)
class Encoder:
    """The tower with its ranks: `ranks` (TP x CP) share the images, `sharers` (CP, or `ranks` under sequence
    parallelism) each hold some of the tokens. `kept` is None for a tower that is trained.
    """

    tower: nn.Module
    pixels: Pixels
    ranks: dist.ProcessGroup
    sharers: dist.ProcessGroup
    num_features: int
    kept: Kept | None

    def __call__(self, images: Sequence[ImageKey], grids: Sequence[ImageGrid]) -> Tensor:
        """Features [F, 1 + K, H] of `images`, in their order, on every rank.

        Communicates: all ranks enter, whether they hold images or not, forward and backward.
        """
        if self.kept is None:
            hands = deal([grid.num_patches for grid in grids], self.ranks.size())
        else:
            hands = deal_for_good(images, self.ranks.size())
        hand = hands[self.ranks.rank()]
        with torch.set_grad_enabled(self.kept is None and torch.is_grad_enabled()):
            mine = self._encode([images[i] for i in hand], [grids[i] for i in hand])
        counts = [[grids[i].num_tokens for i in hand] for hand in hands]
        most = max(sum(row) for row in counts)
        if self.ranks.size() == 1:
            gathered = mine[None]
        else:
            if self.kept is None and torch.is_grad_enabled() and not mine.requires_grad:
                mine.requires_grad_()  # a rank without images must take part in the backward's sum too
            gathered = _GatherFeatures.apply(mine, most, self.ranks, self.sharers)
        pieces: dict[int, Tensor] = {}
        for rank, hand in enumerate(hands):
            parts = gathered[rank, : sum(counts[rank])].split(counts[rank])
            pieces.update(zip(hand, parts, strict=True))
        return torch.cat([pieces[i] for i in range(len(images))])

    def _encode(self, images: Sequence[ImageKey], grids: Sequence[ImageGrid]) -> Tensor:
        """[F, 1 + K, H] of this rank's images."""
        parts = list(self._run(images, grids) if self.kept is None else self.kept.of(images, grids, self._run))
        if parts:
            return torch.cat(parts)
        tower: Any = self.tower
        weight = next(tower.parameters())
        return weight.new_zeros(0, self.num_features, tower.config.out_hidden_size)

    def _run(self, images: Sequence[ImageKey], grids: Sequence[ImageGrid]) -> Sequence[Tensor]:
        """One pass of the tower over these images: [F, 1 + K, H] of each."""
        if not images:
            return ()
        weight = next(self.tower.parameters())
        pixels_PC = torch.cat([self.pixels(key) for key in images]).to(weight)
        shape_I3 = torch.tensor([(g.frames, g.height, g.width) for g in grids], device=weight.device)
        features = torch.stack(towers.features(self.tower, pixels_PC, shape_I3), dim=1)
        return features.split([grid.num_tokens for grid in grids])


class _GatherFeatures(torch.autograd.Function):
    """[f, 1 + K, H] of this rank -> [ranks, most, 1 + K, H] of all; backward: summed over the ranks that hold different
    tokens, this rank's images."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, most: int, ranks: dist.ProcessGroup, sharers: dist.ProcessGroup) -> Tensor:
        ctx.rank, ctx.count, ctx.sharers = ranks.rank(), mine.shape[0], sharers
        padded = mine.new_zeros(most, *mine.shape[1:])
        padded[: ctx.count] = mine
        gathered = padded.new_empty(ranks.size() * most, *mine.shape[1:])
        dist.all_gather_into_tensor(gathered, padded, group=ranks)
        return gathered.unflatten(0, (ranks.size(), most))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # pyrefly: ignore[bad-override]
        if ctx.sharers.size() > 1:
            grad = grad.contiguous()
            dist.all_reduce(grad, group=ctx.sharers)
        return grad[ctx.rank, : ctx.count], None, None, None


class Handover(torch.autograd.Function):
    """Passes hidden states on; backward: hands the tower what the decoder's layers left in `proxies`.

    Deepstack features enter decoder layers that may be computed again inside backward, each in a graph of its own; the
    tower's graph can be gone through once only. So the layers add proxies, leaves whose gradients have all come when
    backward reaches the first layer's input.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, proxies: Sequence[Tensor], *features: Tensor) -> Tensor:
        ctx.proxies = proxies
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # pyrefly: ignore[bad-override]
        gradients = [torch.zeros_like(proxy) if proxy.grad is None else proxy.grad for proxy in ctx.proxies]
        return grad, None, *gradients
