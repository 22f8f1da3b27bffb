"""Kills a real run with SIGKILL at chosen places, starts the same command again, and compares what is left in the end.

A chain is one run folder: the command is started, killed at its first target, started again, and so on until it ends
by itself. Used by `test_kills.py` and, for longer campaigns, by `benchmarks/kill_campaign.py`. What it knows of a run
is what a user sees: the command, the run folder with status.json, and the processes. It needs Linux's /proc.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import signal
import subprocess
import time
import uuid
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tests.distributed.tiny_run import NUM_STEPS, REWARD, TIMEOUT_SECONDS, Launcher, write_recipe
from tools.compare_runs import compare

# Grading takes long enough to be met in the middle.
SLOW_REWARD = "import time\n" + REWARD.replace(":\n", ":\n    time.sleep(0.02)\n", 1)
LAYOUTS = {
    "one rank": ("--policy.tensor_parallel", "1", "--trainer.num_gpus", "1"),
    "TP2": (),
    "DP2": ("--policy.tensor_parallel", "1", "--policy.distributed_optimizer", "True"),
    "PP2": (
        *("--policy.tensor_parallel", "1", "--policy.pipeline_parallel", "2"),
        *("--policy.layers_per_stage", "2", "1"),
    ),
}
# In the order in which a step goes through them. "start" is before the first of them: imports, rows, model, restore.
PHASES = ("rollout", "reward", "batch", "score", "update", "sync", "evaluate", "save", "export", "done")
START = "start"
REPRODUCED = ("metrics.jsonl", "plan.json", "samples/*", "export/*", "checkpoints/step_*")
# Export and end come after every step.
LAST = 10**6
WATCH_SECONDS = 0.002
STARTING_SECONDS = 0.02
END_SECONDS = 20.0
MARK = "KILLED_RUN"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run is: step and phase, since when (nanoseconds of the wall clock)."""

    step: int
    phase: str
    since: int = 0

    @property
    def order(self) -> tuple[int, int]:
        return self.step, PHASES.index(self.phase) if self.phase in PHASES else -1


@dataclass(frozen=True, slots=True)
class Target:
    """Whom to kill ("all", the launcher, or one rank alone) and when: at `share` of the usual length of a phase."""

    step: int
    phase: str
    share: float
    victim: str = "all"


@dataclass(frozen=True, slots=True)
class Kill:
    """A kill as it happened: where it struck, what it left, how it ended, and where the next start went on from."""

    target: Target
    step: int
    phase: str
    milliseconds: float
    left: str
    status: int
    seconds_to_end: float
    resumed_from: int = -1


@dataclass(frozen=True, slots=True)
class Chain:
    """A run folder's kills, the targets that were never reached, and how it differs from the uninterrupted run."""

    layout: str
    kills: tuple[Kill, ...]
    missed: tuple[Target, ...]
    differences: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Runs:
    """One folder's recipe in one layout: its uninterrupted run, and how long each phase of that took, in seconds."""

    launcher: Launcher
    layout: str
    num_steps: int
    reference: Path
    lengths: dict[tuple[int, str], float]

    @property
    def flags(self) -> tuple[str, ...]:
        return (*LAYOUTS[self.layout], "--trainer.num_steps", str(self.num_steps))


def uninterrupted(folder: Path, layout: str, num_steps: int = NUM_STEPS) -> Runs:
    """Run the recipe of `folder` (written when absent) to its end, and time its phases."""
    if not (folder / "recipe.json").exists():
        write_recipe(folder, SLOW_REWARD)
    name = f"{layout.replace(' ', '-')}-reference"
    launcher = Launcher(folder, {"OMP_NUM_THREADS": "1", MARK: uuid.uuid4().hex})
    runs = Runs(launcher, layout, num_steps, folder / name, {})
    started = time.time_ns()
    process = launcher.start(name, *runs.flags)
    place = Place(0, START, started)
    try:
        while process.poll() is None:
            time.sleep(STARTING_SECONDS if place.phase == START else WATCH_SECONDS)
            now = where(runs.reference, started) or place
            if now.order != place.order:
                key = (place.step, place.phase)
                runs.lengths[key] = runs.lengths.get(key, 0.0) + (now.since - place.since) / 1e9
                place = now
    finally:
        end_all(process, launcher.environment[MARK])
    assert process.returncode == 0, launcher.said(name)
    return runs


