"""A disk that refuses a save or an export, on any rank and at any file: all ranks hear the same, nobody waits, nothing
whole is lost, and once there is room the same process saves.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_cppo.config import UserError
from tests.distributed import tiny_model
from tests.distributed.launch import run_distributed
from tests.distributed.layouts import LAYOUTS, checkpoint
from tests.distributed.tiny_run import Launcher, write_recipe

DATA = ["__0_0.distcp", "__1_0.distcp"]
FILES = [*DATA, ".metadata", "common.pt", "manifest.json", "metadata.json", "progress.json", "random.pt"]

ONE_RANK = ("--trainer.num_gpus", "1", "--policy.tensor_parallel", "1")


@dataclass(frozen=True)
class Attempt:
    """One save or export: the error's text ("" when it went well), and the names in its folder afterwards."""

    error: str
    names: list[str]


def make_policy(model: str, world_size: int) -> Any:
    from megatron_cppo.policy.policy import Policy

    config = tiny_model.make_config(model, world_size, **LAYOUTS["TP2"])
    torch.manual_seed(11)
    plan = tiny_model.make_plan(config)
    return Policy(config, plan, pixels=tiny_model.pixels, banned_ids=tiny_model.BANNED)


def attempt(work: Callable[[], object], folder: Path) -> Attempt:
    """Do `work`, which all ranks do, and look at `folder` when all have done it."""
    error = ""
    try:
        work()
    except UserError as refused:
        error = f"{type(refused).__name__}: {refused}"
    dist.barrier()
    names = sorted(path.name for path in folder.iterdir())
    dist.barrier()
    return Attempt(error, names)


def limited(rank: int, limit_bytes: int, work: Callable[[], object]) -> Callable[[], None]:
    """`work`, with files of no more than `limit_bytes` on rank `rank`, which needs no privilege to arrange."""

    def wrapped() -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if dist.get_rank() == rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
        try:
            work()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return wrapped


def run_limited(rank: int, world_size: int, model: str, folder: Path) -> dict[str, Attempt]:
    """Saves and exports in one process group, with a limit on the size of files of one rank after the other."""
    from megatron_cppo.policy.export import export

    policy = make_policy(model, world_size)

    def save(step: int) -> Callable[[], object]:
        return lambda: policy.save(folder, at_step=step, progress={}, keep=1)

    def write_export() -> None:
        export(policy.weights(), source=model, folder=folder / "export")

    found = {"first": attempt(save(1), folder)}
    for victim, limit in ((0, 100), (0, 60_000), (1, 60_000)):
        found[f"rank {victim}, {limit}"] = attempt(limited(victim, limit, save(2)), folder)

    def save_in_background() -> None:
        policy.save(folder, at_step=2, progress={}, keep=1, background=True)
        assert policy.saving_step == 2
        policy.finish_save()

    found["rank 1, in the background"] = attempt(limited(1, 60_000, save_in_background), folder)
    assert policy.saving_step is None
    found["again"] = attempt(save(2), folder)
    assert policy.restore(folder) == {"step": 2}
    found["export refused"] = attempt(limited(0, 20_000, write_export), folder)
    found["export"] = attempt(write_export, folder)
    found["second export refused"] = attempt(limited(0, 20_000, write_export), folder)
    assert multiprocessing.active_children() == [], "a writer was left, which a kill would orphan"
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return checkpoint(tmp_path_factory.mktemp("hf"))


def test_a_refused_write_of_any_rank_is_told_by_all(model: str, tmp_path: Path) -> None:
    first, second = run_distributed(run_limited, 2, model, tmp_path)
    assert first == second
    assert first["first"] == Attempt("", ["step_000001"])
    for case, file in (
        ("rank 0, 100", "random.pt"),
        ("rank 0, 60000", "__0_0.distcp"),
        ("rank 1, 60000", "__1_0.distcp"),
        ("rank 1, in the background", "__1_0.distcp"),
    ):
        error = first[case].error
        assert error.startswith(f"SaveError: checkpoint {tmp_path}/step_000002 could not be written:\n  {case[:6]}: ")
        assert f"{file}: File too large\n" in error
        assert error.count("  rank ") == 1, error
        assert "those before it are untouched: step_000001\nfix: make room there" in error
        assert first[case].names == ["step_000001"]
    assert first["again"] == Attempt("", ["step_000002"])
    error = first["export refused"].error
    assert error.startswith(f"ExportError: export {tmp_path}/export could not be written:\n  rank 0: ")
    assert "shard-0.safetensors: " in error
    assert "File too large" in error
    assert first["export refused"].names == ["step_000002"]
    assert first["export"] == Attempt("", ["export", "step_000002"])
    assert first["second export refused"].error == error
    assert first["second export refused"].names == ["export", "step_000002"]
    assert (tmp_path / "export" / "model.safetensors").stat().st_size > 100_000


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, in memory, whose size and number of files can be changed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a small file system: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def resize(disk: Path, option: str) -> None:
    """Give the file system another limit, on all ranks at once."""
    if dist.get_rank() == 0:
        subprocess.run(["mount", "-o", f"remount,{option}", disk], check=True)
    dist.barrier()


