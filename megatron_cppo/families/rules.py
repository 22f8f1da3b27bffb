"""Megatron parameter <-> Hugging Face tensors: what a rule of a family's mapping says, in both directions.

A rule says which Hugging Face tensors make one Megatron parameter, along which dimension tensor parallelism cuts each
of them (evenly), and how the cut pieces are joined. Because every tensor is cut *before* the pieces are joined, one
`join` serves a whole parameter and a shard of it alike: rank t of TP reads slice t of each tensor, and nothing else.
Names are those of official Qwen2.5-VL checkpoints (`model.layers...`, `visual...`, `lm_head.weight`) for all families;
of an expert, `mlp.experts.7.gate_proj.weight` and its kin (`experts.py` knows the stacks that checkpoints make of
them). What a folder calls a tensor is `storage/hf_folder.py`'s business.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_cppo.architecture import ModelShape
from megatron_cppo.config import ConfigError

Join = Callable[[Sequence[Tensor], ModelShape], Tensor]
Split = Callable[[Tensor, ModelShape], Sequence[Tensor]]


def join_one(pieces: Sequence[Tensor], _: ModelShape) -> Tensor:
    """A parameter that is one tensor."""
    return pieces[0]


def split_one(parameter: Tensor, _: ModelShape) -> Sequence[Tensor]:
    """Inverse of `join_one`."""
    return (parameter,)


def join_qkv(pieces: Sequence[Tensor], shape: ModelShape) -> Tensor:
    """q, k, v [heads * d, ...] -> Megatron's interleaving: per key/value head its queries, its key, its value."""
    kv_heads = pieces[1].shape[0] // shape.head_size
    grouped = [piece.unflatten(0, (kv_heads, -1)) for piece in pieces]
    return torch.cat(grouped, dim=1).flatten(0, 1)


def split_qkv(parameter: Tensor, shape: ModelShape) -> Sequence[Tensor]:
    """Inverse of `join_qkv`."""
    d, queries = shape.head_size, shape.num_heads // shape.num_kv_heads
    grouped = parameter.unflatten(0, (-1, (queries + 2) * d))
    return [part.flatten(0, 1) for part in grouped.split((queries * d, d, d), dim=1)]


def join_rows(pieces: Sequence[Tensor], _: ModelShape) -> Tensor:
    """gate, up -> Megatron's first MLP matrix, gate over up (of the shard, where the pieces are shards)."""
    return torch.cat(list(pieces))


def split_halves(parameter: Tensor, _: ModelShape) -> Sequence[Tensor]:
    """Inverse of `join_rows` for two pieces."""
    return parameter.chunk(2)


@dataclass(frozen=True, slots=True)
class Place:
    """Where Megatron's checkpoints keep a parameter: those of all layers, and experts, are stacked under one key.

    `aliases` are other keys under which some of Megatron-Core's modules ask for the same tensor.
    Example: Place("language_model.decoder.layers.mlp.experts.experts.linear_fc2.weight", (3, 17)): layer, expert.
    """

    key: str
    index: tuple[int, ...]
    aliases: tuple[str, ...] = ()

    def sizes(self, shape: ModelShape) -> tuple[int, ...]:
        """How many are stacked, of each number of `index`."""
        return (shape.num_layers, shape.num_experts)[: len(self.index)]


@dataclass(frozen=True, slots=True)
class Rule:
    """One kind of parameter. `{layer}` and `{expert}` are numbers within the whole model, `{rest}` any suffix.

    `axis` is the dimension of every Hugging Face tensor that TP cuts; None: replicated. `vocab`: dimension 0 is the
    vocabulary, which Megatron pads with zero rows to a multiple of TP. `expert`: held by one rank of EP, and cut over
    the experts' TP instead. `stored`: what Megatron's checkpoints call it, if not so: as Transformer Engine's modules,
    which fuse a norm with the product after it. `also`: what other modules than ours and theirs call it.
    """

    megatron: str
    hf: tuple[str, ...]
    axis: int | None = None
    join: Join = join_one
    split: Split = split_one
    vocab: bool = False
    expert: bool = False
    stored: str = ""
    also: str = ""

    @property
    def stacks_rows(self) -> bool:
        """Whether the parameter is its tensors, one below the other; TP cuts each of them apart."""
        return self.join is not join_qkv

    def place(self, values: Mapping[str, str]) -> Place:
        """Where Megatron's checkpoints keep the parameter of these placeholders."""
        index = tuple(int(values[name]) for name in ("layer", "expert") if name in values)
        key, *others = (_key(name).format(**values) for name in (self.stored, self.megatron, self.also) if name)
        return Place(key, index, tuple(others))

    def match(self, name: str) -> dict[str, str] | None:
        """The placeholders' values when `name` is of this kind."""
        found = _pattern(self.megatron).fullmatch(name)
        return found.groupdict() if found else None


