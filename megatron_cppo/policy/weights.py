"""Weights in and out of the policy: direct load of a Hugging Face folder, and the stream of whole tensors back.

Each rank reads only its slices, of its stage and its experts. A tensor that the model lacks, or that the folder lacks,
is an error.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_cppo import families
from megatron_cppo.config import ConfigError
from megatron_cppo.families.rules import Binding, bind, whole_shapes
from megatron_cppo.policy import quantized
from megatron_cppo.policy.agreement import everywhere
from megatron_cppo.policy.groups import Groups
from megatron_cppo.policy.model import VisionLanguageModel
from megatron_cppo.storage.hf_folder import Reader, pad_rows, vocabulary_rows

_LAYER = re.compile(r"(language_model\.decoder\.layers\.)(\d+)")
_EXPERT = re.compile(r"(\.mlp\.experts\.local_experts\.)(\d+)")
Chunks = Sequence[VisionLanguageModel]


def global_name(chunk: VisionLanguageModel, name: str) -> str:
    """The name of a module or parameter with its layer and expert numbered over the whole model."""
    found = _LAYER.search(name)
    if not found:
        return name
    layer = chunk.language_model.decoder.layers[int(found[2])]
    name = _LAYER.sub(lambda match: f"{match[1]}{layer.layer_number - 1}", name)
    return _EXPERT.sub(lambda match: f"{match[1]}{layer.mlp.local_expert_indices[int(match[2])]}", name)


def bindings(chunks: Chunks) -> list[Binding]:
    """Every parameter of this rank with its Hugging Face names."""
    shape = chunks[0].shape
    named = ((global_name(chunk, name), parameter) for chunk in chunks for name, parameter in chunk.named_parameters())
    rules = families.part(shape.family, "mapping").RULES
    bound = bind(named, rules)
    if not shape.tied:
        return bound
    # The last stage's copy is the embedding under another name.
    embedding = next(rule for rule in rules if rule.hf == ("model.embed_tokens.weight",))
    return [
        dataclasses.replace(b, hf_names=embedding.hf, place=embedding.place({}))
        if b.hf_names == ("lm_head.weight",)
        else b
        for b in bound
    ]


def cutting_group(binding: Binding, groups: Groups) -> dist.ProcessGroup:
    """The ranks that a parameter is cut over."""
    return groups.expert_tensor if binding.rule.expert else groups.tensor


def load(chunks: Chunks, folder: str) -> None:
    """Fill the model from a Hugging Face folder. Called by all ranks.

    Raises the same ConfigError on all of them; it names missing, unknown and misshapen tensors.
    """
    bound, groups = bindings(chunks), chunks[0].groups
    problems: list[str] = []
    with Reader(folder) as reader:
        every = everywhere({name for binding in bound for name in binding.hf_names}, groups.world)
        _compare_names(set().union(*every), reader.names, folder)
        for binding in bound:
            try:
                quantized.fill(binding.parameter, _read_shard(binding, reader, chunks[0]))
            except ConfigError as error:
                problems.append(str(error))
    found = sorted(set().union(*everywhere(set(problems), groups.world)))
    if found:
        listed = "; ".join(found[:4]) + (f"; and {len(found) - 4} more" if len(found) > 4 else "")
        raise ConfigError(f"model.path: {folder!r}: config and weights do not match: {listed}")


def _compare_names(wanted: set[str], found: set[str], folder: str) -> None:
    missing, unknown = sorted(wanted - found), sorted(found - wanted)
    if missing or unknown:
        raise ConfigError(
            f"model.path: {folder!r} does not fit its config.json: {len(missing)} tensors missing {missing[:4]}, "
            f"{len(unknown)} unknown {unknown[:4]}; use an unmodified checkpoint of a supported family"
        )


def _read_shard(binding: Binding, reader: Reader, model: VisionLanguageModel) -> Tensor:
    """This rank's shard of a parameter. Raises ConfigError when a tensor has not the size that the model needs."""
    rule, group = binding.rule, cutting_group(binding, model.groups)
    pieces = []
    for name, size in whole_shapes(binding, shape=model.shape, num_ranks=group.size()):
        found = tuple(reader.shape(name))
        if found != size:
            raise ConfigError(f"{name} is {found}, the model of its config.json needs {size}")
        if rule.axis is None:
            pieces.append(reader.read(name))
            continue
        if rule.vocab:
            padded = binding.parameter.shape[0] * group.size()
            start, stop, padding = vocabulary_rows(
                size[0], rank=group.rank(), num_ranks=group.size(), padded_rows=padded
            )
            pieces.append(pad_rows(reader.read(name, axis=0, start=start, stop=stop), padding))
            continue
        share = size[rule.axis] // group.size()
        pieces.append(reader.read(name, axis=rule.axis, start=group.rank() * share, stop=(group.rank() + 1) * share))
    return rule.join(pieces, model.shape)


