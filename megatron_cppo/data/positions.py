"""Multimodal rotary positions: where each token of a prompt is in time, height and width.

Owns the rule for text and still images (Qwen2-VL, Qwen2.5-VL). Must not know pixels, models or torch.
Letters: T tokens of a prompt, F image tokens of one image; 3 is time, height, width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatron_cppo.types import ImageGrid

Positions = npt.NDArray[np.int64]


class PositionError(ValueError):
    """Image placeholders and image grids that do not fit each other."""


def rope_positions(
    token_ids: Sequence[int] | npt.NDArray[np.integer], grids: Sequence[ImageGrid], *, image_token_id: int
) -> tuple[Positions, int]:
    """Positions [3, T] of a prompt's tokens, and the position at which its response continues, in all three.

    Text counts up by one in all three. An image's tokens hold (frame, row, column) past the image's start, and
    whatever follows it continues at start + max(frames, rows, columns), rows and columns in merged patches.
    Raises PositionError unless the image tokens are exactly those of the grids, image by image.
    Source: Qwen2-VL (arXiv 2409.12191), section 2.1, "Multimodal Rotary Position Embedding".
    """
    is_image_T = np.asarray(token_ids) == image_token_id
    num_tokens, num_expected = int(is_image_T.sum()), sum(grid.num_tokens for grid in grids)
    if num_tokens != num_expected:
        raise PositionError(
            f"the prompt holds {num_tokens} image tokens (id {image_token_id}), but its {len(grids)} images make "
            f"{num_expected}; every image needs one placeholder, expanded to its grid's tokens"
        )
    image_slots = np.flatnonzero(is_image_T)
    blocks: list[Positions] = []
    token, position, used = 0, 0, 0
    for grid in grids:
        first = int(image_slots[used])
        used += grid.num_tokens
        if int(image_slots[used - 1]) != first + grid.num_tokens - 1:
            raise PositionError(
                f"the {grid.num_tokens} tokens of an image are interrupted by text after position {first}; "
                "the tokens of one image must be contiguous"
            )
        blocks.append(_text(position, first - token))
        position += first - token
        blocks.append(position + _image(grid))
        token = first + grid.num_tokens
        position += max(grid.frames, grid.height // grid.merge, grid.width // grid.merge)
    num_left = len(is_image_T) - token
    blocks.append(_text(position, num_left))
    return np.concatenate(blocks, axis=1), position + num_left


def _text(start: int, length: int) -> Positions:
    return np.broadcast_to(np.arange(start, start + length), (3, length))


def _image(grid: ImageGrid) -> Positions:
    """(frame, row, column) [3, F] of one image's tokens, row by row, in merged patches."""
    return np.indices((grid.frames, grid.height // grid.merge, grid.width // grid.merge)).reshape(3, -1)
