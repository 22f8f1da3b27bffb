"""Reads a checkpoint's config.json into the numbers that the plan and the policy need. Standard library only.

Transformers 4.x writes the text fields at the top level or under `text_config`, with `rope_theta` and `rope_scaling`;
5.x writes `text_config.rope_parameters`. Both are read. Embeddings are tied where either level says so, as in
transformers: 4.x may leave the top-level `tie_word_embeddings` out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cppo.config import ConfigError

FAMILIES = ("qwen2_5_vl",)


@dataclass(frozen=True, slots=True)
class VisionShape:
    """The vision tower; lengths in pixels, patches or features as named."""

    depth: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    out_size: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int

    @property
    def num_parameters(self) -> int:
        """Parameters of the tower with its merger, from the shapes of Qwen2.5-VL's modules."""
        h, f, merged = self.hidden_size, self.ffn_size, self.hidden_size * self.merge_size**2
        block = 2 * h + 4 * h * h + 4 * h + 3 * h * f + 2 * f + h
        merger = h + merged * merged + merged + merged * self.out_size + self.out_size
        return self.depth * block + merger + 3 * self.temporal_patch_size * self.patch_size**2 * h


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The language model, its special ids, and its vision tower."""

    family: str
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    norm_epsilon: float
    rope_theta: float
    mrope_section: tuple[int, ...]
    tied: bool
    image_token_id: int
    vision: VisionShape

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer (query, key and value have biases)."""
        h, qkv = self.hidden_size, (self.num_heads + 2 * self.num_kv_heads) * self.head_size
        return 2 * h + h * qkv + qkv + self.num_heads * self.head_size * h + 3 * h * self.ffn_size

    @property
    def num_parameters(self) -> int:
        """All parameters, vision included."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied else 2)
        return embeddings + self.num_layers * self.layer_parameters + self.hidden_size + self.vision.num_parameters


def read(folder: str) -> ModelShape:
    """The shape of the checkpoint in `folder`.

    Raises ConfigError when the folder is no checkpoint, or of a family that this package does not know.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ConfigError(f"model.path: {folder!r} holds no config.json; give a Hugging Face checkpoint folder")
    try:
        top: Any = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"model.path: {path} is not JSON ({error}); copy the checkpoint again") from error
    if not isinstance(top, dict):
        raise ConfigError(f"model.path: {path} is not a JSON object; copy the checkpoint again")
    if top.get("model_type") not in FAMILIES:
        raise ConfigError(f"model.path: model_type {top.get('model_type')!r} is not one of {', '.join(FAMILIES)}")
    try:
        return _shape(top)
    except KeyError as error:
        raise ConfigError(f"model.path: {path} has no field {error}; copy the checkpoint again") from error


def _shape(top: dict[str, Any]) -> ModelShape:
    text, vision = top.get("text_config", top), top["vision_config"]
    rope = text.get("rope_parameters") or {"rope_theta": text["rope_theta"], **(text.get("rope_scaling") or {})}
    return ModelShape(
        family=top["model_type"],
        num_layers=text["num_hidden_layers"],
        hidden_size=text["hidden_size"],
        ffn_size=text["intermediate_size"],
        num_heads=text["num_attention_heads"],
        num_kv_heads=text["num_key_value_heads"],
        head_size=text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"],
        vocab_size=text["vocab_size"],
        norm_epsilon=text["rms_norm_eps"],
        rope_theta=float(rope["rope_theta"]),
        mrope_section=tuple(rope["mrope_section"]),
        tied=bool(top.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
        image_token_id=top["image_token_id"],
        vision=VisionShape(
            depth=vision["depth"],
            hidden_size=vision["hidden_size"],
            ffn_size=vision["intermediate_size"],
            num_heads=vision["num_heads"],
            out_size=vision["out_hidden_size"],
            patch_size=vision["patch_size"],
            temporal_patch_size=vision["temporal_patch_size"],
            merge_size=vision["spatial_merge_size"],
        ),
    )
