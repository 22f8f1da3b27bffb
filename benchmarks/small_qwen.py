"""A real Qwen2.5-VL of random weights, a config that trains it on the CPU, and synthetic samples for it.

Owns what the benchmarks compute on: the checkpoint folder, images as processed patches, prompts and random answers with
given advantages. Everything is a function of its arguments. It must not know what is measured.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from megatron_cppo.config import (
    AlgorithmConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PolicyConfig,
    RolloutConfig,
    TrainerConfig,
)
from megatron_cppo.families.qwen2_5_vl.positions import rope_positions
from megatron_cppo.types import VIEWS, Group, ImageGrid, ImageKey, Prompt, Sample

HEAD_SIZE = 64
NUM_VISION_IDS = 4
"""Image, video, start and end: the last ids of the vocabulary."""
PATCH_NUMBERS = 3 * 2 * 14 * 14
MERGE = 2


@dataclass(frozen=True, slots=True)
class Sizes:
    """The model's and the samples' numbers; every image is a square of `image_side` x `image_side` tokens."""

    hidden: int
    layers: int
    ffn: int
    vocab: int
    vision_hidden: int
    vision_layers: int
    prompts: int
    samples_per_prompt: int
    image_side: int
    text_tokens: int
    shortest_response: int
    longest_response: int
    seed: int

    @property
    def image_id(self) -> int:
        """The id that stands for one image token."""
        return self.vocab - NUM_VISION_IDS

    @property
    def grid(self) -> ImageGrid:
        """The grid of every image."""
        return ImageGrid(frames=1, height=MERGE * self.image_side, width=MERGE * self.image_side, merge=MERGE)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the longest prompt."""
        return self.grid.num_tokens + 2 + self.text_tokens + self.text_tokens // 4


def make_checkpoint(folder: Path, sizes: Sizes) -> None:
    """Write the model as a Hugging Face folder, and the data file that a config must name (it is never read)."""
    heads = sizes.hidden // HEAD_SIZE
    ids: dict[str, Any] = dict(
        zip(
            ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"),
            range(sizes.image_id, sizes.vocab),
            strict=True,
        )
    )
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": sizes.vocab,
            "hidden_size": sizes.hidden,
            "intermediate_size": sizes.ffn,
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": 1 if heads % 4 else heads // 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
            "initializer_range": 0.06,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": None,
        },
        vision_config={
            "depth": sizes.vision_layers,
            "hidden_size": sizes.vision_hidden,
            "intermediate_size": 2 * sizes.vision_hidden,
            "num_heads": max(1, sizes.vision_hidden // 32),
            "out_hidden_size": sizes.hidden,
            "window_size": 112,
            "fullatt_block_indexes": [sizes.vision_layers - 1],
            "initializer_range": 0.06,
        },
        tie_word_embeddings=True,
        **ids,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sizes.seed)
        Qwen2_5_VLForConditionalGeneration(config).float().save_pretrained(folder)
    pq.write_table(pa.table({"unread": [0]}), folder / "rows.parquet")


def make_config(folder: Path, sizes: Sizes, *, max_tokens: int) -> Config:
    """One rank on the CPU in fp32. The learning rate is zero: Adam computes all it does, and the weights stay."""
    return Config(
        model=ModelConfig(path=str(folder)),
        data=DataConfig(train=(str(folder / "rows.parquet"),), max_prompt_tokens=sizes.prompt_tokens),
        algorithm=AlgorithmConfig(beta=0.0),
        rollout=RolloutConfig(samples_per_prompt=sizes.samples_per_prompt, max_response_tokens=sizes.longest_response),
        policy=PolicyConfig(device="cpu", precision="fp32", max_tokens_per_microbatch=max_tokens),
        optimizer=OptimizerConfig(learning_rate=0.0),
        trainer=TrainerConfig(
            run_dir=str(folder / "run"), num_steps=1000, prompts_per_step=sizes.prompts, seed=sizes.seed
        ),
    )


def pixels(sizes: Sizes) -> Any:
    """What gives an image's patches: noise of its own per prompt and view, made once and kept.

    The epoch of a key does not matter, so that a benchmark can use it to tell apart images of the same pixels.
    """

    @functools.cache
    def patches(row: int, index: int, view_number: int) -> Tensor:
        rng = np.random.default_rng((sizes.seed, row, index, view_number))
        return torch.from_numpy(rng.standard_normal((sizes.grid.num_patches, PATCH_NUMBERS), dtype=np.float32))

    def of(key: ImageKey) -> Tensor:
        return patches(key.row, key.index, VIEWS.index(key.view))

    return of


def make_groups(sizes: Sizes, gated: Sequence[bool]) -> list[Group]:
    """Every prompt's samples; sample i of the step has advantage 1 where `gated`[i], else -1."""
    groups = []
    for row in range(sizes.prompts):
        prompt = _prompt(sizes, row)
        first = row * sizes.samples_per_prompt
        samples = tuple(
            _sample(sizes, prompt, index, 1.0 if gated[first + index] else -1.0)
            for index in range(sizes.samples_per_prompt)
        )
        groups.append(Group(prompt, samples))
    return groups


def _prompt(sizes: Sizes, row: int) -> Prompt:
    """An image and then text, about a quarter longer or shorter than the mean."""
    rng = np.random.default_rng((sizes.seed, row, 1))
    spread = sizes.text_tokens // 4
    num_text = sizes.text_tokens + int(rng.integers(-spread, spread + 1))
    text = rng.integers(0, sizes.image_id, num_text).tolist()
    start, end = sizes.image_id + 2, sizes.image_id + 3
    ids = (start, *[sizes.image_id] * sizes.grid.num_tokens, end, *text)
    positions, following = rope_positions(ids, (sizes.grid,), image_token_id=sizes.image_id)
    time, height, width = (tuple(axis.tolist()) for axis in positions)
    return Prompt(
        split="train",
        row=row,
        epoch=0,
        data_source="synthetic",
        ground_truth="",
        text="",
        token_ids=ids,
        positions=(time, height, width),
        next_position=following,
        grids=(sizes.grid,),
        image_slots=tuple(range(1, 1 + sizes.grid.num_tokens)),
    )


def _sample(sizes: Sizes, prompt: Prompt, index: int, advantage: float) -> Sample:
    rng = np.random.default_rng((sizes.seed, prompt.row, index, 2))
    count = int(rng.integers(sizes.shortest_response, sizes.longest_response + 1))
    return Sample(
        prompt=prompt,
        index=index,
        token_ids=tuple(rng.integers(0, sizes.image_id, count).tolist()),
        logp=(),
        text="",
        truncated=False,
        version=0,
        advantage=advantage,
    )
