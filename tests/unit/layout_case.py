"""A small model of each family on 24 ranks, to be laid out in many ways; sizes are such that few of them fit.

Knows nothing of what is tested.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from megatron_cppo import plan
from megatron_cppo.config import (
    Config,
    ConfigError,
    DataConfig,
    ModelConfig,
    PolicyConfig,
    RolloutConfig,
    TrainerConfig,
)

NUM_LAYERS, NUM_DEEPSTACK, NUM_EXPERTS = 8, 3, 12
IDS = {"image_token_id": 5, "video_token_id": 8}
TEXT: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 96,
    "intermediate_size": 60,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
}
ROPE = {"rope_type": "default", "mrope_section": [2, 1, 1]}
VISION: dict[str, Any] = {
    "depth": 4,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 96,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
DEEP_VISION = {**VISION, "deepstack_visual_indexes": [0, 1, 3], "num_position_embeddings": 16}
QWEN3_TEXT = {**TEXT, "rope_scaling": {**ROPE, "mrope_interleaved": True}}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {**IDS, **TEXT, "rope_scaling": ROPE, "vision_config": VISION},
    "qwen3_vl": {**IDS, "text_config": QWEN3_TEXT, "vision_config": DEEP_VISION},
    "qwen3_vl_moe": {
        **IDS,
        "text_config": {
            **QWEN3_TEXT,
            "num_experts": NUM_EXPERTS,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
        },
        "vision_config": DEEP_VISION,
    },
}


def make_configs(root: Path) -> dict[str, Config]:
    """For each family a config without problems: 24 ranks, a whole model on each, rows of any multiple in use here."""
    configs = {}
    for family, content in CONFIGS.items():
        folder = root / family
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": family, **content}))
        (folder / "rows.parquet").write_bytes(b"PAR1 as every parquet file begins and ends PAR1")
        configs[family] = Config(
            model=ModelConfig(path=str(folder)),
            data=DataConfig(train=(str(folder / "rows.parquet"),), max_prompt_tokens=100),
            rollout=RolloutConfig(max_response_tokens=29),
            policy=PolicyConfig(max_tokens_per_microbatch=8400),
            trainer=TrainerConfig(num_gpus=24, prompts_per_step=24),
        )
        plan.resolve(configs[family])
    return configs


def changed(config: Config, **fields: object) -> Config:
    """`fields` are named section__field."""
    for name, value in fields.items():
        section, field = name.split("__")
        part = dataclasses.replace(getattr(config, section), **{field: value})
        config = dataclasses.replace(config, **{section: part})
    return config


def problems(config: Config) -> list[str]:
    """The problems of `config`, without their numbers; none when it can be planned."""
    try:
        plan.resolve(config)
    except ConfigError as error:
        return [line.split(". ", 1)[1] for line in str(error).splitlines()]
    return []
