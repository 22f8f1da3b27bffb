"""m-rope positions against transformers' own, and the cases that one leaves open."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLModel

from megatron_cppo.data.positions import PositionError, rope_positions
from megatron_cppo.types import ImageGrid
from tests.unit.tiny_checkpoint import tiny_config

IMAGE = 7
TEXT = 1


@pytest.fixture(scope="module")
def model() -> Qwen2_5_VLModel:
    return Qwen2_5_VLModel(tiny_config(64))


@pytest.mark.parametrize("seed", range(40))
def test_positions_are_those_of_transformers(model: Qwen2_5_VLModel, seed: int) -> None:
    rng = np.random.default_rng(seed)
    grids = [ImageGrid(1, 2 * int(h), 2 * int(w), 2) for h, w in rng.integers(1, 12, (seed % 4, 2))]
    token_ids = [TEXT] * int(rng.integers(0, 5))
    for grid in grids:
        token_ids += [IMAGE] * grid.num_tokens + [TEXT] * int(rng.integers(1, 9))
    token_ids += [TEXT] * int(rng.integers(1, 4))

    positions_3T, next_position = rope_positions(token_ids, grids, image_token_id=IMAGE)

    ids = torch.tensor([token_ids])
    expected_3BT, delta = model.get_rope_index(
        ids,
        (ids == IMAGE).int(),
        image_grid_thw=torch.tensor([[g.frames, g.height, g.width] for g in grids]) if grids else None,
    )
    np.testing.assert_array_equal(positions_3T, expected_3BT[:, 0].numpy())
    assert next_position == len(token_ids) + int(delta)


def test_prompt_that_ends_with_an_image_continues_after_its_longer_side(model: Qwen2_5_VLModel) -> None:
    grid = ImageGrid(1, 4, 10, 2)
    token_ids = [TEXT, TEXT] + [IMAGE] * grid.num_tokens
    positions_3T, next_position = rope_positions(token_ids, [grid], image_token_id=IMAGE)
    ids = torch.tensor([token_ids])
    expected_3BT, delta = model.get_rope_index(ids, (ids == IMAGE).int(), image_grid_thw=torch.tensor([[1, 4, 10]]))
    np.testing.assert_array_equal(positions_3T, expected_3BT[:, 0].numpy())
    assert next_position == 7 == len(token_ids) + int(delta)


def test_adjacent_images_follow_each_other() -> None:
    # transformers reads adjacent images as one block; with text of zero length between, the rule is this one.
    first, second = ImageGrid(1, 2, 4, 2), ImageGrid(1, 4, 2, 2)
    positions_3T, next_position = rope_positions([IMAGE] * 4, [first, second], image_token_id=IMAGE)
    np.testing.assert_array_equal(positions_3T, [[0, 0, 2, 2], [0, 0, 2, 3], [0, 1, 2, 2]])
    assert next_position == 4


def test_empty_prompt() -> None:
    positions_3T, next_position = rope_positions([], [], image_token_id=IMAGE)
    assert positions_3T.shape == (3, 0)
    assert next_position == 0


@pytest.mark.parametrize("num_tokens", [0, 3, 5])
def test_count_mismatch_is_refused(num_tokens: int) -> None:
    with pytest.raises(PositionError, match=f"holds {num_tokens} image tokens .* make 4"):
        rope_positions([TEXT] + [IMAGE] * num_tokens, [ImageGrid(1, 4, 4, 2)], image_token_id=IMAGE)


def test_text_inside_an_image_is_refused() -> None:
    with pytest.raises(PositionError, match="contiguous"):
        rope_positions([IMAGE, TEXT, IMAGE], [ImageGrid(1, 2, 4, 2)], image_token_id=IMAGE)
