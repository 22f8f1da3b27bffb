"""The product from its command line, on two ranks with TP 2: a run repeats itself to the byte, a killed one goes on to
the same bytes, and a run folder belongs to one config.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.distributed.tiny_run import NUM_STEPS, ROOT, Launcher, write_recipe

CONTRACT = ("config.json", "plan.json", "metrics.jsonl", "timings.jsonl", "export/model.safetensors")


@dataclass(frozen=True)
class Runs:
    """The folders of three runs of one config; what the third had left when it was killed."""

    launcher: Launcher
    first: Path
    second: Path
    killed: Path
    left_by_kill: Path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("run")
    write_recipe(folder)
    launcher = Launcher(folder)
    for run in ("first", "second"):
        assert launcher.finish(run) == 0, launcher.said(run)
    launcher.kill_after_checkpoint("killed", step=2)
    shutil.copytree(folder / "killed", folder / "left")
    assert launcher.finish("killed") == 0, launcher.said("killed")
    assert "resumed from" in launcher.said("killed")
    return Runs(launcher, folder / "first", folder / "second", folder / "killed", folder / "left")


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_run_folder_holds_what_is_promised(runs: Runs) -> None:
    for run in (runs.first, runs.killed):
        assert [name for name in CONTRACT if not (run / name).is_file()] == []
        samples = [f"step_{step:06d}.jsonl" for step in range(1, NUM_STEPS + 1)]
        assert sorted(path.name for path in (run / "samples").iterdir()) == samples
        assert all(len(lines(run / "samples" / name)) == 16 for name in samples)
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_000002", "step_000003"]
        assert sorted(path.name for path in (run / "logs").iterdir()) == ["rank0.log", "rank1.log"]
        assert f"step {NUM_STEPS}/{NUM_STEPS}" in (run / "logs" / "rank0.log").read_text()
        assert any((run / "tensorboard").iterdir())
        side = runs.launcher.folder / "model"
        for name in ("config.json", "tokenizer.json", "generation_config.json", "chat_template.jinja"):
            assert (run / "export" / name).read_bytes() == (side / name).read_bytes()
        assert not list(run.rglob("*partial*"))


def test_the_run_learned_something(runs: Runs) -> None:
    """So that equal bytes below are equal training, not equal idling."""
    found = lines(runs.first / "metrics.jsonl")
    steps = [line for line in found if "policy/loss" in line]
    evaluations = [line["step"] for line in found if "policy/loss" not in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert evaluations == [0, 3]
    assert all(line["optim/grad_norm"] > 0 and line["tokens/vision"] > 0 for line in steps)
    assert any(line["perception/masked_share"] > 0 for line in steps)
    assert steps[-1]["policy/kl"] > 0
    assert (runs.first / "export" / "model.safetensors").read_bytes() != (
        runs.launcher.folder / "model" / "model.safetensors"
    ).read_bytes()


def test_the_engine_that_is_embedded_needs_no_correction(runs: Runs) -> None:
    """Its log-probs meet the old policy's of the same tokens, in both updates of a step."""
    steps = [line for line in lines(runs.first / "metrics.jsonl") if "policy/loss" in line]
    for line in steps:
        assert line["policy/correction_weight"] == pytest.approx(1, abs=1e-4)
        assert line["policy/correction_hit_share"] == 0
        assert 0 <= line["policy/engine_kl"] < 1e-8


def test_the_same_command_writes_the_same_bytes(runs: Runs) -> None:
    for name in ("metrics.jsonl", "plan.json", "export/model.safetensors"):
        assert (runs.first / name).read_bytes() == (runs.second / name).read_bytes(), name
    for path in (runs.first / "samples").iterdir():
        assert path.read_bytes() == (runs.second / "samples" / path.name).read_bytes(), path.name


def test_a_killed_run_goes_on_to_the_same_bytes(runs: Runs) -> None:
    assert not (runs.left_by_kill / "export").exists()
    assert not (runs.left_by_kill / "checkpoints" / "step_000003").exists()
    for name in ("metrics.jsonl", "export/model.safetensors"):
        assert (runs.killed / name).read_bytes() == (runs.first / name).read_bytes(), name
    for path in (runs.first / "samples").iterdir():
        assert path.read_bytes() == (runs.killed / "samples" / path.name).read_bytes(), path.name


def test_a_folder_belongs_to_one_config(runs: Runs) -> None:
    before = {path: path.read_bytes() for path in runs.first.rglob("*") if path.is_file() and path.suffix != ".log"}
    status = runs.launcher.finish("first", "--algorithm.beta", "0.02")
    said = runs.launcher.said("first")
    assert status == 2, said
    assert "holds a run of another config" in said
    assert "algorithm.beta: 0.01 there, 0.02 here" in said
    assert "fix: choose another --trainer.run_dir" in said
    assert "Traceback" not in said
    after = {path: path.read_bytes() for path in runs.first.rglob("*") if path.is_file() and path.suffix != ".log"}
    assert after == before


def test_a_killed_run_goes_on_in_another_layout(runs: Runs) -> None:
    """From TP2 to two stages: the same answers are sampled, and the update is the same but for rounding."""
    other = runs.first.parent / "other"
    shutil.copytree(runs.left_by_kill, other)
    flags = ("--policy.tensor_parallel", "1", "--policy.pipeline_parallel", "2", "--policy.layers_per_stage", "2", "1")
    assert runs.launcher.finish("other", *flags) == 0, runs.launcher.said("other")
    assert "resumed from" in runs.launcher.said("other")
    wanted, found = (lines(run / "metrics.jsonl") for run in (runs.first, other))
    assert [line["step"] for line in found] == [line["step"] for line in wanted]
    last, there = (next(line for line in each if line["step"] == NUM_STEPS) for each in (found, wanted))
    assert {name: last[name] for name in last if name.startswith("reward/")} == {
        name: there[name] for name in there if name.startswith("reward/")
    }
    assert last["optim/grad_norm"] == pytest.approx(there["optim/grad_norm"], rel=1e-3)
    assert last["policy/loss"] == pytest.approx(there["policy/loss"], rel=1e-3, abs=1e-5)


def test_what_a_run_saved_is_what_it_exported_and_its_engine_got(runs: Runs) -> None:
    """The offline converter makes the tensors of the last checkpoint, which the engine had got."""
    checkpoint, made = runs.first / "checkpoints" / f"step_{NUM_STEPS:06d}", runs.first.parent / "made"
    for tool, *arguments in (("megatron_to_hf", checkpoint, made), ("verify_checkpoint", made, runs.first / "export")):
        done = subprocess.run(
            [sys.executable, ROOT / "tools" / f"{tool}.py", *arguments],
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
