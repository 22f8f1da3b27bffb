"""A row of a filler alone, which a replica without samples runs, leaves gradients of exactly zero and no loss."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megatron_cppo.algo.objective import OBJECTIVES
from megatron_cppo.data.packing import build_batch
from tests.distributed import layouts, matrix, tiny_model
from tests.distributed.launch import run_distributed
from tests.distributed.matrix import Layout

CHOICES: dict[str, dict[str, Any]] = {
    "cppo": {"algorithm__beta": 0.1, "algorithm__entropy_coefficient": 0.05},
    "cppo, constant views": {"perception__stop_gradient_views": True},
    "cppo, exact, global": {"perception__divergence": "exact", "perception__aggregation": "global"},
    "grpo": {
        "algorithm__objective": "grpo",
        "algorithm__aggregation": "sample_mean",
        "algorithm__beta": 0.1,
        "algorithm__correction": "sequence_mask",
    },
    "supervised": {"algorithm__objective": "supervised"},
}
LAYOUTS = (Layout(2), Layout(2, cp=2), Layout(2, pp=2, vpp=2), Layout(2, ep=2))


def run(rank: int, world_size: int, folders: dict[str, str]) -> dict[tuple[str, str], tuple[float, int, bool]]:
    """Of each layout and choice: the loss, the largest number of rows, and whether every gradient is zero."""
    found = {}
    for layout in LAYOUTS:
        for name, fields in CHOICES.items():
            folder = folders["qwen3_vl_moe" if layout.ep > 1 else "qwen2_5_vl"]
            found[layout.name, name] = run_case(folder, layout, fields, world_size)
    return found


def run_case(folder: str, layout: Layout, fields: dict[str, Any], world_size: int) -> tuple[float, int, bool]:
    from megatron_cppo.policy import groups as process_groups
    from megatron_cppo.policy import step
    from megatron_cppo.policy.policy import Policy

    config = tiny_model.make_config(folder, world_size, **layout.fields(), **fields)
    plan = tiny_model.make_plan(config)
    policy = Policy(config, plan, pixels=tiny_model.pixels, banned_ids=tiny_model.BANNED)
    batch = build_batch(
        tiny_model.make_groups(1, 2, vocab_size=matrix.VOCAB, first_row=1),
        views_for=OBJECTIVES[config.algorithm.objective].views_for,
        num_updates=1,
        packing=plan.packing,
        score=True,
        constant_views=config.perception.stop_gradient_views,
        count_masked=config.perception.aggregation == "global",
    )
    batch = layouts.with_drifted_scores(policy.score(batch, old=True, reference=False))
    # Every sample left out: what is left are fillers, on every rank.
    empty = dataclasses.replace(plan.packing, max_tokens=1, drop_oversized=True)
    fillers = build_batch(
        tiny_model.make_groups(1, 2, vocab_size=matrix.VOCAB, first_row=1),
        views_for=OBJECTIVES[config.algorithm.objective].views_for,
        num_updates=1,
        packing=empty,
        score=False,
        constant_views=config.perception.stop_gradient_views,
        count_masked=config.perception.aggregation == "global",
    )
    (mini,) = fillers.updates
    mini = dataclasses.replace(mini, num_tokens=7, num_samples=2, num_gated_samples=1)
    seen = step.gradients(policy.trained, batch, mini, policy.settings)
    losses = [float(outcome.loss) for _, outcome in seen]
    zero = all(not parameter.main_grad.any() for parameter in policy.trained.parameters())
    num_rows = len(mini.microbatches[policy.groups.data_rank])
    process_groups.destroy()
    return sum(map(abs, losses)), num_rows, zero


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], tuple[float, int, bool]]]:
    folders = {
        family: tiny_model.make_checkpoint(tmp_path_factory.mktemp("hf"), family=family, num_layers=matrix.NUM_LAYERS)
        for family in ("qwen2_5_vl", "qwen3_vl_moe")
    }
    return run_distributed(run, 2, folders, timeout_seconds=300)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_fillers_weigh_nothing(layout: Layout, choice: str, answers: Any) -> None:
    for rank in answers:
        loss, num_rows, zero = rank[layout.name, choice]
        assert (loss, zero) == (0.0, True)
        assert num_rows == (layout.pp if layout.vpp > 1 else 1)
