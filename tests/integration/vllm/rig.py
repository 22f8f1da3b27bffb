"""A real vLLM engine on this CPU: the demo's model and pictures, servers of the product, Hugging Face's model as truth.

Owns what the tests of this folder share; knows nothing of what one of them wants to see.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

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
from megatron_cppo.rollout.build import Needs, build
from megatron_cppo.rollout.vllm import VllmEngine
from megatron_cppo.types import Prompt, Sample

PYTHON = os.environ.get("MEGATRON_CPPO_VLLM_PYTHON", str(Path(__file__).parents[3] / ".venv-vllm" / "bin" / "python"))
MAX_RESPONSE_TOKENS = 12


@dataclass(frozen=True)
class World:
    """A model's folder and questions about pictures."""

    folder: Path
    source: PromptSource
    config: Config

    @property
    def prompts(self) -> list[Prompt]:
        return self.source.take(0, 8)

    def weights(self, *, changed: float = 0.0) -> dict[str, Tensor]:
        """The checkpoint's tensors, all matrices scaled by 1 + `changed`."""
        read = load_file(self.folder / "model" / "model.safetensors")
        return {name: tensor * (1 + changed) if tensor.dim() > 1 else tensor for name, tensor in read.items()}


def make_world(folder: Path, **vllm: object) -> World:
    make_model(folder / "model", seed=3)
    paths = make_data(folder, seed=3, num_train=64, num_warm=1, num_evaluation=16)
    config = Config(
        model=ModelConfig(path=str(folder / "model")),
        data=DataConfig(train=(str(paths["train"]),), max_prompt_tokens=64),
        rollout=RolloutConfig(
            engine="vllm", samples_per_prompt=4, max_response_tokens=MAX_RESPONSE_TOKENS, max_sequences=32
        ),
        vllm=VllmConfig(python=PYTHON, bucket_mib=1),
        policy=PolicyConfig(device="cpu", precision="fp32", max_tokens_per_microbatch=1024),
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
    return World(folder, source, replace(config, vllm=replace(config.vllm, **vllm)))


@contextmanager
def engine(world: World, *, weights: dict[str, Tensor] | None = None) -> Iterator[VllmEngine]:
    """The engine of the world's config; `weights` are what it is sent whenever a server needs some."""
    words = vocabulary(world.config.model.path)
    sent = world.weights() if weights is None else weights
    needs = Needs(
        pixels=world.source.pixels,
        picture=world.source.png,
        decode=words.decode,
        weights=lambda: iter(sent.items()),
        beat=lambda: None,
        banned_ids=words.banned_ids,
        end_ids=words.eos_ids,
        max_images=1,
        address="127.0.0.1",
        key="",
        local_rank=0,
    )
    made = build(world.config, resolve(world.config), needs, group=None)
    assert isinstance(made, VllmEngine)
    try:
        yield made
    finally:
        made.close()


def true_logp(
    world: World, samples: Sequence[Sample], weights: dict[str, Tensor], *, temperature: float
) -> list[Tensor]:
    """The log-probs of every sample's tokens by Hugging Face's model, banned ids left out, one sample at a time."""
    model = AutoModelForImageTextToText.from_pretrained(world.config.model.path, dtype=torch.float32)
    model.load_state_dict(_module_names(weights), strict=False)
    banned = list(vocabulary(world.config.model.path).banned_ids)
    found = []
    for sample in samples:
        prompt = sample.prompt
        ids = torch.tensor([[*prompt.token_ids, *sample.token_ids]])
        later = [[prompt.next_position + i for i in range(len(sample.token_ids))]] * 3
        positions = torch.cat([torch.tensor(prompt.positions), torch.tensor(later)], dim=1)[:, None]
        with torch.no_grad():
            logits = model(
                input_ids=ids,
                position_ids=positions,
                pixel_values=torch.cat([world.source.pixels(key) for key in prompt.images("original")]),
                image_grid_thw=torch.tensor([[g.frames, g.height, g.width] for g in prompt.grids]),
            ).logits[0, len(prompt.token_ids) - 1 : -1]
        logits[:, banned] = -torch.inf
        logp = (logits / temperature).log_softmax(-1)
        found.append(logp.gather(1, torch.tensor(sample.token_ids)[:, None]).squeeze(1))
    return found


def gap(samples: Sequence[Sample], truth: Sequence[Tensor]) -> float:
    """Largest |log-prob of the engine - true one|."""
    return max(
        float((torch.tensor(sample.logp) - logp).abs().max()) for sample, logp in zip(samples, truth, strict=True)
    )


def _module_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    from megatron_cppo.rollout.module_weights import module_name

    return {module_name(name): tensor for name, tensor in weights.items()}
