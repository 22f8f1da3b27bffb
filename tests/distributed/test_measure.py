"""What `--measure` counts on fake tensors is what real ranks allocate: to the byte, and over the true schedule."""

from __future__ import annotations

import gc
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from examples.digits import make_model
from megatron_cppo import plan as plans
from megatron_cppo import rehearsal
from megatron_cppo.config import (
    AlgorithmConfig,
    Config,
    DataConfig,
    ModelConfig,
    PolicyConfig,
    RolloutConfig,
    TrainerConfig,
)
from megatron_cppo.policy.allocations import Allocations, Span
from megatron_cppo.sizing import StageBytes, schedule_peak
from megatron_cppo.types import VIEWS, ImageKey
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
WITHOUT_MASK = ("CP2, selective",)
"""There GRPO: how many masked tokens a context rank holds depends on where they are."""
NUM_ROWS = 4
MESSAGE_BYTES = 16_384
"""Of the schedule's own small tensors, and of what the log keeps of rows that are through."""
LATE = 0.06
QUIET_SECONDS = 0.1


def config_of(folder: str, layout: str) -> Config:
    return Config(
        model=ModelConfig(path=folder),
        data=DataConfig(max_prompt_tokens=64),
        algorithm=AlgorithmConfig(objective="grpo" if layout in WITHOUT_MASK else "cppo"),
        rollout=RolloutConfig(max_response_tokens=24),
        policy=PolicyConfig(device="cpu", precision="fp32", max_tokens_per_microbatch=1024, **LAYOUTS[layout]),
        trainer=TrainerConfig(num_gpus=2, prompts_per_step=4),
    )


def pixels(like: Callable[[ImageKey], Tensor]) -> Callable[[ImageKey], Tensor]:
    """Other pixels under every view, the same in every pass, so that the mask is."""

    def of_image(key: ImageKey) -> Tensor:
        generator = torch.Generator().manual_seed(3 * key.row + VIEWS.index(key.view))
        return torch.randn(like(key).shape, generator=generator)

    return of_image


def real_rank(rank: int, world_size: int, folder: str) -> dict[str, dict[str, Any]]:
    """Of every layout what this rank allocates."""
    return {layout: _real(config_of(folder, layout)) for layout in LAYOUTS}


def _collect(_: int) -> None:
    gc.collect()


class Settled(Allocations):
    """What is kept is counted when gloo's threads have let go of the last collectives' tensors: those that Python made
    they free once they have the interpreter's lock, which may be some time after the collective.
    """

    @contextmanager
    def span(self) -> Iterator[Span]:
        with super().span() as span:
            yield span
            seen = -1
            while seen != self.live_bytes:
                seen = self.live_bytes
                time.sleep(QUIET_SECONDS)


def _real(config: Config) -> dict[str, Any]:
    from megatron_cppo.algo import objective
    from megatron_cppo.policy import footprint, groups, step
    from megatron_cppo.policy.checkpoint import initialise_adam
    from megatron_cppo.policy.held import inner_optimizers
    from megatron_cppo.policy.policy import Policy

    plan = plans.resolve(config, files=False)
    policy = Policy(config, plan, pixels=pixels(rehearsal.pixels_of(config, plan)), banned_ids=())
    trained = policy.trained
    initialise_adam(trained)
    gc.freeze()  # what is there need not be gone through again
    gc.disable()  # and collect where the measurement does: chance has no place in a comparison to the byte
    parameters, mask, share = list(trained.parameters()), objective.perception_mask, []

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        found = mask(*args, **kwargs)
        share.append(min(1.0, (int(found.sum()) + 0.5) / max(1, len(found))))
        return found

    objective.perception_mask = watched  # type: ignore[assignment]
    rows = []
    for batch in rehearsal.full_rows(config, plan):
        allocations = Settled()
        with allocations:
            chunks = footprint.passes(config, plan, batch, trained, allocations)
        mini = batch.updates[0]
        several = replace(mini, microbatches=(mini.microbatches[0] * NUM_ROWS,) * plan.data_parallel)
        allocations = Allocations()
        with allocations, allocations.span() as update:
            step.gradients(trained, batch, several, policy.settings, _collect)
        rows.append({"chunks": chunks, "update": update.peak, "mask": share[0] if share else 1.0})
        share.clear()
    objective.perception_mask = mask
    states = [t for inner in inner_optimizers(trained) for s in inner.optimizer.state.values() for t in s.values()]
    held = {
        "parameters": footprint.distinct_bytes([*parameters, *(b for c in trained.chunks for b in c.buffers())]),
        "gradients": footprint.distinct_bytes([p.main_grad for p in parameters]),  # type: ignore[attr-defined]
        "optimizer": footprint.distinct_bytes(states),
        "reference": policy._reference.num_bytes if policy._reference else 0,
    }
    groups.destroy()
    return {**held, "rows": rows}


def fake_stages(folder: str, shares: dict[str, list[float]]) -> dict[str, list[tuple[StageBytes, ...]]]:
    """Of every layout and full row what each stage allocates, without its memory; masks pick these shares of tokens."""
    gc.freeze()
    gc.disable()
    found: dict[str, list[tuple[StageBytes, ...]]] = {}
    for layout, of_layout in shares.items():
        config = config_of(folder, layout)
        plan = plans.resolve(config, files=False)
        found[layout] = [
            rehearsal.measure_stages(
                replace(config, perception=replace(config.perception, top_fraction=share)), plan, (batch,)
            )
            for batch, share in zip(rehearsal.full_rows(config, plan), of_layout, strict=True)
        ]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    make_model(path, seed=3)
    return str(path)


@pytest.fixture(scope="module")
def real(folder: str) -> list[dict[str, dict[str, Any]]]:
    return run_distributed(real_rank, 2, folder, timeout_seconds=240)


@pytest.fixture(scope="module")
def fake(folder: str, real: list[dict[str, dict[str, Any]]]) -> dict[str, list[tuple[StageBytes, ...]]]:
    masks = {layout: [[row["mask"] for row in rank[layout]["rows"]] for rank in real] for layout in LAYOUTS}
    # Only the last stage has a mask.
    shares = {layout: [min(of_row) for of_row in zip(*of_ranks, strict=True)] for layout, of_ranks in masks.items()}
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(fake_stages, folder, shares).result(timeout=240)


@pytest.mark.parametrize("batch", [0, 1], ids=["pictures", "answers"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_tensors_count_what_real_ranks_allocate(
    layout: str,
    batch: int,
    real: list[dict[str, dict[str, Any]]],
    fake: dict[str, list[tuple[StageBytes, ...]]],
) -> None:
    """Parameters, gradients, optimizer and reference, and a row's passes, to the byte; and the peak of an update of
    four rows through Megatron-Core's schedule is what the schedule's arithmetic makes of one row's.
    """
    stages = fake[layout][batch]
    for stage, found in enumerate(stages):
        of_rank = real[stage][layout]
        for name in ("parameters", "gradients", "optimizer", "reference"):
            assert getattr(found, name) == of_rank[name], name
        row = of_rank["rows"][batch]
        expected = schedule_peak(found.chunks, stage, len(stages)).total
        print(f"{layout:30} stage {stage}: counted {expected:,}, update {row['update']:,} bytes {found.chunks}")
        assert list(found.chunks) == row["chunks"]
        # Collectives that run behind let go of their tensors when gloo's threads come to it.
        late = LATE if "TP2" in layout else 0.0
        assert expected <= row["update"] <= expected * (1 + late) + MESSAGE_BYTES
