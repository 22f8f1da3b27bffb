"""Half of a step alone: rollouts without updates, and updates on saved rollouts, from the command line.

Training on a run's saved rollouts is that run, to the bit in the same layout, and up to rounding in another.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.tiny_run import NUM_STEPS, Launcher, write_recipe

SHARED = (
    "policy/",
    "perception/",
    "optim/",
    "reward/",
    "tokens/",
    "response/",
    "groups/",
    "samples/",
    "grading/",
    "rollout/",
)
NO_EVALUATION = ("--data.evaluation",)  # no file behind it
LAYOUTS = {
    "TP2": (),
    "DP2": ("--policy.tensor_parallel", "1"),
    "PP2": ("--policy.tensor_parallel", "1", "--policy.pipeline_parallel", "2", "--policy.layers_per_stage", "2", "1"),
}
# Adam's first steps have full size in whatever direction rounding gives to a gradient near zero, so the difference
# between layouts grows with the learning rate: with the recipe's 2e-3 the second step's gradient norm by 5e-5.
SMALL_STEPS = ("--optimizer.learning_rate", "1e-5", "--trainer.num_steps", "2", "--trainer.export", "False")
TOLERANCE = 1e-5
"""Layouts round differently; relative to the larger of the number and one."""
PACKED = {"tokens/segments", "tokens/vision", "tokens/vision_unshared"}
"""How rows are packed is the layout's own."""


@dataclass(frozen=True)
class Runs:
    launcher: Launcher
    rollouts: Path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("debug")
    write_recipe(folder)
    launcher = Launcher(folder)
    assert launcher.finish("normal", "--debug.save_rollouts", "True") == 0, launcher.said("normal")
    return Runs(launcher, folder / "normal" / "rollouts")


def steps(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "reward/mean" in line]


def of_training(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name == "step" or name.startswith(SHARED)}


def test_training_on_saved_rollouts_is_the_run_that_saved_them(runs: Runs) -> None:
    assert runs.launcher.finish("same", *NO_EVALUATION, "--debug.train_on", str(runs.rollouts)) == 0
    normal, same = runs.launcher.folder / "normal", runs.launcher.folder / "same"
    assert steps(same) == [of_training(line) for line in steps(normal)]
    assert len(steps(same)) == NUM_STEPS
    weights = "export/model.safetensors"
    assert (same / weights).read_bytes() == (normal / weights).read_bytes()
    assert len((same / "metrics.jsonl").read_text().splitlines()) == NUM_STEPS  # no evaluation


def test_other_layouts_train_on_the_same_rollouts_to_the_same_numbers(runs: Runs) -> None:
    found = {}
    for layout, flags in LAYOUTS.items():
        common = (*NO_EVALUATION, *SMALL_STEPS, "--debug.train_on", str(runs.rollouts))
        assert runs.launcher.finish(layout, *common, *flags) == 0, runs.launcher.said(layout)
        found[layout] = steps(runs.launcher.folder / layout)
    reference = found.pop("TP2")
    assert len(reference) == 2
    for layout, lines in found.items():
        worst = 0.0
        for line, wanted in zip(lines, reference, strict=True):
            assert line.keys() == wanted.keys()
            for metric in line.keys() - PACKED:
                gap = abs(line[metric] - wanted[metric]) / max(1.0, abs(wanted[metric]))
                worst = max(worst, gap)
                assert gap <= TOLERANCE, f"{layout}: step {line['step']} {metric}: {line[metric]}, {wanted[metric]}"
        print(f"\n{layout} and TP2 on the same rollouts: largest difference of a metric {worst:.1e}")


def test_rollouts_alone_are_those_of_the_starting_weights(runs: Runs) -> None:
    assert runs.launcher.finish("alone", "--debug.rollout_only", "True") == 0, runs.launcher.said("alone")
    run = runs.launcher.folder / "alone"
    first = "rollouts/step_000001.jsonl"
    assert (run / first).read_bytes() == (runs.launcher.folder / "normal" / first).read_bytes()
    assert [line["step"] for line in steps(run)] == [*range(1, NUM_STEPS + 1)]
    assert len(list((run / "rollouts").iterdir())) == NUM_STEPS
    assert not any(name.startswith(("policy/", "optim/")) for line in steps(run) for name in line)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if "evaluation/reward" in line]
    assert [line["step"] for line in evaluations] == [0, NUM_STEPS]
    assert not (run / "checkpoints").exists()
    assert not (run / "export").exists()


def other_rows(runs: Runs) -> Path:
    """A copy of the saved rollouts whose first step says that it was made of a row far behind the end."""
    folder = runs.launcher.folder / "other_rows"
    shutil.copytree(runs.rollouts, folder)
    path = folder / "step_000001.jsonl"
    head, *groups = path.read_text().splitlines()
    told = json.loads(head)
    told["prompts"][0][0] = 10**6
    path.write_text("\n".join([json.dumps(told), *groups]) + "\n")
    return folder


def refused(runs: Runs, run: str, folder: Path, *flags: str) -> str:
    assert runs.launcher.finish(run, *NO_EVALUATION, *flags, "--debug.train_on", str(folder)) == 2
    assert "Traceback" not in runs.launcher.said(run)
    return runs.launcher.said(run)


def test_rollouts_of_rows_that_are_gone_are_refused_at_the_start(runs: Runs) -> None:
    said = refused(runs, "rows", other_rows(runs))
    assert "its row 1000000 is not among the usable rows of data.train" in said


def test_rollouts_of_other_prompts_are_refused_at_the_start(runs: Runs) -> None:
    said = refused(runs, "prompts", runs.rollouts, "--data.instruction", "Think.")
    assert "makes another prompt now than when it was saved" in said


def test_too_few_steps_are_refused_before_anything_starts(runs: Runs) -> None:
    said = refused(runs, "steps", runs.rollouts, "--trainer.num_steps", "5")
    assert f"lacks 2 of the 5 steps, first step_000004.jsonl; use --trainer.num_steps {NUM_STEPS}" in said
    assert not (runs.launcher.folder / "steps").exists()
