"""Training checkpoints: a run that was stopped and restored in new processes goes on as if nothing had happened, to
the bit: weights, optimizer state, schedule, random numbers and metrics.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_cppo.algo.objective import OBJECTIVES
from megatron_cppo.data.packing import build_batch
from tests.distributed import tiny_model
from tests.distributed.launch import run_distributed
from tests.distributed.layouts import LAYOUTS, VOCAB, WORLD, checkpoint

CHECKED = ("TP2", "TP2+SP", "DP2", "DP2 distributed optimizer", "PP2", "TP2xPP2")
NUM_STEPS = 4
TRAINING: dict[str, Any] = {
    "optimizer__learning_rate": 2e-3,
    "optimizer__warmup_updates": 2,
    "optimizer__decay": "cosine",
    "optimizer__weight_decay": 0.1,
    "optimizer__max_grad_norm": 1.0,
    "algorithm__beta": 0.05,
    "trainer__num_steps": NUM_STEPS,
}


@dataclass(frozen=True)
class Part:
    """A part of a training run: restore from a folder (when it holds a checkpoint), train to `until`, save."""

    model: str
    layout: str
    folder: Path
    until: int
    save_at: tuple[int, ...] = ()
    keep: int = 2


@dataclass(frozen=True)
class State:
    """Everything that a rank's next update depends on, and what the part logged."""

    progress: dict[str, Any] | None
    metrics: list[dict[str, float]]
    weights: dict[str, Tensor]
    moments: list[dict[str, Tensor]]
    groups: list[dict[str, Any]]
    schedule: dict[str, Any]
    random: list[Tensor]
    drawn: list[float]
    warned: list[str]


def run_parts(rank: int, world_size: int, parts: dict[str, Part]) -> dict[str, State]:
    """All parts, one after the other, in one process group."""
    states = {name: run_part(part, world_size) for name, part in parts.items()}
    assert multiprocessing.active_children() == [], "the checkpoint writer left a process, which a kill would orphan"
    return states


def run_part(part: Part, world_size: int) -> State:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    from megatron_cppo.policy import groups as process_groups
    from megatron_cppo.policy.policy import Policy

    config = tiny_model.make_config(part.model, world_size, **{**TRAINING, **LAYOUTS[part.layout]})
    plan = tiny_model.make_plan(config)
    torch.manual_seed(11)
    policy = Policy(config, plan, pixels=tiny_model.pixels, banned_ids=tiny_model.BANNED)
    warned = Warned()
    logging.getLogger("megatron_cppo.policy").addHandler(warned)
    progress = policy.restore(part.folder)
    logging.getLogger("megatron_cppo.policy").removeHandler(warned)
    step = progress["step"] if progress else 0
    metrics, drawn = [], []
    if step == 0 and 0 in part.save_at:
        policy.save(part.folder, at_step=0, progress={"rows": 0}, keep=part.keep)
    while step < part.until:
        batch = build_batch(
            tiny_model.make_groups(4, 2, vocab_size=VOCAB, first_row=4 * step),
            views_for=OBJECTIVES[config.algorithm.objective].views_for,
            num_updates=1,
            packing=plan.packing,
            score=True,
        )
        metrics.append(policy.update(policy.score(batch, old=False, reference=False)))
        drawn.append(float(torch.rand(())))
        with get_cuda_rng_tracker().fork():
            drawn.append(float(torch.rand(())))
        step += 1
        if step in part.save_at:
            policy.save(part.folder, at_step=step, progress={"rows": 4 * step}, keep=part.keep)
    state = snapshot(policy, progress, metrics, drawn, warned.texts)
    process_groups.destroy()
    return state