def kill_chain(runs: Runs, name: str, targets: Sequence[Target], say: Callable[[str], None] = print) -> Chain:
    """Run once more in a folder `name`, killed at each target in turn; targets must follow the order of the run."""
    folder, launcher = runs.launcher.folder, runs.launcher
    waiting, kills, missed = deque(targets), [], []
    while True:
        mark = uuid.uuid4().hex
        started = time.time_ns()
        process = Launcher(folder, {**launcher.environment, MARK: mark}).start(name, *runs.flags)
        kill = None
        try:
            while waiting and kill is None:
                target = waiting.popleft()
                kill = _strike(process, mark, folder / name, started, target, runs)
                if kill is None:
                    missed.append(target)
            if kill is None:
                process.wait(TIMEOUT_SECONDS)
        finally:
            end_all(process, mark)
        if kills:
            kills[-1] = replace(kills[-1], resumed_from=_resumed_from(launcher.said(name)))
        if kill is None:
            assert process.returncode == 0, launcher.said(name)
            break
        kills.append(kill)
        say(f"{runs.layout}: {target.victim} killed, {kill.milliseconds:.0f} ms into {_named(kill.step, kill.phase)}")
    return Chain(runs.layout, tuple(kills), tuple(missed), tuple(differences(runs.reference, folder / name)))


def _strike(
    process: subprocess.Popen[bytes], mark: str, run_dir: Path, started: int, target: Target, runs: Runs
) -> Kill | None:
    """Kill at `target`, and wait until nothing of the run is left; None when the run has passed it or has ended."""
    goal = Place(target.step, target.phase)
    place = Place(0, START, started)
    while target.phase != START and place.order < goal.order:
        if process.poll() is not None:
            return None
        assert time.time_ns() - started < TIMEOUT_SECONDS * 1e9, f"{target} was not reached within {TIMEOUT_SECONDS} s"
        time.sleep(STARTING_SECONDS if place.phase == START else WATCH_SECONDS)
        place = where(run_dir, started) or place
    if target.phase != START and place.order > goal.order:
        return None
    # Early is better than late: the phase may be shorter this time.
    length = min((seconds for (_, phase), seconds in runs.lengths.items() if phase == place.phase), default=0.0)
    moment = place.since + 1e9 * target.share * length
    while time.time_ns() < moment and (where(run_dir, started) or place).order == place.order:
        time.sleep(WATCH_SECONDS / 4)
    killed = time.time_ns()
    _kill(process.pid, mark, target.victim)
    place = where(run_dir, started) or place
    ended = time.monotonic()
    status = process.wait(END_SECONDS)
    assert status != 0, f"after {target} the command ended as if all were well"
    while alive(mark):
        assert time.monotonic() - ended < END_SECONDS, f"after {target} these go on: {commands(alive(mark))}"
        time.sleep(0.01)
    return Kill(
        target,
        place.step,
        place.phase,
        max(0.0, (killed - place.since) / 1e6),
        left_behind(run_dir),
        status,
        time.monotonic() - ended,
    )


def where(run_dir: Path, started: int) -> Place | None:
    """Where the command that was started at `started` is; None before its first phase."""
    place = None
    try:
        with (run_dir / "status.json").open() as file:
            since = os.fstat(file.fileno()).st_mtime_ns
            status = json.load(file)
    except FileNotFoundError:
        return None
    if since > started:
        place = Place(LAST if status["phase"] in ("export", "done") else status["step"], status["phase"], since)
    # A status need not tell of the export.
    for path in (run_dir / "export.partial", run_dir / "export"):
        with contextlib.suppress(FileNotFoundError):
            since = path.stat().st_ctime_ns
            if since > started and (place is None or place.phase not in ("export", "done")):
                return Place(LAST, "export", since)
    return place


