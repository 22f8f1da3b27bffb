"""Builds the published models at their full size without their memory: fake tensors, a fake process group, any rank.

    python -m tests.integration.real_sizes OUT.json [MODEL ...]

The modules are the policy's own, on every pipeline stage of a layout; a packed row with images and all three views goes
forward and backward through each, on fake tensors as `--measure` has them.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_cppo import families
from megatron_cppo.config import Config, ModelConfig, PolicyConfig, TrainerConfig
from megatron_cppo.data.packing import Member, pack
from megatron_cppo.families.rules import whole_shapes
from megatron_cppo.layout import layers_per_chunk, problems, replica_ranks
from megatron_cppo.plan import Packing
from megatron_cppo.types import ImageGrid, MicroBatch, Prompt, Sample
from tests.published_models import CONFIGS

RECIPES: dict[str, dict[str, Any]] = {
    "Qwen2.5-VL-3B-Instruct": {"tensor_parallel": 1},
    "Qwen2.5-VL-7B-Instruct": {"tensor_parallel": 2},
    "Qwen2.5-VL-32B-Instruct": {"tensor_parallel": 8, "pipeline_parallel": 2, "layers_per_stage": (31, 33)},
    "Qwen2.5-VL-72B-Instruct": {"tensor_parallel": 8, "pipeline_parallel": 4, "layers_per_stage": (19, 21, 21, 19)},
    "Qwen3-VL-2B-Instruct": {"tensor_parallel": 1},
    "Qwen3-VL-4B-Instruct": {"tensor_parallel": 2},
    "Qwen3-VL-8B-Instruct": {"tensor_parallel": 4},
    "Qwen3-VL-32B-Instruct": {"tensor_parallel": 8, "pipeline_parallel": 2, "virtual_pipeline": 2},
    "Qwen3-VL-30B-A3B-Instruct": {"tensor_parallel": 4, "expert_parallel": 8, "ranks": 8},
    "Qwen3-VL-235B-A22B-Instruct": {
        "tensor_parallel": 4,
        "pipeline_parallel": 8,
        "expert_parallel": 8,
        "context_parallel": 2,
        "layers_per_stage": (11, 12, 12, 12, 12, 12, 12, 11),
    },
}
"""The layout of each model's recipe; `ranks` where a replica alone has too few for its experts."""
GRID = ImageGrid(frames=1, height=36, width=44, merge=2)
RESPONSE = 200


@dataclass(frozen=True)
class Stage:
    """What one rank of a stage holds: each of its parameters' shards, and the whole tensors they are parts of."""

    rank: int
    shards: dict[str, tuple[int, ...]]
    whole: dict[str, tuple[int, ...]]
    numel: int
    gradients_missing: list[str]
    seconds: float


def rehearse(name: str, folder: Path) -> dict[str, Any]:
    """Build and run every stage of a model's recipe; what each holds, and the model's totals."""
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
    recipe = dict(RECIPES[name])
    policy = PolicyConfig(
        device="cpu",
        sequence_parallel=recipe["tensor_parallel"] > 1,
        **{key: value for key, value in recipe.items() if key != "ranks"},
    )
    ranks = recipe.get("ranks", replica_ranks(policy))
    config = Config(model=ModelConfig(path=str(folder)), policy=policy, trainer=TrainerConfig(num_gpus=ranks))
    shape = families.read_shape(str(folder))
    # The platform is the CPU's, the numbers are a GPU's.
    refused = problems(replace(config, policy=replace(policy, device="cuda")), shape)
    assert not refused, refused
    per_stage = ranks // policy.pipeline_parallel
    stages = [_stage(config, stage * per_stage, ranks) for stage in range(policy.pipeline_parallel)]
    return {
        "parameters": shape.num_parameters,
        "layout": {"ranks": ranks, **recipe},
        "stages": [asdict(stage) for stage in stages],
        "module": _module_shapes(folder),
    }


