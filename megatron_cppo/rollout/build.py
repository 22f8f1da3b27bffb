"""The engine of a run, from its config."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cppo import serving
from megatron_cppo.config import Config
from megatron_cppo.families import inventory
from megatron_cppo.plan import Plan
from megatron_cppo.precision import PRECISIONS
from megatron_cppo.rollout.ends import end_ids as checkpoint_ends
from megatron_cppo.rollout.engine import Engine, EngineError
from megatron_cppo.rollout.server import ServerPlan
from megatron_cppo.rollout.transformers import TransformersEngine
from megatron_cppo.rollout.vllm import Callbacks, Slot, VllmEngine, slots
from megatron_cppo.rollout.weight_push import PROTOCOL
from megatron_cppo.rollout.wire import Rules
from megatron_cppo.types import ImageKey

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """What an engine asks of the run.

    `key` and `local_rank` come from the `environment`, which servers that are started here inherit.
    """

    pixels: Callable[[ImageKey], Tensor]
    picture: Callable[[ImageKey], bytes]
    decode: Callable[[Sequence[int]], str]
    weights: Callable[[], Iterable[tuple[str, Tensor]]]
    beat: Callable[[], None]
    banned_ids: Sequence[int]
    end_ids: Sequence[int]
    max_images: int
    key: str
    local_rank: int
    environment: Mapping[str, str]


def build(config: Config, plan: Plan, needs: Needs, *, group: dist.ProcessGroup | None) -> Engine:
    """The engine that `config` asks for. Called by all ranks of `group`. Raises EngineError."""
    make = ENGINES[config.rollout.engine]
    return make(config, plan, needs, group)


def _embedded(config: Config, plan: Plan, needs: Needs, group: dist.ProcessGroup | None) -> Engine:
    return TransformersEngine(
        config.model.path,
        pixels=needs.pixels,
        banned_ids=needs.banned_ids,
        decode=needs.decode,
        max_response_tokens=config.rollout.max_response_tokens,
        max_sequences=config.rollout.max_sequences,
        seed=config.trainer.seed,
        group=group,
        end_ids=needs.end_ids,
        dtype=getattr(torch, PRECISIONS[config.policy.precision].dtype),
        device=config.policy.device,
        progress=lambda _: needs.beat(),
    )


def _vllm(config: Config, plan: Plan, needs: Needs, group: dist.ProcessGroup | None) -> Engine:
    if config.policy.device == "cuda" and plan.serving is not None and not serving.separate(config):
        gpu_gib = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 2**30
        if problem := serving.memory_problem(config, plan.serving, gpu_gib=gpu_gib):
            raise EngineError(problem)
    # The ranks wait for rank 0 for long and often: in a group of the GPUs', their kernels would spin beside vLLM's.
    waits: Any = dist.new_group(backend="gloo") if config.policy.device == "cuda" and group is not None else group
    return vllm_engine(config, plan, needs, waits, servers=server_plan(config, max_images=needs.max_images))


def vllm_engine(
    config: Config, plan: Plan, needs: Needs, group: dist.ProcessGroup | None, *, servers: ServerPlan
) -> VllmEngine:
    """An engine on `servers`."""
    device = config.policy.device
    return VllmEngine(
        servers,
        Rules(
            max_response_tokens=config.rollout.max_response_tokens,
            banned_ids=tuple(needs.banned_ids),
            end_ids=tuple(sorted({*checkpoint_ends(config.model.path), *needs.end_ids})),
            vocab_size=plan.shape.vocab_size,
        ),
        Callbacks(picture=needs.picture, decode=needs.decode, weights=needs.weights, beat=needs.beat),
        places=_places(config, servers, needs.local_rank, group),
        expected=inventory.tensors(plan.shape, config.model.path),
        model={
            "protocol": PROTOCOL,
            "hidden_size": plan.shape.hidden_size,
            "num_hidden_layers": plan.shape.num_layers,
            "vocab_size": plan.shape.vocab_size,
            "dtype": servers.dtype,
        },
        environment=needs.environment,
        seed=config.trainer.seed,
        key=needs.key,
        group=group,
        device=torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device),
        log_dir=Path(config.trainer.run_dir) / "logs",
    )


ENGINES: dict[str, Callable[[Config, Plan, Needs, dist.ProcessGroup | None], Engine]] = {
    "embedded": _embedded,
    "vllm": _vllm,
}


def server_plan(config: Config, *, max_images: int) -> ServerPlan:
    """What the servers of a run have in common."""
    return ServerPlan(
        vllm=config.vllm,
        model_path=os.path.abspath(config.model.path),
        dtype=PRECISIONS[config.policy.precision].dtype,
        device=config.policy.device,
        max_tokens=config.data.max_prompt_tokens + config.rollout.max_response_tokens,
        max_sequences=config.rollout.max_sequences,
        min_pixels=config.model.min_pixels,
        max_pixels=config.model.max_pixels,
        max_images=max_images,
        transport=serving.transport(config),
    )


def _places(config: Config, servers: ServerPlan, local_rank: int, group: dist.ProcessGroup | None) -> list[Slot]:
    if serving.separate(config):
        return [Slot(0, url=address.rstrip("/")) for address in config.vllm.addresses]
    if config.policy.device == "cpu":
        return [Slot(0)] * servers.num_on_cpu
    mine = (socket.gethostname(), local_rank)
    every = [mine]
    if group is not None:
        every = [mine] * dist.get_world_size(group)
        dist.all_gather_object(every, mine, group=group)
    hosts, gpus = zip(*every, strict=True)
    if len(set(hosts)) > 1 and config.vllm.host in LOOPBACK:
        raise EngineError(
            f"vllm.host: {config.vllm.host} is reached from its own machine alone, and the run is on "
            f"{len(set(hosts))}; use 0.0.0.0 (every route asks for a key)"
        )
    return slots(hosts, gpus, tensor_parallel=config.vllm.tensor_parallel)
