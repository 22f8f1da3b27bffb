"""Weights in and out of the policy: direct load of a Hugging Face folder, and the stream of whole tensors back.

Each rank reads only its slices. A tensor that the model lacks, or that the folder lacks, is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from megatron_cppo.config import ConfigError
from megatron_cppo.policy.hf_folder import Reader, pad_rows, vocabulary_rows
from megatron_cppo.policy.mapping import Binding, bind, gather
from megatron_cppo.policy.model import VisionLanguageModel, family

_LAYER = re.compile(r"(language_model\.decoder\.layers\.)(\d+)\.")


def bindings(model: VisionLanguageModel) -> list[Binding]:
    """Every parameter of this stage with its Hugging Face names; layers are numbered over the whole model."""
    layers = model.language_model.decoder.layers

    def global_name(name: str) -> str:
        return _LAYER.sub(lambda match: f"{match[1]}{layers[int(match[2])].layer_number - 1}.", name)

    named = ((global_name(name), parameter) for name, parameter in model.named_parameters())
    return bind(named, family(model.shape).RULES)


def load(model: VisionLanguageModel, folder: str) -> None:
    """Fill the model from a Hugging Face folder. Raises ConfigError that names missing, unknown, misshapen tensors."""
    bound = bindings(model)
    with Reader(folder) as reader:
        wanted = {name for binding in bound for name in binding.hf_names}
        _compare_names(wanted, reader.names, folder)
        for binding in bound:
            shard = _read_shard(binding, reader, model, folder)
            if shard.shape != binding.parameter.shape:
                raise ConfigError(
                    f"model.path: {folder!r}: {' + '.join(binding.hf_names)} make {tuple(shard.shape)}, the model of "
                    f"its config.json needs {tuple(binding.parameter.shape)} per rank; config and weights do not match"
                )
            binding.parameter.data.copy_(shard)


def _compare_names(wanted: set[str], found: set[str], folder: str) -> None:
    missing, unknown = sorted(wanted - found), sorted(found - wanted)
    if missing or unknown:
        raise ConfigError(
            f"model.path: {folder!r} does not fit its config.json: {len(missing)} tensors missing {missing[:4]}, "
            f"{len(unknown)} unknown {unknown[:4]}; use an unmodified checkpoint of a supported family"
        )


def _read_shard(binding: Binding, reader: Reader, model: VisionLanguageModel, folder: str) -> Tensor:
    rule, group = binding.rule, model.groups.tensor
    pieces = []
    for name in binding.hf_names:
        if rule.axis is None:
            pieces.append(reader.read(name))
            continue
        size = reader.shape(name)[rule.axis]
        if rule.vocab:
            padded = binding.parameter.shape[0] * group.size()
            start, stop, padding = vocabulary_rows(size, rank=group.rank(), num_ranks=group.size(), padded_rows=padded)
            pieces.append(pad_rows(reader.read(name, axis=0, start=start, stop=stop), padding))
            continue
        if size % group.size():
            raise ConfigError(f"model.path: {folder!r}: {name} has size {size}, not divisible by TP {group.size()}")
        share = size // group.size()
        pieces.append(reader.read(name, axis=rule.axis, start=group.rank() * share, stop=(group.rank() + 1) * share))
    return rule.join(pieces, model.shape)


def stream(
    model: VisionLanguageModel, tensor_of: Callable[[nn.Parameter], Tensor] = lambda parameter: parameter.data
) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors under their Hugging Face names, one parameter at a time; the same on every rank.

    Communicates over TP. `tensor_of` chooses what is streamed of a parameter (its data, or its gradient).
    """
    for binding in bindings(model):
        with torch.no_grad():
            yield from gather(binding, tensor_of(binding.parameter), shape=model.shape, group=model.groups.tensor)