def _kill(launcher: int, mark: str, victim: str) -> None:
    if victim == "all":
        os.killpg(launcher, signal.SIGKILL)  # all but the grading workers, which have sessions of their own
    elif victim == "launcher":
        os.kill(launcher, signal.SIGKILL)
    else:
        wanted = f"RANK={victim.removeprefix('rank ')}"
        ranks = [pid for pid, environment in alive(mark).items() if wanted in environment and parent(pid) == launcher]
        assert len(ranks) == 1, f"{victim} of launcher {launcher}: {ranks}"
        os.kill(ranks[0], signal.SIGKILL)


def alive(mark: str) -> dict[int, list[str]]:
    """The processes that descend from a start, whatever session they are in: their environment by id."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            environment = (folder / "environ").read_bytes()
            if mark.encode() in environment:
                found[int(folder.name)] = environment.decode(errors="replace").split("\0")
    return found


def commands(ids: Iterable[int]) -> dict[int, str]:
    """The commands of processes, as far as they are still there."""
    told = {}
    for number in ids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            told[number] = Path(f"/proc/{number}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return told


def parent(pid: int) -> int:
    return int(re.findall(r"PPid:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[0])


def end_all(process: subprocess.Popen[bytes], mark: str) -> None:
    """Leave nothing of a start behind, however it went."""
    for pid in alive(mark):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def left_behind(run_dir: Path) -> str:
    """What a kill left: published checkpoints, half ones with their number of files, other half files, half lines."""
    folder = run_dir / "checkpoints"
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    steps = [str(int(path.name.removeprefix("step_"))) for path in entries if path.name.startswith("step_")]
    told = [f"checkpoints {' '.join(steps) or 'none'}"]
    told += [f"{path.name} ({len(list(path.iterdir()))} files)" for path in entries if path.name.startswith(".")]
    told += sorted(path.name for path in run_dir.glob("*partial*"))
    told += sorted(path.name for path in run_dir.glob("samples/*partial*"))
    for name in ("metrics.jsonl", "timings.jsonl"):
        path = run_dir / name
        text = path.read_bytes() if path.exists() else b""
        if text and not text.endswith(b"\n"):
            told.append(f"half a line in {name}")
    return ", ".join(told)


def _resumed_from(said: str) -> int:
    """The step that a start went on from, by what it said; -1 when it was killed before it got so far."""
    found = re.findall(r"resumed from \S*step_(\d+)", said)
    return int(found[-1]) if found else 0 if "step 0/" in said else -1


def differences(reference: Path, killed: Path) -> list[str]:
    """How a finished run folder differs from another of the same config, in what a run promises to reproduce."""
    found = []
    for part in REPRODUCED:
        assert any(reference.glob(part)), f"{reference} holds no {part}: it is not the folder of a finished run"
    if _bytes(reference, ["metrics.jsonl"]) != _bytes(killed, ["metrics.jsonl"]):
        found.append("metrics.jsonl: " + "; ".join(compare(reference, killed)[:4] or ["equal numbers, other bytes"]))
    for part in ("plan.json", "samples/*", "export/*"):
        one, other = _bytes(reference, [part]), _bytes(killed, [part])
        found += [f"{name} is in one of them alone" for name in sorted(one.keys() ^ other.keys())]
        found += [f"{name} differs" for name in sorted(one.keys() & other.keys()) if one[name] != other[name]]
    for folder in (".", "checkpoints"):
        here, there = (sorted(path.name for path in (run / folder).iterdir()) for run in (reference, killed))
        if here != there:
            found.append(f"{folder} holds {here} and {there}")
    names = [{path.name for path in run.glob("checkpoints/step_*")} for run in (reference, killed)]
    for name in sorted(names[0] & names[1]):
        one, other = (saved_state(run / "checkpoints" / name) for run in (reference, killed))
        parts = sorted(one.keys() | other.keys())
        found += [f"{name}: {part}" for part in parts if not same(one.get(part), other.get(part))]
    return found


def _bytes(run_dir: Path, patterns: Iterable[str]) -> dict[str, bytes]:
    paths = [path for pattern in patterns for path in run_dir.glob(pattern) if path.is_file()]
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in paths}


def saved_state(folder: Path) -> dict[str, Any]:
    """Everything in a checkpoint that a run reads, by name: every whole tensor, and every object of every rank."""
    reader = dcp.FileSystemReader(folder)
    entries = reader.read_metadata().state_dict_metadata
    tensors = {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
    state: dict[str, Any] = dict.fromkeys(entries)
    state |= {name: torch.zeros(entry.size, dtype=entry.properties.dtype) for name, entry in tensors.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this is one process alone
        dcp.load(state, storage_reader=reader, no_dist=True)
    for name, entry in tensors.items():
        if "bucket_idx" in name:
            _clear_gaps(state[name], entry)
    state["common.pt"] = torch.load(folder / "common.pt", weights_only=False)
    return state | {"progress.json": json.loads((folder / "progress.json").read_text())}


def _clear_gaps(bucket: torch.Tensor, entry: TensorStorageMetadata) -> None:
    """Clear what lies between the parameters of an optimizer's bucket.

    Megatron-Core 0.16.1 saves uninitialised memory for these gaps, and drops it when it loads. Parameters begin at
    multiples of 64 elements, gaps where a parameter ends off that grid.
    """
    for chunk in entry.chunks:
        (start,), (size,) = chunk.offsets, chunk.sizes
        if start % 64:
            assert size < 64, f"a gap of {size} elements at {start}"
            bucket[start : start + size] = 0


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, all the way down."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, io.BytesIO) and isinstance(b, io.BytesIO):
        loaded = [torch.load(io.BytesIO(value.getvalue()), weights_only=False) for value in (a, b)]
        return same(*loaded)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and bool(a == b)


def draw_targets(seed: int, num_steps: int, count: int, victims: Sequence[str] = ("all",)) -> list[Target]:
    """`count` seeded random targets in the order of a run: any phase of any step, also the same one twice."""
    draw = random.Random(seed)
    phases = [phase for phase in PHASES if phase not in ("evaluate", "export", "done")]
    places = [(0, "evaluate"), (num_steps, "evaluate"), (LAST, "export")]
    places += [(step, phase) for step in range(1, num_steps + 1) for phase in phases]
    drawn = sorted((draw.choice(places) for _ in range(count)), key=lambda place: Place(*place).order)
    return [Target(step, phase, draw.random(), draw.choice(victims)) for step, phase in drawn]


def kill_table(chains: Sequence[Chain]) -> str:
    """Every kill: when, what it left, where the next start went on from, and whether the end was the same."""
    row = "{:<9}{:<10}{:<18}{:>6}{:>10}  {:<14}{:<11}{}"
    lines = [row.format("layout", "killed", "in", "ms", "ended in", "resumed from", "identical", "left")]
    for chain in chains:
        for kill in chain.kills:
            place, ended = _named(kill.step, kill.phase), f"{kill.seconds_to_end:.2f} s"
            resumed = "not known" if kill.resumed_from < 0 else f"step {kill.resumed_from}"
            same_end = "no" if chain.differences else "yes"
            moment = f"{kill.milliseconds:.0f}"
            lines.append(
                row.format(chain.layout, kill.target.victim, place, moment, ended, resumed, same_end, kill.left)
            )
        lines += [f"{chain.layout:<9}never reached: {_named(t.step, t.phase)}" for t in chain.missed]
        lines += [f"{chain.layout:<9}differs: {difference}" for difference in chain.differences]
    return "\n".join(lines)


def _named(step: int, phase: str) -> str:
    return phase if phase in (START, "export") else f"step {step} {phase}"


def struck(chains: Sequence[Chain]) -> Counter[str]:
    """How often each phase was really hit."""
    return Counter(kill.phase for chain in chains for kill in chain.kills)
