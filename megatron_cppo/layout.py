"""Which layouts a model can be trained in: what is wrong with the one that was asked for, and the nearest that works.

Owns the rules between parallel sizes and the model's numbers; standard library only. What a layout means for batches
and memory is `plan.py`'s. What is proposed works with all the other choices as they are, where one value can.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from megatron_cppo.architecture import ModelShape
from megatron_cppo.config import Config, PolicyConfig


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` that is nearest to `wanted`, the smaller of two.

    >>> nearest_divisor(28, 8)
    7
    """
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: (abs(d - wanted), d))


def replica_ranks(policy: PolicyConfig) -> int:
    """Ranks that hold one copy of the model."""
    return policy.tensor_parallel * policy.context_parallel * policy.pipeline_parallel


def layers_per_chunk(policy: PolicyConfig, num_layers: int) -> tuple[int, ...]:
    """Decoder layers of each chunk in the order of the model: chunk c is on stage c modulo the stages."""
    chunks = policy.pipeline_parallel * policy.virtual_pipeline
    return policy.layers_per_stage or (num_layers // chunks,) * chunks


def problems(config: Config, shape: ModelShape | None, *, propose: bool = True) -> list[str]:
    """Everything that is wrong with the layout; without a shape, what can be said without one.

    With `propose` sizes are searched for that mend a problem and break nothing else.
    """
    policy = config.policy
    found = _rank_problems(config, shape if propose else None)
    if policy.sequence_parallel and policy.tensor_parallel == 1:
        found.append("policy.sequence_parallel: splits over TP ranks, but tensor_parallel is 1; turn it off")
    if policy.virtual_pipeline > 1 and policy.pipeline_parallel == 1:
        found.append(
            f"policy.virtual_pipeline: {policy.virtual_pipeline} chunks interleave several stages, but "
            "pipeline_parallel is 1; use 1"
        )
    if policy.device == "cpu" and policy.precision != "fp32":
        found.append("policy.precision: the cpu platform computes in fp32; use --policy.precision fp32")
    if policy.device == "cpu" and policy.head_backend == "triton":
        found.append("policy.head_backend: triton compiles for a GPU, but policy.device is cpu; use fused or torch")
    if policy.recompute_vision and not config.model.train_vision:
        found.append("policy.recompute_vision: the vision tower is frozen, nothing of it is kept; turn it off")
    sizes = (policy.tensor_parallel, policy.pipeline_parallel, policy.virtual_pipeline, policy.expert_parallel)
    if shape is None or min(*sizes, policy.context_parallel) < 1:
        return found
    if policy.virtual_pipeline == 1 or policy.pipeline_parallel > 1:
        found += _chunk_problems(config, shape, propose=propose)
    return [*found, *_tensor_problems(config, shape, propose=propose), *_expert_problems(config, shape)]


def _nearest_that_works(config: Config, shape: ModelShape, name: str, values: Iterable[int], wanted: int) -> int | None:
    """Of a policy's size the value nearest to `wanted` that mends what is wrong with it and breaks nothing else."""

    def having(value: int) -> Config:
        size: Any = {name: value}
        return replace(config, policy=replace(config.policy, **size))

    return _mending(config, shape, having, sorted(values, key=lambda value: (abs(value - wanted), value)))


def _mending(config: Config, shape: ModelShape, having: Callable[[int], Config], values: Iterable[int]) -> int | None:
    """The first of `values` that leaves fewer problems than there are; None when none does."""
    before = len(problems(config, shape, propose=False))
    return next((value for value in values if len(problems(having(value), shape, propose=False)) < before), None)


def _rank_problems(config: Config, shape: ModelShape | None) -> list[str]:
    policy, ranks, replica = config.policy, config.trainer.num_gpus, replica_ranks(config.policy)
    if min(replica, ranks) < 1 or ranks % replica == 0:
        return []
    nearest = max(1, round(ranks / replica)) * replica
    if shape is not None:  # experts need numbers of ranks of their own

        def having(value: int) -> Config:
            return replace(config, trainer=replace(config.trainer, num_gpus=value))

        multiples = range(replica, nearest + replica * max(1, shape.num_experts), replica)
        nearest = _mending(config, shape, having, sorted(multiples, key=lambda n: (abs(n - ranks), -n))) or nearest
    context = f"CP {policy.context_parallel} x " if policy.context_parallel > 1 else ""
    return [
        f"trainer.num_gpus: {ranks} ranks cannot be cut into replicas of {replica} "
        f"(TP {policy.tensor_parallel} x {context}PP {policy.pipeline_parallel}); use {nearest}"
    ]


def _tensor_problems(config: Config, shape: ModelShape, *, propose: bool) -> list[str]:
    policy = config.policy
    counts = {"attention heads": shape.num_heads, "key/value heads": shape.num_kv_heads}
    if not shape.num_experts or policy.expert_parallel == 1:  # dealt out, an expert is whole
        counts["feed-forward channels"] = shape.ffn_size
    undivided = [f"{count} {name}" for name, count in counts.items() if count % policy.tensor_parallel]
    if not undivided:
        return []
    divisors = math.gcd(*counts.values())
    values = [d for d in range(1, divisors + 1) if divisors % d == 0]
    nearest = nearest_divisor(divisors, policy.tensor_parallel)
    works = _nearest_that_works(config, shape, "tensor_parallel", values, policy.tensor_parallel) if propose else None
    use = f"use {works}" if works else f"use {nearest}, and another trainer.num_gpus"
    return [
        f"policy.tensor_parallel: {policy.tensor_parallel} does not divide the model's {', '.join(undivided)}; {use}"
    ]


def _expert_problems(config: Config, shape: ModelShape) -> list[str]:
    policy, experts = config.policy, config.policy.expert_parallel
    found = []
    if not shape.num_experts:
        return [f"policy.expert_parallel: {experts}, but the model has no experts; use 1"] if experts > 1 else []
    if policy.tensor_parallel > 1 and not policy.sequence_parallel:
        found.append(
            f"policy.sequence_parallel: with experts and tensor_parallel {policy.tensor_parallel} Megatron-Core trains "
            "under sequence parallelism only; use --policy.sequence_parallel True"
        )
    whole = config.trainer.num_gpus % replica_ranks(policy) == 0
    ranks = config.trainer.num_gpus // policy.pipeline_parallel if whole else shape.num_experts
    if shape.num_experts % experts or ranks % experts:
        nearest = nearest_divisor(math.gcd(shape.num_experts, ranks), experts)
        stage = f" and the {ranks} ranks of a stage (TP x CP x DP)" if whole else ""
        found.append(
            f"policy.expert_parallel: {experts} must divide the model's {shape.num_experts} experts{stage}; "
            f"use {nearest}"
        )
    return found


def _chunk_problems(config: Config, shape: ModelShape, *, propose: bool) -> list[str]:
    """How the layers cannot be cut into stages, or into the chunks of a virtual pipeline."""
    policy, num_layers, given = config.policy, shape.num_layers, config.policy.layers_per_stage
    stages, interleaved, name = policy.pipeline_parallel, policy.virtual_pipeline > 1, "policy.pipeline_parallel"
    chunks, each = stages * policy.virtual_pipeline, "chunk" if interleaved else "stage"
    what = f"{chunks} chunks ({stages} stages x virtual_pipeline)" if interleaved else f"{chunks} stages"
    if chunks > num_layers:
        return [f"{name}: {what}, but the model has {num_layers} layers; use fewer"]
    cut = _with_deepstack([num_layers // chunks + (chunk < num_layers % chunks) for chunk in range(chunks)], shape)
    use, enough = f"use {' '.join(map(str, cut))}", cut[0] >= len(shape.vision.deepstack_depths)
    if given and (len(given) != chunks or sum(given) != num_layers or min(given) < 1):
        size = f"pipeline_parallel is {stages}" + (
            f", virtual_pipeline {policy.virtual_pipeline}" if interleaved else ""
        )
        return [
            f"policy.layers_per_stage: {' '.join(map(str, given))} are {len(given)} {each}s with {sum(given)} layers; "
            f"{size}, the model has {num_layers} layers, and each {each} needs one; {use if enough else 'use fewer'}"
        ]
    if not given and num_layers % chunks:
        values = [d for d in range(1, num_layers + 1) if num_layers % (d * policy.virtual_pipeline) == 0]
        nearest = _nearest_that_works(config, shape, "pipeline_parallel", values, stages) if propose else None
        other = "others whose product does" if interleaved else str(nearest or nearest_divisor(num_layers, stages))
        yourself = f", or cut them yourself: --policy.layers_per_stage {use.removeprefix('use ')}" if enough else ""
        return [
            f"{name}: {what if interleaved else chunks} does not divide the model's {num_layers} layers; "
            f"use {other}{yourself}"
        ]
    first, wanted = layers_per_chunk(policy, num_layers)[0], len(shape.vision.deepstack_depths)
    if first < wanted:
        return [
            f"policy.layers_per_stage: the first {each} has {first} layers, but vision features are added after each "
            f"of the first {wanted} layers, where the tower is; {use if enough else 'use fewer'}"
        ]
    return []


def _with_deepstack(even: list[int], shape: ModelShape) -> list[int]:
    """`even`, with as many layers on the first chunk as deepstack needs, taken from the largest others."""
    cut = list(even)
    while cut[0] < len(shape.vision.deepstack_depths) and max(cut[1:], default=0) > 1:
        largest = max(range(1, len(cut)), key=lambda chunk: (cut[chunk], chunk))
        cut[largest] -= 1
        cut[0] += 1
    return cut
