"""The numbers of a model that the plan and the policy need, and how they are read. Standard library only.

Owns the records, and what the families' config.json files have in common; what differs is in `families/*/shape.py`.
Transformers 4.x writes the text fields at the top level or under `text_config`, with `rope_theta` and `rope_scaling`;
5.x writes `text_config.rope_parameters`. Both are read. Whether embeddings are tied is the top level's to say: within
`text_config` transformers 5 writes a class's default.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class VisionShape:
    """The vision tower; lengths in pixels, patches or features as named.

    `deepstack_depths` are the blocks whose features are added after the first decoder layers, one layer each.
    """

    depth: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    out_size: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    num_parameters: int
    deepstack_depths: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The language model, its special ids, and its vision tower.

    `num_experts` is 0 for a dense model; else every layer has that many, of which each token takes
    `experts_per_token`, and `ffn_size` is one expert's.
    """

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
    qkv_bias: bool = False
    qk_norm: bool = False
    num_experts: int = 0
    experts_per_token: int = 0

    @property
    def attention_parameters(self) -> int:
        """Parameters of one layer's attention."""
        h, qkv = self.hidden_size, (self.num_heads + 2 * self.num_kv_heads) * self.head_size
        extra = (qkv if self.qkv_bias else 0) + (2 * self.head_size if self.qk_norm else 0)
        return h * qkv + self.num_heads * self.head_size * h + extra

    @property
    def expert_parameters(self) -> int:
        """Parameters of one expert, or of a dense layer's feed-forward network."""
        return 3 * self.hidden_size * self.ffn_size

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer: two norms, attention, and the feed-forward network or router and experts."""
        router = self.hidden_size * self.num_experts
        return (
            2 * self.hidden_size
            + self.attention_parameters
            + router
            + max(1, self.num_experts) * self.expert_parameters
        )

    @property
    def num_parameters(self) -> int:
        """All parameters, vision included."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied else 2)
        return embeddings + self.num_layers * self.layer_parameters + self.hidden_size + self.vision.num_parameters

    def contradictions(self) -> list[str]:
        """Fields that cannot all be true of one model."""
        problems, vision = [], self.vision
        if self.num_heads % self.num_kv_heads:
            problems.append(f"{self.num_kv_heads} key/value heads do not divide {self.num_heads} attention heads")
        if 2 * sum(self.mrope_section) != self.head_size:
            problems.append(
                f"mrope_section {list(self.mrope_section)} must add up to half the head's size of {self.head_size}"
            )
        if vision.hidden_size % vision.num_heads:
            problems.append(f"{vision.num_heads} vision heads do not divide its size {vision.hidden_size}")
        if vision.out_size != self.hidden_size:
            problems.append(f"vision features have size {vision.out_size}, the model {self.hidden_size}")
        if any(depth >= vision.depth for depth in vision.deepstack_depths):
            problems.append(f"deepstack blocks {list(vision.deepstack_depths)} are beyond the {vision.depth} there are")
        if len(vision.deepstack_depths) > self.num_layers:
            problems.append(
                f"{len(vision.deepstack_depths)} deepstack features need as many decoder layers, not {self.num_layers}"
            )
        if self.experts_per_token > self.num_experts:
            problems.append(f"{self.experts_per_token} experts per token of only {self.num_experts}")
        if self.image_token_id >= self.vocab_size:
            problems.append(f"image_token_id {self.image_token_id} is beyond the vocabulary of {self.vocab_size}")
        return problems


class Fields:
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

    def counts(self, name: str, least: int = 1) -> tuple[int, ...]:
        """A list of whole numbers of at least `least`."""
        value = self._value(name)
        if value is not None and not (
            isinstance(value, list) and all(isinstance(n, int) and n >= least for n in value)
        ):
            self._problems.append(
                f"has {self._where}{name} {value!r}, which must be a list of whole numbers from {least}"
            )
            value = None
        return tuple(value or ())

    def _value(self, name: str) -> Any:
        if self._is_whole and self.values.get(name) is None:
            self._problems.append(f"has no field '{name}'")
        return self.values.get(name)


def text_fields(top: dict[str, Any], problems: list[str]) -> Fields:
    """The language model's section, which older files have at the top level."""
    return Fields(top.get("text_config", top), "text_config." if "text_config" in top else "", problems)


def vision_fields(top: dict[str, Any], problems: list[str]) -> Fields:
    """The vision tower's section."""
    if "vision_config" not in top:
        problems.append("has no field 'vision_config'")
    return Fields(top.get("vision_config", {}), "vision_config.", problems if "vision_config" in top else [])


def language_numbers(top: dict[str, Any], text: Fields, problems: list[str]) -> dict[str, Any]:
    """Fields of `ModelShape` that all families spell alike, with ones where `problems` were found."""
    rope = Fields(rope_values(text.values), "rope.", problems)
    hidden, heads = text.count("hidden_size"), text.count("num_attention_heads")
    return {
        "family": top["model_type"],
        "num_layers": text.count("num_hidden_layers"),
        "hidden_size": hidden,
        "num_heads": heads,
        "num_kv_heads": text.count("num_key_value_heads"),
        "head_size": text.count("head_dim") if text.values.get("head_dim") else hidden // heads,
        "vocab_size": text.count("vocab_size"),
        "norm_epsilon": text.size("rms_norm_eps"),
        "rope_theta": rope.size("rope_theta"),
        "mrope_section": rope.counts("mrope_section"),
        "tied": bool(top.get("tie_word_embeddings")),
        "image_token_id": Fields(top, "", problems).count("image_token_id", 0),
    }


def vision_numbers(vision: Fields) -> dict[str, Any]:
    """Fields of `VisionShape` that all families spell alike."""
    return {
        "depth": vision.count("depth"),
        "hidden_size": vision.count("hidden_size"),
        "ffn_size": vision.count("intermediate_size"),
        "num_heads": vision.count("num_heads"),
        "out_size": vision.count("out_hidden_size"),
        "patch_size": vision.count("patch_size"),
        "temporal_patch_size": vision.count("temporal_patch_size"),
        "merge_size": vision.count("spatial_merge_size"),
    }


def rope_values(text: dict[str, Any]) -> Any:
    """Transformers 5's `rope_parameters`, or the same from 4's two fields."""
    scaling = text.get("rope_scaling")
    older = {"rope_theta": text.get("rope_theta"), **(scaling if isinstance(scaling, dict) else {})}
    return text.get("rope_parameters") or older


def unknown_language(top: dict[str, Any]) -> list[str]:
    """What any config may ask of the language model, and the policy would silently compute in another way."""
    text, problems = top.get("text_config", top), []
    if top.get("quantization_config"):
        problems.append(f"the weights are quantised ({top['quantization_config']}); use the checkpoint in bf16 or fp32")
    rope = rope_values(text)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        problems.append(f"rotary positions are scaled (rope_type {kind!r}), only 'default' is supported; remove it")
    return problems + unknown_activation("text", text, "silu")


def unknown_activation(name: str, section: dict[str, Any], known: str) -> list[str]:
    """A complaint when the model `name` asks for another activation than `known`."""
    found = section.get("hidden_act", known)
    if found == known:
        return []
    return [f"hidden_act of the {name} model is {found!r}, only {known!r} is supported; use another checkpoint"]
