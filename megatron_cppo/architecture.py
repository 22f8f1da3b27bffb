"""Reads a checkpoint's config.json into the numbers that the plan and the policy need. Standard library only.

Transformers 4.x writes the text fields at the top level or under `text_config`, with `rope_theta` and `rope_scaling`;
5.x writes `text_config.rope_parameters`. Both are read. Embeddings are tied where either level says so, as in
transformers: 4.x may leave the top-level `tie_word_embeddings` out.
"""

from __future__ import annotations

import json
import math
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

    Raises one ConfigError with all that is wrong: no checkpoint, a family or a variant that this package does not
    know, or fields that are missing or make no sense.
    """
    path = Path(folder) / "config.json"
    try:
        top: Any = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(
            f"model.path: {folder!r} holds no config.json; give a Hugging Face checkpoint folder"
        ) from error
    except OSError as error:
        raise ConfigError(f"model.path: {path} cannot be read ({error.strerror}); check its permissions") from error
    except ValueError as error:
        raise ConfigError(f"model.path: {path} is not JSON ({error}); copy the checkpoint again") from error
    if not isinstance(top, dict):
        raise ConfigError(f"model.path: {path} is not a JSON object; copy the checkpoint again")
    if top.get("model_type") not in FAMILIES:
        raise ConfigError(
            f"model.path: model_type {top.get('model_type')!r} is not one of {', '.join(FAMILIES)}; "
            "use a checkpoint of such a family"
        )
    problems: list[str] = []
    shape = _shape(top, problems)
    if problems:
        raise ConfigError(f"model.path: {path} {'; '.join(problems)}; copy the checkpoint again")
    problems = _unknown_variants(top) + _contradictions(shape)
    if problems:
        raise ConfigError(f"model.path: {path}: {'; '.join(problems)}")
    return shape


class _Fields:
    """The fields of one section of a config.json; what is missing or makes no sense is added to `problems`."""

    def __init__(self, values: Any, where: str, problems: list[str]) -> None:
        self._where, self._problems = where, problems
        self.values: dict[str, Any] = values if isinstance(values, dict) else {}
        if not isinstance(values, dict):
            problems.append(f"has {where.rstrip('.')} {values!r}, which must be an object")
        self._is_whole = isinstance(values, dict)

    def count(self, name: str, least: int = 1) -> int:
        """A whole number of at least `least`."""
        value = self._value(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            self._problems.append(f"has {self._where}{name} {value!r}, which must be a whole number from {least}")
            value = None
        return least if value is None else value

    def size(self, name: str) -> float:
        """A finite number above zero."""
        value = self._value(name)
        if value is not None and (
            not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf
        ):
            self._problems.append(f"has {self._where}{name} {value!r}, which must be a number above 0")
            value = None
        return 1.0 if value is None else float(value)

    def counts(self, name: str) -> tuple[int, ...]:
        """A list of whole numbers from one."""
        value = self._value(name)
        if value is not None and not (isinstance(value, list) and all(isinstance(n, int) and n > 0 for n in value)):
            self._problems.append(f"has {self._where}{name} {value!r}, which must be a list of whole numbers from 1")
            value = None
        return tuple(value or ())

    def _value(self, name: str) -> Any:
        if self._is_whole and self.values.get(name) is None:
            self._problems.append(f"has no field '{name}'")
        return self.values.get(name)


def _shape(top: dict[str, Any], problems: list[str]) -> ModelShape:
    """The shape, with ones where `problems` were found."""
    text = _Fields(top.get("text_config", top), "text_config." if "text_config" in top else "", problems)
    if "vision_config" not in top:
        problems.append("has no field 'vision_config'")
    vision = _Fields(top.get("vision_config", {}), "vision_config.", problems if "vision_config" in top else [])
    rope = _Fields(_rope(text.values), "rope.", problems)
    hidden, heads = text.count("hidden_size"), text.count("num_attention_heads")
    return ModelShape(
        family=top["model_type"],
        num_layers=text.count("num_hidden_layers"),
        hidden_size=hidden,
        ffn_size=text.count("intermediate_size"),
        num_heads=heads,
        num_kv_heads=text.count("num_key_value_heads"),
        head_size=text.count("head_dim") if text.values.get("head_dim") else hidden // heads,
        vocab_size=text.count("vocab_size"),
        norm_epsilon=text.size("rms_norm_eps"),
        rope_theta=rope.size("rope_theta"),
        mrope_section=rope.counts("mrope_section"),
        tied=bool(top.get("tie_word_embeddings") or text.values.get("tie_word_embeddings")),
        image_token_id=_Fields(top, "", problems).count("image_token_id", 0),
        vision=VisionShape(
            depth=vision.count("depth"),
            hidden_size=vision.count("hidden_size"),
            ffn_size=vision.count("intermediate_size"),
            num_heads=vision.count("num_heads"),
            out_size=vision.count("out_hidden_size"),
            patch_size=vision.count("patch_size"),
            temporal_patch_size=vision.count("temporal_patch_size"),
            merge_size=vision.count("spatial_merge_size"),
        ),
    )


def _rope(text: dict[str, Any]) -> Any:
    """Transformers 5's `rope_parameters`, or the same from 4's two fields."""
    scaling = text.get("rope_scaling")
    older = {"rope_theta": text.get("rope_theta"), **(scaling if isinstance(scaling, dict) else {})}
    return text.get("rope_parameters") or older


def _unknown_variants(top: dict[str, Any]) -> list[str]:
    """What the config asks for, and the policy would silently compute in another way."""
    text, problems = top.get("text_config", top), []
    if top.get("quantization_config"):
        problems.append(f"the weights are quantised ({top['quantization_config']}); use the checkpoint in bf16 or fp32")
    rope = _rope(text)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        problems.append(f"rotary positions are scaled (rope_type {kind!r}), only 'default' is supported; remove it")
    for name, section in (("text", text), ("vision", top["vision_config"])):
        if section.get("hidden_act", "silu") != "silu":
            problems.append(
                f"hidden_act of the {name} model is {section['hidden_act']!r}, only 'silu' is supported; "
                "use another checkpoint"
            )
    return problems


def _contradictions(shape: ModelShape) -> list[str]:
    """Fields that cannot all be true of one model."""
    problems = []
    if shape.num_heads % shape.num_kv_heads:
        problems.append(f"{shape.num_kv_heads} key/value heads do not divide {shape.num_heads} attention heads")
    if 2 * sum(shape.mrope_section) != shape.head_size:
        problems.append(
            f"mrope_section {list(shape.mrope_section)} must add up to half the head's size of {shape.head_size}"
        )
    if shape.vision.hidden_size % shape.vision.num_heads:
        problems.append(f"{shape.vision.num_heads} vision heads do not divide its size {shape.vision.hidden_size}")
    if shape.vision.out_size != shape.hidden_size:
        problems.append(f"vision features have size {shape.vision.out_size}, the model {shape.hidden_size}")
    if shape.image_token_id >= shape.vocab_size:
        problems.append(f"image_token_id {shape.image_token_id} is beyond the vocabulary of {shape.vocab_size}")
    return [*problems, "take config.json and weights from the same checkpoint"] if problems else []
