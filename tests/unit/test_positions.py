"""m-rope positions against transformers' own, and the cases that one leaves open."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLModel, Qwen3VLConfig, Qwen3VLModel, Qwen3VLMoeConfig, Qwen3VLMoeModel

from megatron_cppo.families import FAMILIES, part
from megatron_cppo.families.qwen2_5_vl.positions import PositionError, rope_positions
from megatron_cppo.types import ImageGrid
from tests.unit.tiny_checkpoint import tiny_config

IMAGE = 7
TEXT = 1
SMALL = {"hidden_size": 16, "intermediate_size": 16}


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """Hugging Face's module of each family, without memory: positions need its config only."""
    text = {**SMALL, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 64}
    vision = {**SMALL, "depth": 1, "num_heads": 1, "deepstack_visual_indexes": [], "out_hidden_size": 16}
    options: dict[str, Any] = {"text_config": text, "vision_config": vision}
    experts: dict[str, Any] = {**options, "text_config": {**text, "num_experts": 2, "moe_intermediate_size": 8}}
    with torch.device("meta"):
        return {
            "qwen2_5_vl": Qwen2_5_VLModel(tiny_config(64)),
            "qwen3_vl": Qwen3VLModel(Qwen3VLConfig(**options)),
            "qwen3_vl_moe": Qwen3VLMoeModel(Qwen3VLMoeConfig(**experts)),
        }


def expected_positions(model: Any, token_ids: list[int], grids: list[ImageGrid]) -> tuple[np.ndarray, int]:
    """What transformers' get_rope_index says of a prompt with still images, in the form of `rope_positions`."""
    ids = torch.tensor([token_ids])
    positions_3BT, delta = model.get_rope_index(
        ids,
        (ids == IMAGE).int(),
        image_grid_thw=torch.tensor([[g.frames, g.height, g.width] for g in grids]) if grids else None,
    )
    return positions_3BT[:, 0].numpy(), len(token_ids) + int(delta)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(40))