@dataclass(frozen=True, slots=True)
class Binding:
    """A parameter of this rank's model, its rule, and the names of its Hugging Face tensors."""

    name: str
    parameter: nn.Parameter
    rule: Rule
    hf_names: tuple[str, ...]
    place: Place


@dataclass(frozen=True, slots=True)
class Mapped:
    """A parameter of the whole model, where there is no model: its name, rule, Hugging Face tensors, and place."""

    name: str
    rule: Rule
    hf_names: tuple[str, ...]
    place: Place


def mapped(hf_names: Iterable[str], rules: Sequence[Rule]) -> list[Mapped]:
    """The parameters that these Hugging Face tensors make, in the order of the names. Raises ConfigError.

    Its text lists the names that belong to no parameter, and those that are missing for one.
    """
    names = list(hf_names)
    there, found, used = set(names), [], set()
    patterns = [(rule, _pattern(rule.hf[0])) for rule in rules]
    for name in names:
        for rule, pattern in patterns:
            match = pattern.fullmatch(name)
            if match:
                values = match.groupdict()
                all_names = tuple(text.format(**values) for text in rule.hf)
                found.append(Mapped(rule.megatron.format(**values), rule, all_names, rule.place(values)))
                used |= set(all_names)
                break
    unknown, missing = sorted(there - used), sorted(used - there)
    if unknown or missing:
        raise ConfigError(
            f"{len(unknown)} tensors belong to no parameter {unknown[:4]}, {len(missing)} are missing {missing[:4]}; "
            "use an unmodified checkpoint of a supported family"
        )
    return found


def _key(name: str) -> str:
    """The key under which all layers, and experts, of a parameter are."""
    return name.replace("layers.{layer}.", "layers.").replace("local_experts.{expert}.", "experts.")


def _pattern(text: str) -> re.Pattern[str]:
    pattern = re.escape(text).replace(r"\{rest\}", "(?P<rest>.+)")
    for number in ("layer", "expert"):
        pattern = pattern.replace(rf"\{{{number}\}}", rf"(?P<{number}>\d+)")
    return re.compile(pattern)


def bind(named_parameters: Iterable[tuple[str, nn.Parameter]], rules: Sequence[Rule]) -> list[Binding]:
    """Find each parameter's rule. Layers and experts must be numbered over the whole model."""
    bindings = []
    for name, parameter in named_parameters:
        for rule in rules:
            values = rule.match(name)
            if values is not None:
                hf_names = tuple(text.format(**values) for text in rule.hf)
                bindings.append(Binding(name, parameter, rule, hf_names, rule.place(values)))
                break
        else:
            raise AssertionError(f"no mapping rule for the parameter {name!r}")
    return bindings


def whole_shapes(binding: Binding, *, shape: ModelShape, num_ranks: int) -> list[tuple[str, tuple[int, ...]]]:
    """Names and sizes of the whole Hugging Face tensors of a parameter that is cut over `num_ranks`."""
    rule, meta = binding.rule, torch.empty(binding.parameter.shape, device="meta")
    sizes = []
    for name, piece in zip(binding.hf_names, rule.split(meta, shape), strict=True):
        size = list(piece.shape)
        if rule.axis is not None:
            size[rule.axis] *= num_ranks
        sizes.append((name, tuple([shape.vocab_size, *size[1:]] if rule.vocab else size)))
    return sizes
