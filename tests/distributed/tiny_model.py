"""Random tiny Qwen2.5-VL checkpoints, prompts and pixels, made by a seed alone, so that every rank can make them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from megatron_cppo.config import (
    AlgorithmConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PerceptionConfig,
    PolicyConfig,
    RolloutConfig,
    TrainerConfig,
)
from megatron_cppo.families.qwen2_5_vl.positions import rope_positions
from megatron_cppo.plan import Plan, resolve
from megatron_cppo.types import Group, ImageGrid, ImageKey, Prompt, Sample

IMAGE_ID, START_ID, END_ID = 5, 6, 7
BANNED = (IMAGE_ID, START_ID, END_ID)
PATCH_NUMBERS = 3 * 2 * 14 * 14
GRIDS = ((1, 4, 4), (1, 6, 4), (1, 4, 8), (1, 10, 6))


TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.15,
    "max_position_embeddings": 512,
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 14,
    "initializer_range": 0.15,
}
IDS = {
    "image_token_id": IMAGE_ID,
    "vision_start_token_id": START_ID,
    "vision_end_token_id": END_ID,
    "video_token_id": 8,
}
DEEPSTACK = (0, 1)
NUM_EXPERTS = 4


def make_checkpoint(
    folder: Path,
    *,
    family: str = "qwen2_5_vl",
    vocab_size: int = 131,
    tied: bool = False,
    full_attention: bool = False,
    num_layers: int = 2,
) -> str:
    """Write a tiny random checkpoint; weights are large enough that no view is the same as another."""
    import transformers

    text = {**TEXT, "vocab_size": vocab_size, "num_hidden_layers": num_layers, "tie_word_embeddings": tied}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    vision: dict[str, Any] = {**VISION, "depth": 2}
    if family == "qwen2_5_vl":
        text["rope_parameters"] = {**rope, "mrope_section": [1, 1, 2]}
        vision |= {"fullatt_block_indexes": [0, 1] if full_attention else [1], "window_size": 56}
        config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **IDS, tie_word_embeddings=tied)
        kind: Any = transformers.Qwen2_5_VLForConditionalGeneration
    else:
        # A head size that is not the hidden size over the heads; more time than height and width.
        text |= {"head_dim": 16, "rope_parameters": {**rope, "mrope_section": [4, 2, 2], "mrope_interleaved": True}}
        vision |= {"depth": 3, "deepstack_visual_indexes": list(DEEPSTACK), "num_position_embeddings": 16}
        if family == "qwen3_vl_moe":
            text |= {"num_experts": NUM_EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
        kinds: dict[str, tuple[Any, Any]] = {
            "qwen3_vl": (transformers.Qwen3VLConfig, transformers.Qwen3VLForConditionalGeneration),
            "qwen3_vl_moe": (transformers.Qwen3VLMoeConfig, transformers.Qwen3VLMoeForConditionalGeneration),
        }
        config = kinds[family][0](text_config=text, vision_config=vision, **IDS, tie_word_embeddings=tied)
        kind = kinds[family][1]
    torch.manual_seed(7)
    model = kind(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms of one and biases of zero would hide a wrong mapping; a router of zeros chooses by chance.
            if "norm" in name or name.endswith("ln_q.weight"):
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif name.endswith("mlp.gate.weight"):
                parameter.copy_(torch.randn_like(parameter))
    model.save_pretrained(folder)
    # The plan looks at a data file's first bytes; these tests make their prompts themselves.
    pq.write_table(pa.table({"unread": [0]}), folder / "rows.parquet")
    return str(folder)


def pixels(key: ImageKey) -> Tensor:
    """Patches of an image: the removing view is noise, the preserving one the original with a little of it."""
    grid = GRIDS[(key.row + key.index) % len(GRIDS)]
    shape = (grid[0] * grid[1] * grid[2], PATCH_NUMBERS)

    def noise(*words: int) -> Tensor:
        return torch.from_numpy(np.random.default_rng(words).standard_normal(shape)).float()

    original = noise(key.row, key.index)
    if key.view == "original":
        return original
    other = noise(key.row, key.index, 1 + ("preserving", "removing").index(key.view))
    return original + 0.1 * other if key.view == "preserving" else other


def make_prompt(row: int, *, vocab_size: int) -> Prompt:
    """Row r has r % 3 images of different sizes, and text of a length of its own."""
    rng = np.random.default_rng(100 + row)

    def text(count: int) -> list[int]:
        return rng.integers(10, vocab_size, count).tolist()

    grids = tuple(ImageGrid(*GRIDS[(row + i) % len(GRIDS)], merge=2) for i in range(row % 3))
    ids = text(3)
    for grid in grids:
        ids += [START_ID, *[IMAGE_ID] * grid.num_tokens, END_ID, *text(1 + row % 4)]
    ids += text(2)
    positions, following = rope_positions(ids, grids, image_token_id=IMAGE_ID)
    return Prompt(
        split="train",
        row=row,
        epoch=0,
        data_source="tiny",
        ground_truth="",
        text="",
        token_ids=tuple(ids),
        positions=tuple(tuple(axis.tolist()) for axis in positions),  # pyrefly: ignore[bad-argument-type]
        next_position=following,
        grids=grids,
        image_slots=tuple(i for i, token in enumerate(ids) if token == IMAGE_ID),
    )


def make_groups(num_prompts: int, samples_per_prompt: int, *, vocab_size: int, first_row: int = 0) -> list[Group]:
    """Ragged random answers with advantages of both signs; the first id of each is an end marker's neighbour."""
    groups = []
    for row in range(first_row, first_row + num_prompts):
        prompt = make_prompt(row, vocab_size=vocab_size)
        samples = []
        for index in range(samples_per_prompt):
            rng = np.random.default_rng((row, index, 3))
            answer = tuple(rng.integers(10, vocab_size, rng.integers(1, 9)).tolist())
            samples.append(
                Sample(
                    prompt=prompt,
                    index=index,
                    token_ids=answer,
                    logp=(),
                    text="",
                    truncated=False,
                    version=0,
                    advantage=float(rng.choice([-1.0, 0.5, 1.25])),
                )
            )
        groups.append(Group(prompt, tuple(samples)))
    return groups


def make_config(folder: str, num_ranks: int, **fields: object) -> Config:
    """A config of the tiny model on CPU; `fields` are "section.field" names with _ for the dot's place."""
    config = Config(
        model=ModelConfig(path=folder),
        data=DataConfig(train=(f"{folder}/rows.parquet",), max_prompt_tokens=64),
        algorithm=AlgorithmConfig(beta=0.0),
        perception=PerceptionConfig(coefficient=0.5),
        rollout=RolloutConfig(max_response_tokens=8, samples_per_prompt=3),
        policy=PolicyConfig(device="cpu", precision="fp32", distributed_optimizer=False, max_tokens_per_microbatch=600),
        optimizer=OptimizerConfig(learning_rate=0.0, max_grad_norm=0.0),
        trainer=TrainerConfig(num_gpus=num_ranks, prompts_per_step=4, num_steps=4),
    )
    for name, value in fields.items():
        section, field = name.split("__")
        config = replace(config, **{section: replace(getattr(config, section), **{field: value})})
    return config


def make_plan(config: Config) -> Plan:
    return resolve(config)
