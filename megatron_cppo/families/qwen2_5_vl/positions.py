"""Multimodal rotary positions of Qwen2-VL and Qwen2.5-VL: where each token of a prompt is in time, height and width.

Owns the rule for text, still images and videos. Must not know pixels, models or torch.
Letters: T tokens of a prompt, F tokens of one image or video; 3 is time, height, width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from megatron_cppo.types import ImageGrid

Positions = npt.NDArray[np.int64]


class PositionError(ValueError):
    """Image placeholders and image grids that do not fit each other."""


def rope_positions(
    token_ids: Sequence[int] | npt.NDArray[np.integer],
    grids: Sequence[ImageGrid],
    *,
    image_token_id: int,
    frame_steps: Sequence[float] = (),
) -> tuple[Positions, int]:
    """Positions [3, T] of a prompt's tokens, and the position at which its response continues, in all three.

    Text counts up by one in all three. A picture's tokens hold (time, row, column) past its start, rows and columns in
    merged patches, and whatever follows it continues after its largest position. A video's placeholders must be
    `image_token_id` too; `frame_steps` then says, per grid, what time adds from one of its frames to the next: seconds
    per frame x tokens_per_second, fractions cut off at each frame (default 1, which a still image does not notice).
    Raises PositionError unless the image tokens are exactly those of the grids, picture by picture.
    Source: Qwen2-VL (arXiv 2409.12191), section 2.1, and Qwen2.5-VL (arXiv 2502.13923), section 2.1.3, as transformers
    4.x and the rollout engines compute it. Transformers 5 lets a video be followed by its start + max(rows, columns),
    inside its own time.
    """
    is_image_T = np.asarray(token_ids) == image_token_id
    num_tokens, num_expected = int(is_image_T.sum()), sum(grid.num_tokens for grid in grids)
    if num_tokens != num_expected:
        raise PositionError(
            f"the prompt holds {num_tokens} image tokens (id {image_token_id}), but its {len(grids)} images make "
            f"{num_expected}; every image needs one placeholder, expanded to its grid's tokens"
        )
    steps = list(frame_steps) or [1.0] * len(grids)
    assert len(steps) == len(grids), f"{len(steps)} frame steps for {len(grids)} grids"
    image_slots = np.flatnonzero(is_image_T)
    blocks: list[Positions] = []
    token, position, used = 0, 0, 0
    for grid, step in zip(grids, steps, strict=True):
        first = int(image_slots[used])
        used += grid.num_tokens
        if int(image_slots[used - 1]) != first + grid.num_tokens - 1:
            raise PositionError(
                f"the {grid.num_tokens} tokens of an image are interrupted by text after position {first}; "
                "the tokens of one image must be contiguous"
            )
        blocks.append(_text(position, first - token))
        position += first - token
        blocks.append(position + _picture(grid, step))
        token = first + grid.num_tokens
        position = int(blocks[-1].max()) + 1
    num_left = len(is_image_T) - token
    blocks.append(_text(position, num_left))
    return np.concatenate(blocks, axis=1), position + num_left


def _text(start: int, length: int) -> Positions:
    return np.broadcast_to(np.arange(start, start + length), (3, length))


def _picture(grid: ImageGrid, frame_step: float) -> Positions:
    """(time, row, column) [3, F] of one picture's tokens, frame by frame and row by row, in merged patches."""
    places = np.indices((grid.frames, grid.height // grid.merge, grid.width // grid.merge)).reshape(3, -1)
    places[0] = (places[0] * frame_step).astype(np.int64)
    return places
