"""A real vLLM engine on this CPU: the demo's model and pictures, servers of the product, Hugging Face's model as truth.

Owns what the tests of this folder share; knows nothing of what one of them wants to see.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

from examples.digits import make_data, make_model
from megatron_cppo.config import (
    Config,
    DataConfig,
    ModelConfig,
    PerceptionConfig,
    PolicyConfig,
    RolloutConfig,
    TrainerConfig,
    VllmConfig,
)
from megatron_cppo.data.prompts import PromptSource
from megatron_cppo.data.tokenizer import vocabulary
from megatron_cppo.plan import resolve
from megatron_cppo.rollout.build import Needs, server_plan, vllm_engine
from megatron_cppo.rollout.module_weights import module_name
from megatron_cppo.rollout.server import ServerPlan
from megatron_cppo.rollout.vllm import VllmEngine
from megatron_cppo.types import Group, Prompt, Sample

PYTHON = os.environ.get("MEGATRON_CPPO_VLLM_PYTHON", str(Path(__file__).parents[3] / ".venv-vllm" / "bin" / "python"))
INSTRUCTION = "Read the two digits off the picture, then write down what is asked for, in a box, and no more."
"""Prompts are then longer than a block of the engine's cache, which else would keep nothing of them."""
MAX_RESPONSE_TOKENS = 400
"""An untrained model seldom ends before: long enough to be interrupted."""


@dataclass(frozen=True)
class World:
    """A model's folder and questions about pictures."""

    folder: Path
    source: PromptSource
    config: Config
    servers: ServerPlan
    sent: dict[str, Tensor] = field(default_factory=dict)
    """The policy's weights: what a server is sent that was started again."""

    @property
    def prompts(self) -> list[Prompt]:
        return self.source.take(0, 8)

    def weights(self, *, changed: float = 0.0) -> dict[str, Tensor]:
        """The checkpoint's tensors, all matrices scaled by 1 + `changed`."""
        read = load_file(self.folder / "model" / "model.safetensors")
        return {name: tensor * (1 + changed) if tensor.dim() > 1 else tensor for name, tensor in read.items()}


def make_world(
    folder: Path, *, tied: bool = True, limits: Mapping[str, float] = MappingProxyType({}), **servers: Any
) -> World:
    """The demo's task, with a fresh model of this seed; `servers` are fields of ServerPlan, `limits` of its limits."""
    make_model(folder / "model", seed=3, tied=tied)
    paths = make_data(folder, seed=3, num_train=64, num_warm=1, num_evaluation=16)
    config = Config(
        model=ModelConfig(path=str(folder / "model")),
        data=DataConfig(train=(str(paths["train"]),), max_prompt_tokens=128, instruction=INSTRUCTION),
        rollout=RolloutConfig(
            engine="vllm", samples_per_prompt=4, max_response_tokens=MAX_RESPONSE_TOKENS, max_sequences=32
        ),
        vllm=VllmConfig(python=PYTHON),
        policy=PolicyConfig(device="cpu", precision="fp32", max_tokens_per_microbatch=2048),
        trainer=TrainerConfig(run_dir=str(folder / "run"), prompts_per_step=4),
    )
    source = PromptSource(
        (str(paths["train"]),),
        split="train",
        model_path=config.model.path,
        data=config.data,
        model=config.model,
        perception=PerceptionConfig(),
        seed=0,
    )
    plan = replace(server_plan(config, max_images=1), bucket_bytes=2**20, **servers)
    plan = replace(plan, limits=replace(plan.limits, **limits))
    return World(folder, source, config, plan)


@contextmanager
def engine(world: World, *, key: str = "") -> Iterator[VllmEngine]:
    """The engine of the world's config, with the checkpoint's weights as version 0."""
    words = vocabulary(world.config.model.path)
    world.sent.clear()
    world.sent.update(world.weights())
    needs = Needs(
        pixels=world.source.pixels,
        picture=lambda key: world.source.png(key),
        decode=words.decode,
        weights=lambda: iter(world.sent.items()),
        beat=lambda: None,
        banned_ids=words.banned_ids,
        end_ids=words.eos_ids,
        max_images=1,
        key=key,
        local_rank=0,
        environment=os.environ,
    )
    made = vllm_engine(world.config, resolve(world.config), needs, None, servers=world.servers)
    try:
        made.load_weights(iter(world.sent.items()), version=0)
        yield made
    finally:
        made.close()


def num_sampled(engine: VllmEngine, server: int = 0) -> float:
    """How many tokens a server has sampled since it started, by its own count."""
    assert engine.fleet is not None
    fleet = engine.fleet
    text = fleet.connection.wait(fleet.connection.reads(f"{fleet.servers[server].url}/metrics", seconds=10)) or ""
    lines = [line for line in text.splitlines() if line.startswith("vllm:generation_tokens_total")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def samples_of(groups: Sequence[Group]) -> list[Sample]:
    return [sample for group in groups for sample in group.samples]


class Truth:
    """Hugging Face's model under some weights: what the engine's log-probs should be."""

    def __init__(self, world: World, weights: Mapping[str, Tensor], *, dtype: torch.dtype = torch.float32) -> None:
        self._world = world
        self._model = AutoModelForImageTextToText.from_pretrained(world.config.model.path, dtype=dtype)
        self._model.load_state_dict({module_name(name): tensor for name, tensor in weights.items()}, strict=False)
        self._banned = list(vocabulary(world.config.model.path).banned_ids)

    @torch.no_grad()
    def logp(self, sample: Sample, *, temperature: float = 1.0) -> Tensor:
        """Of a sample's tokens; banned ids left out."""
        prompt = sample.prompt
        ids = torch.tensor([[*prompt.token_ids, *sample.token_ids]])
        pixels = [self._world.source.pixels(key) for key in prompt.images("original")]
        later = [[prompt.next_position + i for i in range(len(sample.token_ids))]] * 3
        logits = (
            self._model(
                input_ids=ids,
                position_ids=torch.cat([torch.tensor(prompt.positions), torch.tensor(later)], dim=1)[:, None],
                pixel_values=torch.cat(pixels).to(self._model.dtype),
                image_grid_thw=torch.tensor([[g.frames, g.height, g.width] for g in prompt.grids]),
            )
            .logits[0, len(prompt.token_ids) - 1 : -1]
            .float()
        )
        logits[:, self._banned] = -torch.inf
        logp = (logits / temperature).log_softmax(-1)
        return logp.gather(1, torch.tensor(sample.token_ids)[:, None]).squeeze(1)

    def gaps(self, samples: Sequence[Sample], *, temperature: float = 1.0) -> Tensor:
        """|log-prob of the engine - true one| of every token."""
        every = [torch.tensor(s.logp) - self.logp(s, temperature=temperature) for s in samples]
        return torch.cat(every).abs()
