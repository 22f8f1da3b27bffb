"""Weights in and out of the policy: direct load of a Hugging Face folder, and the stream of whole tensors back.

Each rank reads only its slices, of its stage. A tensor that the model lacks, or that the folder lacks, is an error.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_cppo.config import ConfigError
from megatron_cppo.policy.hf_folder import Reader, pad_rows, vocabulary_rows
from megatron_cppo.policy.mapping import Binding, bind, gather, whole_shapes
from megatron_cppo.policy.model import VisionLanguageModel, family

_LAYER = re.compile(r"(language_model\.decoder\.layers\.)(\d+)\.")


def bindings(model: VisionLanguageModel) -> list[Binding]:
    """Every parameter of this stage with its Hugging Face names; layers are numbered over the whole model."""
    layers = model.language_model.decoder.layers

    def global_name(name: str) -> str:
        return _LAYER.sub(lambda match: f"{match[1]}{layers[int(match[2])].layer_number - 1}.", name)

    named = ((global_name(name), parameter) for name, parameter in model.named_parameters())
    bound = bind(named, family(model.shape).RULES)
    if not model.shape.tied:
        return bound
    embedding = ("model.embed_tokens.weight",)
    return [dataclasses.replace(b, hf_names=embedding) if b.hf_names == ("lm_head.weight",) else b for b in bound]


def load(model: VisionLanguageModel, folder: str) -> None:
    """Fill the model from a Hugging Face folder. Called by all ranks.

    Raises the same ConfigError on all of them; it names missing, unknown and misshapen tensors.
    """
    bound = bindings(model)
    problems: list[str] = []
    with Reader(folder) as reader:
        every = _gathered({name for binding in bound for name in binding.hf_names}, model.groups.world)
        _compare_names(set().union(*every), reader.names, folder)
        for binding in bound:
            try:
                binding.parameter.data.copy_(_read_shard(binding, reader, model))
            except ConfigError as error:
                problems.append(str(error))
    found = sorted(set().union(*_gathered(set(problems), model.groups.world)))
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
    rule, group = binding.rule, model.groups.tensor
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
    model: VisionLanguageModel, tensor_of: Callable[[nn.Parameter], Tensor] = lambda parameter: parameter.data
) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors under their Hugging Face names, one parameter at a time; the same on every rank.

    Communicates over TP, then over PP: stage after stage sends its tensors to the others. `tensor_of` chooses what is
    streamed of a parameter (its data, or its gradient).
    """
    pipeline, tensor = model.groups.pipeline, model.groups.tensor
    # A tied embedding is the first stage's to send.
    copies = model.shape.tied and not model.groups.is_first_stage
    bound = [b for b in bindings(model) if not (copies and b.rule.vocab)]
    announced = [
        (name, size, tensor_of(b.parameter).dtype)
        for b in bound
        for name, size in whole_shapes(b, shape=model.shape, num_ranks=tensor.size())
    ]
    for stage, announcement in enumerate(_gathered(announced, pipeline)):
        if stage == pipeline.rank():
            for binding in bound:
                with torch.no_grad():
                    for name, whole in gather(binding, tensor_of(binding.parameter), shape=model.shape, group=tensor):
                        yield name, _sent(whole, pipeline, stage)
        else:
            for name, size, dtype in announcement:
                yield name, _sent(torch.empty(size, dtype=dtype, device=model.device), pipeline, stage)


def _sent(whole: Tensor, pipeline: dist.ProcessGroup, stage: int) -> Tensor:
    """The tensor that `stage` holds, on all stages; the others give room for it."""
    if pipeline.size() == 1:
        return whole
    whole = whole.contiguous()
    dist.broadcast(whole, group=pipeline, group_src=stage)
    return whole


def _gathered(mine: Any, group: dist.ProcessGroup) -> list[Any]:
    every: list[Any] = [None] * group.size()
    dist.all_gather_object(every, mine, group=group)
    return every