class Warned(logging.Handler):
    """What was warned of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def snapshot(
    policy: Any, progress: dict[str, Any] | None, metrics: list[Any], drawn: list[float], warned: list[str]
) -> State:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    optimizers = [inner.optimizer for inner in policy.trained.optimizer.chained_optimizers]
    param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return State(
        progress=progress,
        metrics=metrics,
        weights={name: tensor.clone() for name, tensor in policy.weights()},
        moments=[
            {name: value.clone() for name, value in optimizer.state[parameter].items()}
            for optimizer in optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        ],
        # "step" is Megatron-Core's note for a load; torch's Adam ignores it.
        groups=[{k: v for k, v in group.items() if k not in ("params", "step")} for group in param_groups],
        schedule=policy.trained.schedule.state_dict(),
        random=[torch.get_rng_state(), *get_cuda_rng_tracker().get_states().values()],
        drawn=drawn,
        warned=warned,
    )


@dataclass(frozen=True)
class Runs:
    """What each rank ended with: in one go, in two halves, around a save before any update; and what was on disk."""

    whole: dict[str, list[State]]
    halves: dict[str, tuple[list[State], list[State]]]
    early: dict[str, list[State]]
    late: dict[str, list[State]]
    listings: dict[str, list[list[str]]]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("checkpoints")
    model = checkpoint(tmp_path_factory.mktemp("hf"))
    folders = {layout: root / layout for layout in CHECKED}
    parts: dict[str, Part] = {}
    for layout, folder in folders.items():
        parts["whole " + layout] = Part(model, layout, root / "none", NUM_STEPS)
        parts["first " + layout] = Part(model, layout, folder, 2, save_at=(1, 2), keep=1)
    late = {layout: root / "late" / layout for layout in ("TP2", "DP2 distributed optimizer")}
    for layout, folder in late.items():
        parts["early " + layout] = Part(model, layout, folder, 2, save_at=(0,))
    first = run_all(parts)
    listings = {layout: [names(folder)] for layout, folder in folders.items()}
    for folder in folders.values():
        spoil(folder)
    second_parts = {
        "second " + layout: Part(model, layout, folder, NUM_STEPS, save_at=(3, 4), keep=2)
        for layout, folder in folders.items()
    }
    second_parts |= {"late " + layout: Part(model, layout, folder, NUM_STEPS) for layout, folder in late.items()}
    second = run_all(second_parts)
    for layout, folder in folders.items():
        listings[layout].append(names(folder))
    return Runs(
        whole={layout: first["whole " + layout] for layout in CHECKED},
        halves={layout: (first["first " + layout], second["second " + layout]) for layout in CHECKED},
        early={layout: first["early " + layout] for layout in late},
        late={layout: second["late " + layout] for layout in late},
        listings=listings,
    )


def run_all(parts: dict[str, Part]) -> dict[str, list[State]]:
    """All parts, those of one number of ranks in the same processes; the ranks' states of each."""
    found: dict[str, list[State]] = {}
    for world_size in sorted({WORLD[part.layout] for part in parts.values()}):
        mine = {name: part for name, part in parts.items() if WORLD[part.layout] == world_size}
        ranks = run_distributed(run_parts, world_size, mine, timeout_seconds=400)
        found |= {name: [rank[name] for rank in ranks] for name in mine}
    return found


def spoil(folder: Path) -> None:
    """Add what a killed run may leave, an unpublished folder, and newer checkpoints than the whole one, all damaged."""
    (folder / ".partial_step_000003").mkdir()
    (folder / ".partial_step_000003" / "__0_0.distcp").write_bytes(b"half")
    (folder / "step_000009").mkdir()
    for step, name in ((7, "__1_0.distcp"), (8, ".metadata")):
        damaged = folder / f"step_{step:06d}"
        shutil.copytree(folder / "step_000002", damaged)
        with (damaged / name).open("r+b") as file:
            if step == 7:
                file.seek(1000)
                byte = file.read(1)
                file.seek(1000)
                file.write(bytes([byte[0] ^ 1]))
            else:
                os.truncate(file.fileno(), 1000)


def assert_same(found: State, wanted: State) -> None:
    assert found.schedule == wanted.schedule
    assert found.weights.keys() == wanted.weights.keys()
    differing = [name for name in wanted.weights if not torch.equal(found.weights[name], wanted.weights[name])]
    assert differing == []
    assert len(found.moments) == len(wanted.moments) > 0
    for mine, theirs in zip(found.moments, wanted.moments, strict=True):
        assert mine.keys() == theirs.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert float(mine["step"]) == wanted.schedule["num_steps"]
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert found.groups == wanted.groups
    assert all(torch.equal(a, b) for a, b in zip(found.random, wanted.random, strict=True))


@pytest.mark.parametrize("layout", CHECKED)
def test_a_restored_run_goes_on_to_the_bit(layout: str, runs: Runs) -> None:
    for whole, first, second in zip(runs.whole[layout], *runs.halves[layout], strict=True):
        assert (first.progress, second.progress) == (None, {"step": 2, "rows": 8})
        assert_same(second, whole)
        assert first.metrics + second.metrics == whole.metrics
        assert first.drawn + second.drawn == whole.drawn
        rates = [metrics["optim/learning_rate"] for metrics in whole.metrics]
        assert rates[0] < rates[1] > rates[2] > rates[3], f"{rates} is no warm-up and decay"
        assert not torch.equal(first.weights["model.norm.weight"], second.weights["model.norm.weight"])


@pytest.mark.parametrize("layout", ["TP2", "DP2 distributed optimizer"])
def test_saving_before_any_update_neither_fails_nor_disturbs(layout: str, runs: Runs) -> None:
    for early, half in zip(runs.early[layout], runs.halves[layout][0], strict=True):
        assert_same(early, half)
        assert early.metrics == half.metrics
    for whole, late in zip(runs.whole[layout], runs.late[layout], strict=True):
        assert late.progress == {"step": 0, "rows": 0}
        assert_same(late, whole)
        assert late.metrics == whole.metrics


@pytest.mark.parametrize("layout", CHECKED)
def test_damaged_ones_are_named_and_set_aside_and_old_ones_go(layout: str, runs: Runs) -> None:
    after_first, after_second = runs.listings[layout]
    assert after_first == ["step_000002"]
    damaged = ["damaged_step_000007", "damaged_step_000008", "damaged_step_000009"]
    assert after_second == [*damaged, "step_000003", "step_000004"]
    for state in runs.halves[layout][1]:
        none, short, flipped = state.warned
        assert "step_000009 is damaged: manifest.json is missing; it is not used, and kept as damaged_step_0" in none
        assert "step_000008 is damaged: .metadata has 1000 bytes, expected " in short
        assert "step_000007 is damaged: __1_0.distcp has XXH3 " in flipped
        assert runs.whole[layout][0].warned == []
