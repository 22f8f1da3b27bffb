"""What a run takes of each GPU's memory: measured bytes, put together by the schedule, and named allowances.

Standard library only. The bytes come from `policy/footprint.py`, which counts them on the policy's own modules; what
fake tensors cannot show is an allowance here. Knows nothing of how it is printed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_cppo import serving
from megatron_cppo.config import Config
from megatron_cppo.plan import Plan
from megatron_cppo.precision import PRECISIONS

GIB = 2**30


@dataclass(frozen=True, slots=True)
class ChunkBytes:
    """One row through one chunk of layers, in bytes above what is always there.

    `kept` lives from the row's forward to its backward, of which `vision` in the tower; `forward_peak` and
    `backward_peak` (which holds `kept`) are the most during either. `received` and `sent` are hidden states' bytes, 0
    where there is no stage before or after.
    """

    forward_peak: int
    kept: int
    backward_peak: int
    vision: int
    received: int
    sent: int


@dataclass(frozen=True, slots=True)
class StageBytes:
    """What a rank of one stage holds, in bytes.

    `buffers` are Megatron-Core's for gathered sequences; `reduction` is the most, beside all of it, while gradients are
    reduced.
    """

    parameters: int
    vision_parameters: int
    gradients: int
    optimizer: int
    reference: int
    buffers: int
    chunks: tuple[ChunkBytes, ...]
    reduction: int
    seconds: float


def events(stage: int, num_stages: int, num_chunks: int) -> list[tuple[str, int]]:
    """("forward" or "backward", chunk) in the order in which Megatron-Core's schedules run a stage, for as many rows as
    fill the pipeline twice.

    >>> events(0, 2, 1)[:4]
    [('forward', 0), ('forward', 0), ('backward', 0), ('forward', 0)]
    """
    total = 2 * num_stages * num_chunks
    warmup = num_stages - stage - 1
    if num_chunks > 1:
        warmup = min(total, 2 * warmup + (num_chunks - 1) * num_stages)

    def chunk(number: int) -> int:
        return number // num_stages % num_chunks

    forwards = [("forward", chunk(number)) for number in range(total)]
    backwards = [("backward", num_chunks - 1 - chunk(number)) for number in range(total)]
    steady = [event for pair in zip(forwards[warmup:], backwards[: total - warmup], strict=True) for event in pair]
    return [*forwards[:warmup], *steady, *backwards[total - warmup :]]


@dataclass(frozen=True, slots=True)
class Peak:
    """The fullest moment of a schedule, in bytes above what is always there: rows in flight by chunk, what they keep
    (of which the tower's), and what the pass that runs then needs beside that."""

    rows: tuple[int, ...]
    kept: int
    vision: int
    working: int

    @property
    def total(self) -> int:
        """Of kept and working."""
        return self.kept + self.working


def schedule_peak(chunks: tuple[ChunkBytes, ...], stage: int, num_stages: int) -> Peak:
    """The fullest moment of a stage with these chunks. A backward's row counts as in flight.

    Megatron-Core 0.16.1's schedules still hold what the last backward sent and was sent, and its output, when the next
    pass begins.
    """
    live, fullest, late = [0] * len(chunks), Peak((0,), 0, 0, 0), False
    for kind, number in events(stage, num_stages, len(chunks)):
        chunk, forward = chunks[number], kind == "forward"
        live[number] += forward
        kept = sum(count * one.kept for count, one in zip(live, chunks, strict=True))
        working = (chunk.forward_peak if forward else chunk.backward_peak) - chunk.kept
        working += late * (chunk.received + 2 * forward * chunk.sent)
        if kept + working > fullest.total:
            vision = sum(count * one.vision for count, one in zip(live, chunks, strict=True))
            fullest = Peak(tuple(live), kept, vision, working)
        live[number] -= not forward
        late = late or not forward
    return fullest


UNSEEN_GIB = {
    # Of an H100 with NVIDIA's driver 550: what nvidia-smi shows of a process that has made one tensor.
    "CUDA context": 0.6,
    # cuBLAS has 32 MiB for each handle and stream on this GPU (its documentation); the others as much again, and more.
    "cuBLAS, cuDNN and Transformer Engine's workspaces": 0.4,
}
"""Allowances for a process that no tensor shows, GiB."""
COMMUNICATOR_GIB = 0.15
"""NCCL's channels of one communicator: up to 32 with buffers of 4 MiB (NCCL_BUFFSIZE's default), and what is for each
peer."""
FRAGMENTATION = 0.06
"""Share of the tensors' bytes that the allocator holds beside them."""
ASLEEP_GIB = 1.5
"""A sleeping vLLM's context, graphs and communicators."""
ENGINE_WORKING_GIB = 4.0
"""Of vLLM's share: its context, graphs, and the activations of a prefill."""
ENOUGH_SPARE = 0.15
"""Below it the verdict is "tight": rows are not all alike, and drivers differ."""


@dataclass(frozen=True, slots=True)
class StageSize:
    """One GPU of a stage, in GiB by item: what is always there, what an update adds at its peak, what rollouts add."""

    resident: dict[str, float]
    update: dict[str, float]
    rollouts: dict[str, float]
    rows: tuple[int, ...]

    @property
    def update_gib(self) -> float:
        """At the peak of an update."""
        return sum(self.resident.values()) + sum(self.update.values())

    @property
    def rollouts_gib(self) -> float:
        """While rollouts are sampled, and weights loaded."""
        return sum(self.resident.values()) + sum(self.rollouts.values())

    @property
    def peak_gib(self) -> float:
        """The most."""
        return max(self.update_gib, self.rollouts_gib)

    def spare(self, gpu_gib: float) -> float:
        """Share of the GPU that is left; negative where it does not fit."""
        return 1 - self.peak_gib / gpu_gib

    def verdict(self, gpu_gib: float) -> str:
        """In a word."""
        spare = self.spare(gpu_gib)
        return "does not fit" if spare < 0 else "tight" if spare < ENOUGH_SPARE else "fits"


def size(config: Config, plan: Plan, measured: Sequence[StageBytes], *, gpu_gib: float) -> tuple[StageSize, ...]:
    """What each stage's GPUs hold, in the order of the stages."""
    stages = len(measured)
    return tuple(_size(config, plan, found, stage, stages, gpu_gib) for stage, found in enumerate(measured))


def _size(config: Config, plan: Plan, found: StageBytes, stage: int, stages: int, gpu_gib: float) -> StageSize:
    peak = schedule_peak(found.chunks, stage, stages)
    resident = {
        "parameters": (found.parameters - found.vision_parameters) / GIB,
        "parameters of the vision tower": found.vision_parameters / GIB,
        "gradients": found.gradients / GIB,
        "optimizer": found.optimizer * _state_share(config) / GIB,
        "reference": found.reference / GIB,
        "buffers for gathered sequences": found.buffers / GIB,
    }
    activations = {
        "activations": (peak.kept - peak.vision) / GIB,
        "activations of the vision tower": peak.vision / GIB,
        "backward": peak.working / GIB,
    }
    if found.reduction > peak.total:  # which comes when all rows are through
        activations = dict.fromkeys(activations, 0.0) | {"backward": found.reduction / GIB}
    always = sum(resident.values())
    resident |= UNSEEN_GIB | {
        f"NCCL, {num_communicators(config, plan)} communicators": COMMUNICATOR_GIB * num_communicators(config, plan),
        f"fragmentation, {FRAGMENTATION:.0%} of what is always there": FRAGMENTATION * always,
    }
    if plan.memory.fp8_copies_gib:
        # Of the stage that has most of them: Transformer Engine's, of the matrices as they are and transposed.
        resident["copies in FP8"] = plan.memory.fp8_copies_gib
    where = plan.serving.where if config.policy.device == "cuda" and plan.serving is not None else ""
    update = activations | {f"fragmentation, {FRAGMENTATION:.0%} of it": FRAGMENTATION * sum(activations.values())}
    if where == "colocated":
        update["engine, asleep"] = ASLEEP_GIB
    return StageSize(resident, update, _rollouts(config, plan, where, stage, gpu_gib), peak.rows)


def _state_share(config: Config) -> float:
    """Of what the optimizer holds with moments in fp32, beside a master weight where parameters are in bf16."""
    if config.optimizer.state_precision == "fp32":
        return 1.0
    return (4 + 2 + 2) / (4 + 4 + 4)


def _rollouts(config: Config, plan: Plan, where: str, stage: int, gpu_gib: float) -> dict[str, float]:
    """What comes while answers are sampled, and weights sent to servers that are `where`."""
    if where == "colocated":
        return _colocated(config, plan, gpu_gib)
    if where == "separate":
        return _separate(config, plan, stage)
    if config.rollout.engine == "embedded" and config.algorithm.objective != "supervised":
        return _embedded(config, plan)
    return {}


def _embedded(config: Config, plan: Plan) -> dict[str, float]:
    """Hugging Face's model, whole on every rank, and the keys and values of all that it decodes at once."""
    shape, width = plan.shape, PRECISIONS[config.policy.precision].num_bytes
    tokens = config.rollout.max_sequences * (config.data.max_prompt_tokens + config.rollout.max_response_tokens)
    cache = 2 * shape.num_layers * shape.num_kv_heads * shape.head_size * tokens * width / GIB
    return {"engine, embedded: weights": plan.num_parameters * width / GIB, "engine, embedded: KV cache": cache}


def num_communicators(config: Config, plan: Plan) -> int:
    """Communicators of several ranks that a trainer's process has."""
    policy, data = config.policy, plan.data_parallel
    tensor, context, pipeline = policy.tensor_parallel, policy.context_parallel, policy.pipeline_parallel
    sizes = {
        "world": plan.num_ranks,
        "all shards of the optimizer": plan.num_ranks if policy.distributed_optimizer else 1,
        "tensor": tensor,
        "context": context,
        "pipeline": pipeline,
        "data": data,
        # Megatron-Core makes groups of their own also of the same ranks.
        "data and context": data * context,
        "tensor and context": tensor * context,
        "model": tensor * pipeline if not policy.distributed_optimizer else 1,
        "expert": policy.expert_parallel,
        "tensor and expert": policy.expert_parallel if plan.shape.num_experts else 1,
        "expert's data": plan.num_ranks // pipeline // policy.expert_parallel if policy.expert_parallel > 1 else 1,
    }
    return sum(ranks > 1 for ranks in sizes.values())


def _colocated(config: Config, plan: Plan, gpu_gib: float) -> dict[str, float]:
    """A colocated vLLM server's share of one GPU: what it is told to take, however it divides it."""
    assert plan.serving is not None, "there are no servers"
    whole = serving.gpu_share(config) * gpu_gib
    width, largest = PRECISIONS[config.policy.precision].num_bytes, _largest_gib(config, plan)
    return {
        "engine, awake: weights": plan.serving.weights_gib,
        "engine, awake: KV cache and the rest": max(0.0, whole - plan.serving.weights_gib),
        # Workers are given whole tensors, and keep those of a layer until all of it has come.
        "engine, loading: a layer or the largest tensor, whole": max(
            largest, max(1, plan.shape.num_experts) * plan.shape.expert_parameters * width / GIB
        ),
        "weights on their way: two buckets, and the largest tensor whole": plan.serving.buckets_gib + largest,
    }


def _separate(config: Config, plan: Plan, stage: int) -> dict[str, float]:
    """Weights on their way to servers elsewhere: all ranks see each tensor whole, and rank 0 fills the buckets."""
    assert plan.serving is not None, "there are no servers"
    largest = _largest_gib(config, plan)
    if stage == 0 and plan.serving.transport == "nccl":
        return {"weights on their way: two buckets, and the largest tensor whole": plan.serving.buckets_gib + largest}
    return {"weights on their way: the largest tensor whole": largest}


def _largest_gib(config: Config, plan: Plan) -> float:
    """The embedding, or the head."""
    width = PRECISIONS[config.policy.precision].num_bytes
    return plan.padded_vocab_size * plan.shape.hidden_size * width / GIB


def cache_tokens(config: Config, plan: Plan, gpu_gib: float) -> int:
    """Tokens that the KV cache of one colocated server holds at least, over its GPUs."""
    assert plan.serving is not None, "there are no servers"
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    rest = serving.gpu_share(config) * gpu_gib - plan.serving.weights_gib - ENGINE_WORKING_GIB
    return max(0, int(rest / plan.serving.kv_gib_per_sequence * longest))
