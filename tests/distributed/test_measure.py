"""What `--measure` counts on fake tensors is what real ranks allocate: to the byte, and over the true schedule."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from examples.digits import make_model
from megatron_cppo import plan as plans
from megatron_cppo import rehearsal
from megatron_cppo.config import Config, DataConfig, ModelConfig, PolicyConfig, RolloutConfig, TrainerConfig
from megatron_cppo.sizing import StageBytes, schedule_peak
from tests.distributed.launch import run_distributed

LAYOUTS: dict[str, dict[str, Any]] = {
    "DP2": {},
    "TP2+SP, everything recomputed": {
        "tensor_parallel": 2,
        "sequence_parallel": True,
        "recompute": "full",
        "recompute_vision": True,
    },
    "PP2": {"pipeline_parallel": 2, "layers_per_stage": (1, 2)},
    "CP2, selective": {"context_parallel": 2, "recompute": "selective"},
}
NUM_ROWS = 4


def config_of(folder: str, layout: str) -> Config:
    return Config(
        model=ModelConfig(path=folder),
        data=DataConfig(max_prompt_tokens=64),
        rollout=RolloutConfig(max_response_tokens=24),
        policy=PolicyConfig(device="cpu", precision="fp32", max_tokens_per_microbatch=1024, **LAYOUTS[layout]),
        trainer=TrainerConfig(num_gpus=2, prompts_per_step=4),
    )


def real_rank(rank: int, world_size: int, folder: str) -> dict[str, dict[str, Any]]:
    """Of every layout what this rank allocates."""
    return {layout: _real(config_of(folder, layout)) for layout in LAYOUTS}


def _real(config: Config) -> dict[str, Any]:
    from megatron_cppo.algo import objective
    from megatron_cppo.policy import footprint, groups, step
    from megatron_cppo.policy.allocations import Allocations
    from megatron_cppo.policy.checkpoint import initialise_adam
    from megatron_cppo.policy.held import inner_optimizers
    from megatron_cppo.policy.policy import Policy

    plan = plans.resolve(config, files=False)
    policy = Policy(config, plan, pixels=rehearsal.pixels_of(config, plan.shape), banned_ids=())
    trained = policy.trained
    initialise_adam(trained)
    parameters, mask, share = list(trained.parameters()), objective.perception_mask, []

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        found = mask(*args, **kwargs)
        share.append((int(found.sum()) - 0.5) / max(1, len(found)))
        return found

    objective.perception_mask = watched  # type: ignore[assignment]
    rows = []
    for batch in rehearsal.full_rows(config, plan):
        allocations = Allocations()
        with allocations:
            chunks = footprint.passes(config, plan, batch, trained, allocations)
        mini = batch.updates[0]
        several = replace(mini, microbatches=(mini.microbatches[0] * NUM_ROWS,) * plan.data_parallel)
        allocations = Allocations()
        with allocations, allocations.span() as update:
            seen = step.gradients(trained, batch, several, policy.settings)
        del seen
        rows.append({"chunks": chunks, "update": update.peak, "mask": share[-1] if share else 1.0})
    objective.perception_mask = mask
    states = [t for inner in inner_optimizers(trained) for s in inner.optimizer.state.values() for t in s.values()]
    held = {
        "parameters": footprint.distinct_bytes([*parameters, *(b for c in trained.chunks for b in c.buffers())]),
        "gradients": footprint.distinct_bytes([p.main_grad for p in parameters]),  # type: ignore[attr-defined]
        "optimizer": footprint.distinct_bytes(states),
        "reference": sum(p.nbytes for p in policy._reference._weights) if policy._reference else 0,
    }
    groups.destroy()
    return {**held, "rows": rows}


def fake_stages(folder: str, layout: str, batch: int, share: float) -> tuple[StageBytes, ...]:
    """Of a layout what every stage allocates for one of the full rows, without its memory."""
    config = config_of(folder, layout)
    config = replace(config, perception=replace(config.perception, top_fraction=share))
    plan = plans.resolve(config, files=False)
    return rehearsal.measure_stages(config, plan, rehearsal.full_rows(config, plan)[batch : batch + 1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    make_model(path, seed=3)
    return str(path)


@pytest.fixture(scope="module")
def real(folder: str) -> list[dict[str, dict[str, Any]]]:
    return run_distributed(real_rank, 2, folder, timeout_seconds=240)


@pytest.mark.parametrize("batch", [0, 1], ids=["pictures", "answers"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_tensors_count_what_real_ranks_allocate(
    layout: str, batch: int, folder: str, real: list[dict[str, dict[str, Any]]]
) -> None:
    """Parameters, gradients, optimizer and reference, and a row's passes to the byte; the schedule's own messages of a
    row's shape are all that the update has beside.
    """
    share = max(rank[layout]["rows"][batch]["mask"] for rank in real)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        stages = process.submit(fake_stages, folder, layout, batch, share).result(timeout=240)
    for stage, found in enumerate(stages):
        of_rank = real[stage][layout]
        for name in ("parameters", "gradients", "optimizer", "reference"):
            assert getattr(found, name) == of_rank[name], name
        row = of_rank["rows"][batch]
        expected = schedule_peak(found.chunks, stage, len(stages)).total
        print(f"{layout:30} stage {stage}: counted {expected:,}, update {row['update']:,} bytes {found.chunks}")
        assert list(found.chunks) == row["chunks"]
        assert expected <= row["update"] * 1.01
        assert expected >= row["update"] * 0.99
