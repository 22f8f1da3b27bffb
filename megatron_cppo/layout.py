"""Which layouts a model can be trained in: what is wrong with the one that was asked for, and the nearest that works.

Owns the rules between parallel sizes and the model's numbers; standard library only. What a layout means for batches
and memory is `plan.py`'s. "Nearest" is a value that works with all the others as they are.
"""

from __future__ import annotations

import math

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


def problems(config: Config, shape: ModelShape | None) -> list[str]:
    """Everything that is wrong with the layout; without a shape, what can be said without one."""
    policy = config.policy
    found = _rank_problems(config)
    if policy.sequence_parallel and policy.tensor_parallel == 1:
        found.append("policy.sequence_parallel: splits over TP ranks, but tensor_parallel is 1; turn it off")
    if policy.virtual_pipeline > 1 and policy.pipeline_parallel == 1:
        found.append(
            f"policy.virtual_pipeline: {policy.virtual_pipeline} chunks interleave several stages, but "
            "pipeline_parallel is 1; use 1"
        )
    if policy.device == "cpu" and policy.precision != "fp32":
        found.append("policy.precision: the cpu platform computes in fp32; use --policy.precision fp32")
    if policy.recompute_vision and not config.model.train_vision:
        found.append("policy.recompute_vision: the vision tower is frozen, nothing of it is kept; turn it off")
    sizes = (policy.tensor_parallel, policy.pipeline_parallel, policy.virtual_pipeline, policy.expert_parallel)
    if shape is None or min(*sizes, policy.context_parallel) < 1:
        return found
    chunks = [] if policy.virtual_pipeline > 1 and policy.pipeline_parallel == 1 else _chunk_problems(policy, shape)
    return [*found, *chunks, *_tensor_problems(policy, shape), *_expert_problems(config, shape)]


def _rank_problems(config: Config) -> list[str]:
    policy, ranks, replica = config.policy, config.trainer.num_gpus, replica_ranks(config.policy)
    if min(replica, ranks) < 1 or ranks % replica == 0:
        return []
    nearest = max(1, round(ranks / replica)) * replica
    context = f"CP {policy.context_parallel} x " if policy.context_parallel > 1 else ""
    return [
        f"trainer.num_gpus: {ranks} ranks cannot be cut into replicas of {replica} "
        f"(TP {policy.tensor_parallel} x {context}PP {policy.pipeline_parallel}); use {nearest}"
    ]


def _tensor_problems(policy: PolicyConfig, shape: ModelShape) -> list[str]:
    counts = {"attention heads": shape.num_heads, "key/value heads": shape.num_kv_heads}
    if not shape.num_experts or policy.expert_parallel == 1:  # dealt out, an expert is whole
        counts["feed-forward channels"] = shape.ffn_size
    undivided = [f"{count} {name}" for name, count in counts.items() if count % policy.tensor_parallel]
    if not undivided:
        return []
    nearest = nearest_divisor(math.gcd(*counts.values()), policy.tensor_parallel)
    return [
        f"policy.tensor_parallel: {policy.tensor_parallel} does not divide the model's {', '.join(undivided)}; "
        f"use {nearest}"
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
    replica = replica_ranks(policy)
    if replica < 1 or config.trainer.num_gpus % replica:
        return found
    ranks = config.trainer.num_gpus // policy.pipeline_parallel
    if shape.num_experts % experts or ranks % experts:
        nearest = nearest_divisor(math.gcd(shape.num_experts, ranks), experts)
        found.append(
            f"policy.expert_parallel: {experts} must divide the model's {shape.num_experts} experts and the {ranks} "
            f"ranks of a stage (TP x CP x DP); use {nearest}"
        )
    return found


def _chunk_problems(policy: PolicyConfig, shape: ModelShape) -> list[str]:
    """How the layers cannot be cut into stages, or into the chunks of a virtual pipeline."""
    stages, num_layers, given = policy.pipeline_parallel, shape.num_layers, policy.layers_per_stage
    chunks, interleaved, name = (
        stages * policy.virtual_pipeline,
        policy.virtual_pipeline > 1,
        "policy.pipeline_parallel",
    )
    what = f"{chunks} chunks ({stages} stages x virtual_pipeline)" if interleaved else f"{chunks} stages"
    if chunks > num_layers:
        return [f"{name}: {what}, but the model has {num_layers} layers; use fewer"]
    even = [num_layers // chunks + (chunk < num_layers % chunks) for chunk in range(chunks)]
    cut = " ".join(map(str, _with_deepstack(even, shape)))
    if given and (len(given) != chunks or sum(given) != num_layers or min(given) < 1):
        each = "chunk" if interleaved else "stage"
        size = f"pipeline_parallel is {stages}" + (
            f", virtual_pipeline {policy.virtual_pipeline}" if interleaved else ""
        )
        return [
            f"policy.layers_per_stage: {' '.join(map(str, given))} are {len(given)} {each}s with {sum(given)} layers; "
            f"{size}, the model has {num_layers} layers, and each {each} needs one; use {cut}"
        ]
    if not given and num_layers % chunks:
        nearest = nearest_divisor(num_layers, chunks)
        use = "others whose product does, or cut" if interleaved else f"{nearest}, or cut"
        return [
            f"{name}: {what if interleaved else chunks} does not divide the model's {num_layers} "
            f"layers; use {use} them yourself: --policy.layers_per_stage {cut}"
        ]
    first, wanted = layers_per_chunk(policy, num_layers)[0], len(shape.vision.deepstack_depths)
    if first < wanted:
        can = _with_deepstack(even, shape)[0] >= wanted
        use = cut if can else f"at most {num_layers - wanted + 1} of them"
        each = "chunk" if interleaved else "stage"
        return [
            f"policy.layers_per_stage: the first {each} has {first} layers, but vision features are added after each "
            f"of the first {wanted} layers, where the tower is; use {use}"
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
