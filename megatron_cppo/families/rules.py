"""Megatron parameter <-> Hugging Face tensors: what a rule of a family's mapping says, in both directions.

A rule says which Hugging Face tensors make one Megatron parameter, along which dimension tensor parallelism cuts each
of them (evenly), and how the cut pieces are joined. Because every tensor is cut *before* the pieces are joined, one
`join` serves a whole parameter and a shard of it alike: rank t of TP reads slice t of each tensor, and nothing else.
Names are those of official Qwen2.5-VL checkpoints (`model.layers...`, `visual...`, `lm_head.weight`) for all families;
of an expert, `mlp.experts.7.gate_proj.weight` and its kin (`experts.py` knows the stacks that checkpoints make of
them). What a folder calls a tensor is `policy/hf_folder.py`'s business.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_cppo.architecture import ModelShape

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
class Rule:
    """One kind of parameter. `{layer}` and `{expert}` are numbers within the whole model, `{rest}` any suffix.

    `axis` is the dimension of every Hugging Face tensor that TP cuts; None: replicated. `vocab`: dimension 0 is the
    vocabulary, which Megatron pads with zero rows to a multiple of TP. `expert`: held by one rank of EP, and cut over
    the experts' TP instead.
    """

    megatron: str
    hf: tuple[str, ...]
    axis: int | None = None
    join: Join = join_one
    split: Split = split_one
    vocab: bool = False
    expert: bool = False

    def match(self, name: str) -> dict[str, str] | None:
        """The placeholders' values when `name` is of this kind."""
        pattern = re.escape(self.megatron).replace(r"\{rest\}", "(?P<rest>.+)")
        for number in ("layer", "expert"):
            pattern = pattern.replace(rf"\{{{number}\}}", rf"(?P<{number}>\d+)")
        found = re.fullmatch(pattern, name)
        return found.groupdict() if found else None


@dataclass(frozen=True, slots=True)
class Binding:
    """A parameter of this rank's model, its rule, and the names of its Hugging Face tensors."""

    name: str
    parameter: nn.Parameter
    rule: Rule
    hf_names: tuple[str, ...]


def bind(named_parameters: Iterable[tuple[str, nn.Parameter]], rules: Sequence[Rule]) -> list[Binding]:
    """Find each parameter's rule. Layers and experts must be numbered over the whole model."""
    bindings = []
    for name, parameter in named_parameters:
        for rule in rules:
            values = rule.match(name)
            if values is not None:
                hf_names = tuple(text.format(**values) for text in rule.hf)
                bindings.append(Binding(name=name, parameter=parameter, rule=rule, hf_names=hf_names))
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