def _module_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of Hugging Face's own module, on no device."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    with torch.device("meta"):
        module = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def _stage(config: Config, rank: int, ranks: int) -> Stage:
    from megatron_cppo.policy import fake, platform, weights
    from megatron_cppo.policy import groups as process_groups
    from megatron_cppo.policy.model import VisionLanguageModel, decoder_config

    started, policy, shape = time.monotonic(), config.policy, families.read_shape(config.model.path)
    with fake.world(rank, ranks):
        groups = process_groups.make(policy, seed=0)
        megatron = decoder_config(shape, policy, layers_per_chunk=layers_per_chunk(policy, shape.num_layers))
        row = _row(policy, shape)
        patch_values = 3 * shape.vision.temporal_patch_size * shape.vision.patch_size**2
        with fake.tensors(gpu=True):
            chunks = [
                VisionLanguageModel(
                    shape,
                    config=megatron,
                    model=config.model,
                    padded_vocab_size=-(-shape.vocab_size // policy.tensor_parallel) * policy.tensor_parallel,
                    pixels=lambda key: torch.empty(GRID.num_patches, patch_values),
                    groups=groups,
                    device=platform.CPU,
                    chunk=number if policy.virtual_pipeline > 1 else None,
                )
                for number in range(policy.virtual_pipeline)
            ]
            for chunk in chunks:
                _forward_backward(chunk, row)
        bound = weights.bindings(chunks)
        whole = {
            name: size
            for binding in bound
            for name, size in whole_shapes(
                binding, shape=shape, num_ranks=weights.cutting_group(binding, groups).size()
            )
        }
        if shape.tied and not groups.is_first_stage:
            whole.pop("model.embed_tokens.weight", None)  # the last stage's copy
        return Stage(
            rank=rank,
            shards={binding.name: tuple(binding.parameter.shape) for binding in bound},
            whole=whole,
            numel=sum(binding.parameter.numel() for binding in bound),
            gradients_missing=[b.name for b in bound if b.parameter.grad is None],
            seconds=time.monotonic() - started,
        )


def _forward_backward(chunk: Any, row: MicroBatch) -> None:
    """One row through a chunk; on the last stage with its head, as CPPO asks it."""
    from megatron_cppo.policy.head import Head, HeadSettings

    if not chunk.pre_process:
        local = row.token_ids_T.numel() // chunk.groups.context.size()
        local //= chunk.groups.tensor.size() if chunk.config.sequence_parallel else 1
        received = torch.empty(local, 1, chunk.shape.hidden_size, dtype=chunk.config.params_dtype, requires_grad=True)
        chunk.set_input_tensor(received)
    hidden = chunk(row)
    if not chunk.post_process:
        hidden.sum().backward()
        return
    head = Head(chunk, row, hidden, HeadSettings(1.0, (), "torch"))
    rows, targets = torch.cat([row.rows_original_N, row.rows_removing_N]), row.targets_N.repeat(2)
    logp_N, entropy_N = head.statistics(rows, targets)
    (kl_N,) = head.divergences(row.rows_original_N, [row.rows_preserving_N], constant_others=False)
    (logp_N.sum() + entropy_N.sum() + kl_N.sum()).backward()


def _row(policy: PolicyConfig, shape: Any) -> MicroBatch:
    """One gated sample of one image: three segments of a prompt of about a thousand tokens and its answer."""
    image = shape.image_token_id
    ids = [1] * 300 + [image] * GRID.num_tokens + [1] * 100
    positions, following = families.part(shape.family, "positions").rope_positions(ids, [GRID], image_token_id=image)
    time_axis, height, width = (tuple(axis.tolist()) for axis in positions)
    slots = tuple(range(300, 300 + GRID.num_tokens))
    prompt = Prompt(
        "train", 0, 0, "", "", "", tuple(ids), (time_axis, height, width), following, grids=(GRID,), image_slots=slots
    )
    sample = Sample(prompt, 0, (1,) * RESPONSE, (), "", False, 0, advantage=1.0)
    packing = Packing(
        segment_multiple=2 * policy.context_parallel,
        row_multiple=2 * policy.context_parallel * policy.tensor_parallel,
    )
    return pack([Member(0, sample, ("original", "preserving", "removing"))], packing)


def main(out: Path, names: list[str]) -> None:
    warnings.simplefilter("ignore")
    with out.open("w") as file, tempfile.TemporaryDirectory() as folder:
        for name in names:
            found = rehearse(name, Path(folder))
            seconds = [round(stage["seconds"], 1) for stage in found["stages"]]
            print(f"{name:28} {found['parameters']:>15,} parameters, {len(seconds)} stages, seconds {seconds}")
            file.write(json.dumps({"model": name, **found}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or list(RECIPES))