def test_positions_are_those_of_transformers(models: dict[str, Any], family: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    grids = [ImageGrid(1, 2 * int(h), 2 * int(w), 2) for h, w in rng.integers(1, 12, (seed % 4, 2))]
    token_ids = [TEXT] * int(rng.integers(0, 5))
    for grid in grids:
        token_ids += [IMAGE] * grid.num_tokens + [TEXT] * int(rng.integers(1, 9))
    token_ids += [TEXT] * int(rng.integers(1, 4))

    positions_3T, next_position = part(family, "positions").rope_positions(token_ids, grids, image_token_id=IMAGE)

    expected_3T, expected_next = expected_positions(models[family], token_ids, grids)
    np.testing.assert_array_equal(positions_3T, expected_3T)
    assert next_position == expected_next


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_that_ends_with_an_image_continues_after_its_longer_side(models: dict[str, Any], family: str) -> None:
    grid = ImageGrid(1, 4, 10, 2)
    token_ids = [TEXT, TEXT] + [IMAGE] * grid.num_tokens
    positions_3T, next_position = part(family, "positions").rope_positions(token_ids, [grid], image_token_id=IMAGE)
    expected_3T, expected_next = expected_positions(models[family], token_ids, [grid])
    np.testing.assert_array_equal(positions_3T, expected_3T)
    assert next_position == 7 == expected_next


def test_adjacent_images_follow_each_other() -> None:
    # transformers reads adjacent images as one block; with text of zero length between, the rule is this one.
    first, second = ImageGrid(1, 2, 4, 2), ImageGrid(1, 4, 2, 2)
    positions_3T, next_position = rope_positions([IMAGE] * 4, [first, second], image_token_id=IMAGE)
    np.testing.assert_array_equal(positions_3T, [[0, 0, 2, 2], [0, 0, 2, 3], [0, 1, 2, 2]])
    assert next_position == 4


def test_a_video_counts_its_frames_in_time_and_text_resumes_after_the_last() -> None:
    """Six frames of 2 x 2 tokens, a second each at two positions a second, as transformers 4.57 places them."""
    grid = ImageGrid(6, 4, 4, 2)
    token_ids = [TEXT] * 2 + [IMAGE] * grid.num_tokens + [TEXT] * 3
    positions_3T, next_position = rope_positions(token_ids, [grid], image_token_id=IMAGE, frame_steps=[2.0])
    time = [2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6, 8, 8, 8, 8, 10, 10, 10, 10, 12, 12, 12, 12]
    rows, columns = [2, 2, 3, 3] * 6, [2, 3, 2, 3] * 6
    text = [13, 14, 15]
    np.testing.assert_array_equal(positions_3T, [[0, 1, *time, *text], [0, 1, *rows, *text], [0, 1, *columns, *text]])
    assert next_position == 16


def test_a_wide_video_is_followed_after_its_longer_side() -> None:
    """Two frames of 1 x 5 tokens: the columns go further than the time."""
    positions_3T, next_position = rope_positions([IMAGE] * 10, [ImageGrid(2, 2, 10, 2)], image_token_id=IMAGE)
    np.testing.assert_array_equal(positions_3T, [[0] * 5 + [1] * 5, [0] * 10, [0, 1, 2, 3, 4] * 2])
    assert next_position == 5


@pytest.mark.parametrize(
    ("step", "times"),
    [(0.5, [0, 0, 1, 1, 2]), (1.5, [0, 1, 3, 4, 6]), (1.9, [0, 1, 3, 5, 7]), (0.0, [0] * 5), (1.0, [0, 1, 2, 3, 4])],
)
def test_fractions_of_a_frames_time_are_cut_off_at_each_frame(step: float, times: list[int]) -> None:
    """Not added up: the fraction of one frame is still there at the next."""
    positions_3T, next_position = rope_positions(
        [TEXT] + [IMAGE] * 5 + [TEXT], [ImageGrid(5, 2, 2, 2)], image_token_id=IMAGE, frame_steps=[step]
    )
    assert positions_3T[0].tolist() == [0, *[1 + time for time in times], 2 + times[-1]]
    assert positions_3T[1].tolist() == positions_3T[2].tolist() == [0, *[1] * 5, 2 + times[-1]]
    assert next_position == 3 + times[-1]


def test_each_picture_has_a_frame_step_of_its_own() -> None:
    still, video = ImageGrid(1, 2, 2, 2), ImageGrid(2, 2, 2, 2)
    token_ids = [IMAGE, TEXT, IMAGE, IMAGE, TEXT]
    positions_3T, _ = rope_positions(token_ids, [still, video], image_token_id=IMAGE, frame_steps=[9.0, 3.0])
    assert positions_3T[0].tolist() == [0, 1, 2, 5, 6]
    with pytest.raises(AssertionError, match="1 frame steps for 2 grids"):
        rope_positions(token_ids, [still, video], image_token_id=IMAGE, frame_steps=[1.0])


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_vl_moe"])
def test_qwen3_refuses_a_picture_of_several_frames(family: str) -> None:
    grids = [ImageGrid(1, 2, 2, 2), ImageGrid(2, 2, 2, 2)]
    said = r"^picture 1 has 2 frames; give each frame of a video a grid and a time stamp$"
    with pytest.raises(PositionError, match=said):
        part(family, "positions").rope_positions([IMAGE, TEXT, IMAGE, IMAGE], grids, image_token_id=IMAGE)


def test_qwen3_places_a_video_as_transformers_does_when_each_frame_is_a_grid(models: dict[str, Any]) -> None:
    """Its time stamps are text, of lengths of their own; transformers cuts the video's grid into frames itself."""
    frame = ImageGrid(1, 4, 6, 2)
    token_ids = [TEXT] * 2
    for stamp in (3, 1, 4):
        token_ids += [TEXT] * stamp + [IMAGE] * frame.num_tokens
    ids = torch.tensor([token_ids])
    expected_3BT, delta = models["qwen3_vl"].get_rope_index(
        ids, 2 * (ids == IMAGE).int(), video_grid_thw=torch.tensor([[3, 4, 6]])
    )
    found_3T, next_position = part("qwen3_vl", "positions").rope_positions(token_ids, [frame] * 3, image_token_id=IMAGE)
    np.testing.assert_array_equal(found_3T, expected_3BT[:, 0].numpy())
    assert next_position == len(token_ids) + int(delta)


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
