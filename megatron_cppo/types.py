"""The records that the folders exchange: frozen, typed, no behaviour beyond a property.

Words are those of the paper: a prompt has a group of samples; a view is the same tokens under one version of the
images; a gated sample has a positive advantage and at least one image. No torch at run time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

View = Literal["original", "preserving", "removing"]
VIEWS: tuple[View, ...] = ("original", "preserving", "removing")


@dataclass(frozen=True, slots=True)
class ImageGrid:
    """An image as the vision tower sees it, in patches; merge * merge patches make one token.

    >>> ImageGrid(frames=1, height=4, width=8, merge=2).num_tokens
    8
    """

    frames: int
    height: int
    width: int
    merge: int

    @property
    def num_patches(self) -> int:
        return self.frames * self.height * self.width

    @property
    def num_tokens(self) -> int:
        return self.num_patches // self.merge**2


@dataclass(frozen=True, slots=True)
class ImageKey:
    """Names the pixels of one image under one view; a stage can rebuild them from this alone.

    >>> ImageKey(split="train", row=17, index=0, epoch=2, view="removing")
    ImageKey(split='train', row=17, index=0, epoch=2, view='removing')
    """

    split: str
    row: int
    index: int
    epoch: int
    view: View


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question, tokenised, its image placeholders already one id per image token.

    `positions` holds the m-rope positions of the tokens, three rows (time, height, width); the response continues
    at `next_position` in all three. `image_slots` are the places of the image tokens in `token_ids`: known here, and
    never looked for again, since a sampled answer may hold such ids too. `target` is a supervised row's response.
    """

    split: str
    row: int
    epoch: int
    data_source: str
    ground_truth: str
    text: str
    token_ids: tuple[int, ...]
    positions: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    next_position: int
    grids: tuple[ImageGrid, ...]
    image_slots: tuple[int, ...]
    target: tuple[int, ...] = ()

    def images(self, view: View) -> tuple[ImageKey, ...]:
        """The keys of this prompt's images under `view`."""
        return tuple(ImageKey(self.split, self.row, i, self.epoch, view) for i in range(len(self.grids)))


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer. `logp` is the engine's, per token, of the distribution that was sampled from.

    `version` is that of the weights that sampled it; where weights were swapped on the way, that of the last part, and
    `earlier` holds (version, number of tokens) of the parts before. No part is empty.
    """

    prompt: Prompt
    index: int
    token_ids: tuple[int, ...]
    logp: tuple[float, ...]
    text: str
    truncated: bool
    version: int
    earlier: tuple[tuple[int, int], ...] = ()
    reward: float = 0.0
    rewards: tuple[tuple[str, float], ...] = ()
    grading: str = ""
    advantage: float = 0.0

    @property
    def gated(self) -> bool:
        """The gate of CPPO: positive advantage, and an image to perturb."""
        return self.advantage > 0 and bool(self.prompt.grids)


@dataclass(frozen=True, slots=True)
class Group:
    """The samples of one prompt."""

    prompt: Prompt
    samples: tuple[Sample, ...]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One packed row of T tokens: segments (sample, view) one after the other, padded at their ends to what the layout
    can cut, and the row's padding last, as a segment of its own.

    N response tokens belong to the row's samples, in order. `rows_*_N` is the position in the row of the hidden
    state that predicts the token, under each view; -1 where the sample has no such segment.
    `sample_N` counts samples of this row; `sample_ids` gives their index in the step (-1: a filler of zero weight).
    F image tokens: the feature row `feature_rows_F` of the stacked `images` belongs at position `feature_slots_F`.
    `constants` are (sample, perturbed view) pairs without a segment here: an earlier pass without gradient has left the
    hidden states of their response tokens, which positions from T on name, pair after pair.
    """

    token_ids_T: Tensor
    positions_3T: Tensor
    cu_seqlens_S: Tensor
    max_seqlen: int
    num_padding_tokens: int
    images: tuple[ImageKey, ...]
    grids: tuple[ImageGrid, ...]
    feature_slots_F: Tensor
    feature_rows_F: Tensor
    sample_ids: tuple[int, ...]
    targets_N: Tensor
    sample_N: Tensor
    rows_original_N: Tensor
    rows_preserving_N: Tensor
    rows_removing_N: Tensor
    constants: tuple[tuple[int, View], ...] = ()


RowsOfRanks = tuple[tuple[MicroBatch, ...], ...]
"""Every data-parallel rank's rows of one pass; all ranks have the same number."""


@dataclass(frozen=True, slots=True)
class MiniBatch:
    """What one optimizer update sees: every data-parallel rank's microbatches, and the counts of the whole.

    Losses are sums of terms divided by these counts, so no number depends on the cut. Two passes without gradient may
    come before. `constant_views` are the perturbed segments alone, where they are constants (`stop_gradient_views`); of
    these the last stage keeps a hidden state of each response token, two views' of all gated samples, for the update.
    `counting` rows are what the "global" aggregation counts masked tokens in. A sample is on one rank in all passes.
    """

    microbatches: RowsOfRanks
    num_tokens: int
    num_samples: int
    num_gated_samples: int
    constant_views: RowsOfRanks = ()
    counting: RowsOfRanks = ()


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's samples, planned. `Policy.score` fills `old_logp` and `reference_logp`: per sample, [tokens] fp32.

    `oversized` samples fit into no row, and are in no update.
    """

    samples: tuple[Sample, ...]
    scoring: MiniBatch | None
    updates: tuple[MiniBatch, ...]
    old_logp: tuple[Tensor, ...] | None = None
    reference_logp: tuple[Tensor, ...] | None = None
    oversized: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class SampleStatistics:
    """What an update saw of one sample, per response token; the perturbed views only where the sample was gated."""

    sample_id: int
    logp: tuple[float, ...]
    entropy: tuple[float, ...]
    entropy_removing: tuple[float, ...] | None
    mask: tuple[bool, ...] | None
