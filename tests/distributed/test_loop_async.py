"""The asynchronous loop on two ranks: without a lead it is the synchronous one, to the byte; with one, answers are as
old as the bound allows and no older, and every prompt is trained on once, in order, also when the run was killed.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_cppo import config as configuration
from megatron_cppo.config import Config
from megatron_cppo.plan import resolve
from tests.distributed.launch import run_distributed
from tests.distributed.tiny_run import Launcher, write_recipe

NUM_STEPS = 4
LEADS = {"one ahead": 1, "two ahead": 2}
KILLED_AFTER = 2


class Noted:
    """An engine, and what was asked of it, in order; evaluations ask the engine itself."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            answer = getattr(self.engine, name)(*arguments, **named)
            number = {"submit": answer, "collect": arguments, "load_weights": named.get("version")}.get(name)
            self.calls.append(name if number is None else f"{name} {number[0] if name == 'collect' else number}")
            return answer

        return call


class Stale(Noted):
    """Claims to have loaded the first update's weights."""

    def load_weights(self, weights: Any, *, version: int) -> None:
        if version == 1:
            assert list(weights)  # all ranks gather them
            self.engine._version = version
        else:
            self.engine.load_weights(weights, version=version)


def changed(config: Config, run_dir: Path, *, ahead: int = 0, checks: int = 0) -> Config:
    rollout = dataclasses.replace(config.rollout, max_staleness=ahead, check_every_steps=checks)
    trainer = dataclasses.replace(config.trainer, run_dir=str(run_dir), num_steps=NUM_STEPS, updates_per_step=1)
    return dataclasses.replace(config, rollout=rollout, trainer=trainer)


def one_run(config: Config, loop: Callable[[Any], None], engine: type[Noted] = Noted) -> tuple[list[str], str]:
    """What was asked of the engine of a run, and what ended it."""
    from megatron_cppo.assembly import build_run
    from megatron_cppo.policy import groups as process_groups
    from megatron_cppo.selfcheck import SelfCheckError

    error = ""
    with build_run(config, resolve(config), {}) as run:
        noted = engine(run.engine)
        try:
            loop(dataclasses.replace(run, engine=noted))
        except SelfCheckError as stopped:
            error = str(stopped)
            run.log.close()
    process_groups.destroy()
    return noted.calls, error


def run_loops(rank: int, world_size: int, config: Config, root: Path) -> dict[str, tuple[list[str], str]]:
    from megatron_cppo.loop import reinforce
    from megatron_cppo.loop_async import reinforce_async

    multiprocessing.current_process().daemon = False  # it has grading workers and checkpoint writers
    found = {
        "sync": one_run(changed(config, root / "sync", checks=1), reinforce),
        "no lead": one_run(changed(config, root / "no lead"), reinforce_async),
    }
    for name, ahead in LEADS.items():
        found[name] = one_run(changed(config, root / name, ahead=ahead, checks=1), reinforce_async)
    found["stale"] = one_run(changed(config, root / "stale", checks=2), reinforce, Stale)
    return found


@dataclass(frozen=True)
class Runs:
    launcher: Launcher
    ranks: list[dict[str, tuple[list[str], str]]]

    def folder(self, run: str) -> Path:
        return self.launcher.folder / run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("async")
    write_recipe(folder)
    recipe = folder / "recipe.json"
    config = from_recipe(recipe)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", str(folder))
        ranks = run_distributed(run_loops, 2, config, folder, timeout_seconds=300)
    configuration.save(changed(config, folder / "killed", ahead=1), recipe)
    return Runs(Launcher(folder), ranks)


def from_recipe(recipe: Path) -> Config:
    from megatron_cppo.train import read_config

    return read_config(str(recipe), [])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def samples(run: Path, step: int) -> list[dict[str, Any]]:
    return lines(run / "samples" / f"step_{step:06d}.jsonl")


def prompts(run: Path) -> list[list[tuple[int, int]]]:
    """(epoch, row) of every step's prompts, in their order."""
    return [
        list(dict.fromkeys((sample["epoch"], sample["row"]) for sample in samples(run, step)))
        for step in range(1, NUM_STEPS + 1)
    ]


def without_rollout(run: Path) -> list[dict[str, Any]]:
    """The run's metrics, but for those that one loop has and the other has not, or a check."""
    found = lines(run / "metrics.jsonl")
    return [{name: value for name, value in line.items() if not name.startswith("rollout/")} for line in found]


def test_without_a_lead_it_is_the_synchronous_loop_to_the_byte(runs: Runs) -> None:
    sync, same = runs.folder("sync"), runs.folder("no lead")
    assert without_rollout(sync) == without_rollout(same)
    for path in (*(sync / "samples").iterdir(), *(sync / "export").iterdir()):
        assert path.read_bytes() == (same / path.relative_to(sync)).read_bytes(), path.name
    ages = [{n: v for n, v in line.items() if "gap" not in n} for line in rollout_metrics(same)]
    assert ages == [{"rollout/staleness_mean": 0, "rollout/staleness_max": 0, "rollout/cut_share": 0}] * NUM_STEPS
    assert without_rollout(sync)[-1].keys() >= {"evaluation/reward"}