def stream(
    chunks: Chunks, tensor_of: Callable[[nn.Parameter], Tensor] = quantized.values
) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors under their Hugging Face names, one parameter at a time; the same on every rank.

    Communicates over TP, over EP, then over PP: stage after stage sends its tensors to the others. `tensor_of` chooses
    what is streamed of a parameter (what the model computes with, or its gradient).
    """
    groups, shape = chunks[0].groups, chunks[0].shape
    pipeline = groups.pipeline
    # A tied embedding is the first stage's to send.
    copies = shape.tied and not groups.is_first_stage
    bound = [b for b in bindings(chunks) if not (copies and b.rule.vocab)]
    announced = [(tensor_of(b.parameter).dtype, _announced(b, chunks[0])) for b in bound]
    for stage, announcement in enumerate(everywhere(announced, pipeline)):
        if stage == pipeline.rank():
            for binding in bound:
                with torch.no_grad():
                    for name, whole in _whole(binding, tensor_of(binding.parameter), chunks[0]):
                        yield name, _sent(whole, pipeline, stage)
        else:
            for dtype, tensors in announcement:
                for name, size in tensors:
                    yield name, _sent(torch.empty(size, dtype=dtype, device=chunks[0].device), pipeline, stage)


def _announced(binding: Binding, model: VisionLanguageModel) -> list[tuple[str, tuple[int, ...]]]:
    """Names and sizes of what `_whole` will give of a parameter."""
    num_ranks = cutting_group(binding, model.groups).size()
    return [
        (name, size)
        for hf_name, size in whole_shapes(binding, shape=model.shape, num_ranks=num_ranks)
        for name in _names_over_experts(binding, hf_name, model)
    ]


def _whole(binding: Binding, tensor: Tensor, model: VisionLanguageModel) -> Iterator[tuple[str, Tensor]]:
    """The whole Hugging Face tensors of one parameter's shard (its weight, or its gradient).

    Communicates: one all-gather over the ranks that it is cut over, and for an expert another over EP, which brings
    the other ranks' experts. Every rank gets the result.
    """
    rule, group, shape = binding.rule, cutting_group(binding, model.groups), model.shape
    for hf_name, piece in zip(binding.hf_names, rule.split(tensor, shape), strict=True):
        whole = piece
        if rule.axis is not None and group.size() > 1:
            whole = _joined(piece, group, rule.axis)
        if rule.vocab:
            whole = whole[: shape.vocab_size]
        names = _names_over_experts(binding, hf_name, model)
        yield from zip(names, [whole] if len(names) == 1 else _tensors(whole, model.groups.expert), strict=True)


def _names_over_experts(binding: Binding, hf_name: str, model: VisionLanguageModel) -> list[str]:
    """An expert's tensor on every rank of EP: ranks hold runs of experts, in the order of the ranks."""
    expert = model.groups.expert
    if not binding.rule.expert or expert.size() == 1:
        return [hf_name]
    share = model.shape.num_experts // expert.size()
    before, number, after = re.split(r"(?<=\.experts\.)(\d+)", hf_name)
    return [f"{before}{rank * share + int(number) % share}{after}" for rank in range(expert.size())]


def _joined(mine: Tensor, group: dist.ProcessGroup, axis: int) -> Tensor:
    """All ranks' pieces, one behind the other; along the first axis, which the largest have, they are there once."""
    if axis:
        return torch.cat(_tensors(mine, group), dim=axis)
    whole = mine.new_empty((group.size() * len(mine), *mine.shape[1:]))
    dist.all_gather_into_tensor(whole, mine.contiguous(), group=group)
    return whole


def _tensors(mine: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    mine = mine.contiguous()
    parts = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(parts, mine, group=group)
    return parts


def _sent(whole: Tensor, pipeline: dist.ProcessGroup, stage: int) -> Tensor:
    """The tensor that `stage` holds, on all stages; the others give room for it."""
    if pipeline.size() == 1:
        return whole
    whole = whole.contiguous()
    dist.broadcast(whole, group=pipeline, group_src=stage)
    return whole
