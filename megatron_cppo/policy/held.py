"""What this rank holds of the model and of Adam's state, and where it lies in a checkpoint's tensors.

A checkpoint has one tensor of each parameter (layers and experts stacked), and three more of its master weight and
moments, whatever the layout: each rank knows which rectangles of them are its own. Parameters that are kept in FP8 are
in it as they would be in bf16, rounded from their master weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron_cppo.families.rules import Binding
from megatron_cppo.policy import weights
from megatron_cppo.policy.build import Trained
from megatron_cppo.policy.groups import Groups
from megatron_cppo.policy.model import VisionLanguageModel
from megatron_cppo.policy.quantized import is_quantized
from megatron_cppo.storage.rectangles import Held, Rows, share

STATES = {"param": "fp32_param", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
"""Megatron's names of a parameter's master weight and moments, and what checkpoints call them."""
# Smaller parameters are written by one of their holders alone.
_DEALT_BYTES = 2**20


def held(binding: Binding, model: VisionLanguageModel) -> Held:
    """Where this rank's shard of a parameter lies."""
    rule, group, shape = binding.rule, weights.cutting_group(binding, model.groups), model.shape
    mine = tuple(binding.parameter.shape)
    ranks, rank = (1, 0) if rule.axis is None else (group.size(), group.rank())
    place, sizes = binding.place, binding.place.sizes(shape)
    if rule.axis == 1:
        whole = (mine[0], mine[1] * ranks, *mine[2:])
        return Held(place.key, (*sizes, *whole), place.index, mine, (Rows(0, mine[0], 0),), column=rank * mine[1])
    if rule.vocab:
        start, stop = (min(at * mine[0], shape.vocab_size) for at in (rank, rank + 1))
        size = (*sizes, shape.vocab_size, *mine[1:])
        return Held(place.key, size, place.index, mine, (Rows(0, stop - start, start),))
    if not mine:
        raise AssertionError(f"{binding.name} is a number, not a tensor")
    counts = [mine[0]]
    if rule.stacks_rows and len(binding.hf_names) > 1:
        counts = [part.shape[0] for part in rule.split(torch.empty(mine, device="meta"), shape)]
    rows, here = [], 0
    for count in counts:
        rows.append(Rows(here, count, here * ranks + rank * count))
        here += count
    return Held(place.key, (*sizes, mine[0] * ranks, *mine[1:]), place.index, mine, tuple(rows))


@dataclass(frozen=True, slots=True)
class Item:
    """Numbers that this rank holds: all of a shard, or from `start` on; `tensor` is flat, and a view of them.

    `writes`: the part [start, stop) of the shard that this rank is to write; other holders write the rest.
    `rounded_to`: a master weight, to be written as this type where the model has FP8 numbers instead; not to be read.
    """

    held: Held
    key: str
    tensor: Tensor
    start: int
    writes: tuple[int, int]
    rounded_to: torch.dtype | None = None


def items(trained: Trained) -> list[Item]:
    """Everything that this rank holds: parameters, then the optimizer's state. Adam's must be initialised."""
    found: list[Item] = []
    groups, first_stage = trained.groups, trained.groups.is_first_stage
    bound = weights.bindings(trained.chunks)
    places = [held(binding, trained.chunks[0]) for binding in bound]
    for number, (binding, place) in enumerate(zip(bound, places, strict=True)):
        # A tied head is a copy of the embedding, which the first stage writes.
        copy = trained.shape.tied and binding.rule.vocab and not first_stage
        part = (0, 0) if copy else _dealt(binding, number, groups)
        if not is_quantized(binding.parameter):  # its master weight is written instead
            found.append(Item(place, place.key, binding.parameter.data.view(-1), 0, part))
    for number, (binding, place) in enumerate(zip(bound, places, strict=True)):
        copy = trained.shape.tied and binding.rule.vocab and not first_stage
        if binding.parameter.requires_grad:
            found += _states(trained, binding, place, (0, 0) if copy else _dealt(binding, number, groups), copy=copy)
    return found


def _dealt(binding: Binding, number: int, groups: Groups) -> tuple[int, int]:
    """The part of a shard that falls to this one of its holders: whole rows, or all of a small one."""
    rank, holders = _holders(binding, groups)
    parameter = binding.parameter
    if parameter.nbytes < _DEALT_BYTES * holders:
        return (0, parameter.numel()) if number % holders == rank else (0, 0)
    rows = parameter.shape[0]
    start, stop = share(rows, rank, holders)
    return start * parameter.numel() // rows, stop * parameter.numel() // rows


def _holders(binding: Binding, groups: Groups) -> tuple[int, int]:
    """This rank among those that hold the same shard, and how many they are."""
    replicas: Any = groups.collection.expt_dp if binding.rule.expert else groups.collection.dp_cp
    if binding.rule.axis is not None:
        return replicas.rank(), replicas.size()
    group = weights.cutting_group(binding, groups)
    return replicas.rank() * group.size() + group.rank(), replicas.size() * group.size()


def _states(trained: Trained, binding: Binding, place: Held, part: tuple[int, int], *, copy: bool) -> Iterator[Item]:
    """The master weight and moments of a parameter that this rank holds.

    The distributed optimizer deals a shard's numbers over its holders: each has its own, and writes them. But a
    parameter that is replicated over TP too is dealt over each TP rank's data-parallel group alike.
    """
    for inner in inner_optimizers(trained):
        owned = _owned(inner, binding.parameter)
        if owned is None:
            continue
        start, tensors, dealt = owned
        for name, tensor in tensors.items():
            if name not in STATES or (name == "param" and binding.parameter.dtype is torch.float32):
                continue  # in fp32 the weight is its own master
            writes = part
            if dealt:
                group = weights.cutting_group(binding, trained.groups)
                twice = copy or (binding.rule.axis is None and group.rank() > 0)
                writes = (start, start) if twice else (start, start + tensor.numel())
            yield Item(place, f"optimizer.state.{STATES[name]}.{place.key}", tensor.view(-1), start, writes)
            if name == "param" and is_quantized(binding.parameter):
                yield Item(place, place.key, tensor.view(-1), start, writes, rounded_to=binding.parameter.dtype)


def _owned(inner: Any, parameter: nn.Parameter) -> tuple[int, dict[str, Tensor], bool] | None:
    """(where they start in the flat shard, master weight and moments, whether they are dealt) in one optimizer."""
    if hasattr(inner, "model_param_gbuf_map"):
        if parameter not in inner.model_param_group_index_map:
            return None
        owned = inner._get_model_param_range_map(parameter)["param"]
        group, place = inner.model_param_group_index_map[parameter]
        shard = inner.optimizer.param_groups[group]["params"][place]
        # The tensors themselves: what Megatron-Core gives of moments in bf16 are copies. Adam may hold the master.
        state = inner.optimizer.state[shard]
        return owned.start, {"param": state.get("master_param", shard), **state}, True
    main = getattr(parameter, "main_param", None)
    main = parameter if main is None else main
    if main not in inner.optimizer.state:
        return None
    return 0, {"param": main.data, **inner.optimizer.state[main]}, False


def inner_optimizers(trained: Trained) -> list[Any]:
    """Megatron-Core's optimizers under the one that chains them (experts have their own)."""
    return getattr(trained.optimizer, "chained_optimizers", [trained.optimizer])
