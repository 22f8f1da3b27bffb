"""The embedded engine on several ranks: prompts are dealt out, and every rank returns what one rank would."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_cppo.rollout.transformers import TransformersEngine
from megatron_cppo.types import Group, ImageKey, Prompt
from tests.distributed.launch import run_distributed
from tests.tiny_qwen import VISION_IDS, TinyQwen, make_tiny_qwen, pixels


def answers(
    folder: Path, prompts: Sequence[Prompt], group: dist.ProcessGroup | None
) -> tuple[list[Group], list[ImageKey]]:
    """What this rank returns after a load of the checkpoint's own weights, and the images that it asked for."""
    asked: list[ImageKey] = []
    engine = TransformersEngine(
        folder,
        pixels=lambda key: (asked.append(key), pixels(key))[1],
        banned_ids=VISION_IDS,
        decode=lambda ids: " ".join(map(str, ids)),
        max_response_tokens=10,
        max_sequences=8,
        seed=3,
        group=group,
    )
    engine.load_weights(load_file(folder / "model.safetensors").items(), version=4)
    return engine.generate(prompts, samples_per_prompt=3, temperature=1.0, salt=2), asked


def answers_of_a_rank(
    rank: int, world_size: int, folder: Path, prompts: Sequence[Prompt]
) -> tuple[list[Group], list[ImageKey]]:
    return answers(folder, prompts, dist.group.WORLD)


def token_ids(groups: Sequence[Group]) -> list[list[tuple[int, ...]]]:
    return [[sample.token_ids for sample in group.samples] for group in groups]


@pytest.mark.parametrize("num_prompts", [1, 5])
def test_ranks_agree_with_one_rank(tmp_path: Path, num_prompts: int) -> None:
    folder = make_tiny_qwen(tmp_path)
    plain = TinyQwen.load(folder)
    prompts = [plain.prompt(row, num_text_tokens=3 + 5 * row, num_images=row % 3) for row in range(1, num_prompts + 1)]
    expected, all_images = answers(folder, prompts, None)
    (first, first_images), (second, second_images) = run_distributed(answers_of_a_rank, 2, folder, prompts)
    assert first == second
    assert token_ids(first) == token_ids(expected)
    assert [group.prompt for group in first] == prompts
    assert {sample.version for group in first for sample in group.samples} == {4}
    # No image was read by both.
    assert sorted(first_images + second_images, key=repr) == sorted(all_images, key=repr)