def rollout_metrics(run: Path) -> list[dict[str, float]]:
    steps = [line for line in lines(run / "metrics.jsonl") if "policy/loss" in line]
    return [{name: value for name, value in line.items() if name.startswith("rollout/")} for line in steps]


def test_the_policy_has_the_memory_while_it_updates(runs: Runs) -> None:
    turns = [call for step in range(1, NUM_STEPS + 1) for call in ("generate", "sleep", "wake", f"load_weights {step}")]
    for rank in runs.ranks:
        assert rank["sync"] == (["load_weights 0", *turns], "")


def test_prompts_are_submitted_as_early_as_the_bound_allows_and_none_in_vain(runs: Runs) -> None:
    wanted = {
        "no lead": "l0 s1 c1 l1 s2 c2 l2 s3 c3 l3 s4 c4 l4",
        "one ahead": "l0 s1 s2 c1 l1 s3 c2 l2 s4 c3 l3 c4 l4",
        "two ahead": "l0 s1 s2 s3 c1 l1 s4 c2 l2 c3 l3 c4 l4",
    }
    for rank in runs.ranks:
        for name, calls in wanted.items():
            assert " ".join(re.sub(r"(\w)\w* ", r"\1", call) for call in rank[name][0]) == calls


@pytest.mark.parametrize("name", LEADS)
def test_answers_are_as_old_as_the_bound_allows(name: str, runs: Runs) -> None:
    run, ahead = runs.folder(name), LEADS[name]
    assert prompts(run) == prompts(runs.folder("sync"))
    for step, metrics in enumerate(rollout_metrics(run), 1):
        version = max(0, step - 1 - ahead)
        assert {sample["version"] for sample in samples(run, step)} == {version}
        age = step - 1 - version
        assert (metrics["rollout/staleness_mean"], metrics["rollout/staleness_max"]) == (age, age)
        assert metrics["rollout/cut_share"] == 0


def test_only_answers_of_the_current_weights_are_checked(runs: Runs) -> None:
    for name, checked in (("sync", NUM_STEPS), ("no lead", 1), ("one ahead", 1), ("two ahead", 1)):
        found = rollout_metrics(runs.folder(name))
        assert ["rollout/logp_gap_mean" in line for line in found] == [step < checked for step in range(NUM_STEPS)]
        for line in found[:checked]:
            assert 0 < line["rollout/logp_gap_mean"] <= line["rollout/logp_gap_p99"] <= line["rollout/logp_gap_max"]
            assert line["rollout/logp_gap_max"] < 1e-5
            assert line["rollout/logp_gap_image"] == line["rollout/logp_gap_mean"]  # all prompts have images
            assert "rollout/logp_gap_text" not in line


def test_an_engine_that_kept_its_weights_is_caught(runs: Runs) -> None:
    for rank in runs.ranks:
        assert "step 2: the check of the engine against the policy failed" in rank["stale"][1]
    assert [line["step"] for line in without_rollout(runs.folder("stale"))] == [0, 1]


def test_a_run_that_leaves_trains_on_every_prompt_once(runs: Runs) -> None:
    """What is in flight when it is told (SIGUSR2) is submitted again by the next start."""
    launcher, run = runs.launcher, runs.folder("left")
    process = launcher.start("left")
    while not (run / "metrics.jsonl").exists():
        assert process.poll() is None, launcher.said("left")
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR2)
    assert process.wait(300) == 75, launcher.said("left")
    (left,) = re.findall(r"left after step (\d+) of", launcher.said("left"))
    assert launcher.finish("left") == 0, launcher.said("left")
    assert f"step_{int(left):06d}" in launcher.said("left"), "resumed from there"
    assert prompts(run) == prompts(runs.folder("sync"))


def test_a_killed_run_trains_on_every_prompt_once(runs: Runs) -> None:
    launcher, run = runs.launcher, runs.folder("killed")
    launcher.kill_after_checkpoint("killed", step=KILLED_AFTER)
    assert launcher.finish("killed") == 0, launcher.said("killed")
    (resumed,) = re.findall(r"resumed from \S*step_(\d+)", launcher.said("killed"))
    assert KILLED_AFTER <= int(resumed) < NUM_STEPS
    assert prompts(run) == prompts(runs.folder("sync"))
    for step in range(1, NUM_STEPS + 1):
        oldest = int(resumed) if step > int(resumed) else 0
        assert {sample["version"] for sample in samples(run, step)} == {max(oldest, step - 2)}
    assert (run / "export" / "model.safetensors").is_file()
