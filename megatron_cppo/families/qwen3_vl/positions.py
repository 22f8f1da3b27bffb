"""Multimodal rotary positions of Qwen3-VL: Qwen2-VL's rule for text and pictures of one frame.

A video is a row of single frames with their time stamps as text between them (arXiv 2511.21631, section 2), so each
frame is a grid of its own, and no position depends on its time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from megatron_cppo.families.qwen2_5_vl import positions

if TYPE_CHECKING:
    from megatron_cppo.types import ImageGrid


def rope_positions(
    token_ids: Sequence[int] | npt.NDArray[np.integer], grids: Sequence[ImageGrid], *, image_token_id: int
) -> tuple[positions.Positions, int]:
    """Positions [3, T] of a prompt's tokens, and where its response continues; as `qwen2_5_vl.positions` says.

    Raises PositionError for a grid of several frames, and for image tokens that are not those of the grids.
    """
    for number, grid in enumerate(grids):
        if grid.frames != 1:
            raise positions.PositionError(
                f"picture {number} has {grid.frames} frames; give each frame of a video a grid and a time stamp"
            )
    return positions.rope_positions(token_ids, grids, image_token_id=image_token_id)