def used_bytes(disk: Path) -> int:
    state = os.statvfs(disk)
    return (state.f_blocks - state.f_bfree) * state.f_frsize


def run_full(rank: int, world_size: int, model: str, disk: Path) -> dict[str, list[Attempt]]:
    """Saves and exports in one process group on a disk that is full in one way after the other."""
    from megatron_cppo.policy.export import export
    from megatron_cppo.storage import checkpoint_files

    policy = make_policy(model, world_size)
    folder = disk / "checkpoints"

    def save() -> None:
        policy.save(folder, at_step=2, progress={}, keep=2)

    policy.save(folder, at_step=1, progress={}, keep=2)
    found: dict[str, list[Attempt]] = {"files": []}
    state = os.statvfs(disk)
    num_files = state.f_files - state.f_ffree
    while not found["files"] or found["files"][-1].error:
        resize(disk, f"nr_inodes={num_files}")
        found["files"].append(attempt(save, folder))
        num_files += 1
        assert num_files < 100, found["files"][-1]
    resize(disk, "nr_inodes=1000")
    shutil.rmtree(folder / "step_000002", ignore_errors=True)
    dist.barrier()
    size = used_bytes(folder / "step_000001")
    resize(disk, f"size={size + 2**19}")
    found["foreseen"] = [attempt(save, folder)]
    # As if others had taken the room between the look and the writing.
    checkpoint_files.room = lambda folder, wanted_bytes: None
    resize(disk, f"size={size + 2**16}")
    found["unforeseen"] = [attempt(save, folder)]
    found["export"] = [attempt(lambda: export(policy.weights(), source=model, folder=disk / "export"), disk)]
    resize(disk, "size=64m")
    found["again"] = [attempt(save, folder)]
    assert policy.restore(folder) == {"step": 2}
    return found


def test_a_full_disk_at_any_file(model: str, small_disk: Path) -> None:
    first, second = run_distributed(run_full, 2, model, small_disk)
    assert first == second
    *refused, last = first["files"]
    assert last == Attempt("", ["step_000001", "step_000002"])
    assert {tuple(attempt.names) for attempt in refused} == {("step_000001",)}
    said = "\n".join(attempt.error for attempt in refused)
    for name in FILES:
        # The index has another name while it is written.
        assert f"{name}.tmp: No space" in said or f"{name}: No space" in said, f"never refused at {name}:\n{said}"
    (foreseen,) = first["foreseen"]
    assert "rank 0: " in foreseen.error
    assert ": it takes " in foreseen.error
    assert " are free)" in foreseen.error
    assert foreseen.names == ["step_000001"]
    (unforeseen,) = first["unforeseen"]
    assert ".distcp: No space left on device (" in unforeseen.error
    assert unforeseen.names == ["step_000001"]
    (export,) = first["export"]
    assert "No space left on device" in export.error
    assert export.names == ["checkpoints"]
    assert first["again"] == [Attempt("", ["step_000001", "step_000002"])]


def failures(run_dir: Path) -> list[tuple[int, str]]:
    path = run_dir / "failures.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(line["step"], line["what"]) for line in map(json.loads, lines)]


def steps(run_dir: Path) -> list[int]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if "policy/loss" in line]


def test_a_run_stops_or_goes_on_as_configured(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    launcher = Launcher(tmp_path)
    for choice in ("stop", "continue"):
        run_dir = tmp_path / choice
        run_dir.mkdir()
        (run_dir / "checkpoints").write_text("a file where the folder should be")
        flags = ("--trainer.on_save_failure", choice, "--trainer.num_steps", "2", *ONE_RANK)
        assert launcher.finish(choice, *flags) == 2, launcher.said(choice)
        said = launcher.said(choice)
        assert "Traceback" not in said, said
        assert f"step_{1 if choice == 'stop' else 2:06d} could not be written:\n  rank 0: " in said
        assert "checkpoints: File exists\n" in said
    assert (steps(tmp_path / "stop"), failures(tmp_path / "stop")) == ([1], [])
    assert not (tmp_path / "stop" / "export").exists()
    # The last save of a run is an error in any case, but not before the export.
    assert (steps(tmp_path / "continue"), failures(tmp_path / "continue")) == ([1, 2], [(1, "checkpoint")])
    assert (tmp_path / "continue" / "export" / "model.safetensors").is_file()
    assert "(checkpoint failures so far: 1)" in launcher.said("continue")
