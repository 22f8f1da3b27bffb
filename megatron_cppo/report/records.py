"""The files of a run as plain numbers. Owns what is read and which samples are shown; knows nothing of HTML."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cppo.config import ConfigError
from megatron_cppo.runlog import read_lines
from megatron_cppo.types import ImageKey, View

MAX_SAMPLE_FILES = 20


@dataclass(frozen=True, slots=True)
class Curve:
    """One metric over the steps, in order: `Curve((1, 2), (0.1, 0.4))`."""

    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """What a run folder says. `spans[name][step]` and `phases[name]` are seconds inside and outside the steps."""

    name: str
    config: dict[str, dict[str, Any]]
    plan: dict[str, Any]
    commands: tuple[str, ...]
    curves: dict[str, Curve]
    spans: dict[str, dict[int, float]]
    step_seconds: dict[int, float]
    phases: dict[str, float]

    @property
    def wall_seconds(self) -> float:
        return sum(self.step_seconds.values()) + sum(self.phases.values())


@dataclass(frozen=True, slots=True)
class SampleRecord:
    """One line of a samples file."""

    line: dict[str, Any]

    @property
    def gated(self) -> bool:
        """The gate was open, and an update has seen the perturbed views."""
        return self.line["mask"] is not None

    @property
    def wrong(self) -> bool:
        """It was graded, and earned nothing for accuracy."""
        rewards = self.line["rewards"]
        return bool(rewards) and rewards.get("accuracy", self.line["reward"]) == 0

    @property
    def row(self) -> tuple[str, int]:
        return self.line["split"], self.line["row"]

    def numbers(self, name: str) -> list[float] | None:
        """The per-token numbers `name`, or None where the update did not compute them."""
        return None if self.line[name] is None else [float(value) for value in self.line[name]]

    @property
    def shifts(self) -> list[float] | None:
        """Entropy shift per response token, in nats: removing minus original."""
        original, removing = self.numbers("entropy"), self.numbers("entropy_removing")
        if original is None or removing is None:
            return None
        return [after - before for before, after in zip(original, removing, strict=True)]

    def image(self, index: int, view: View) -> ImageKey:
        line = self.line
        return ImageKey(line["split"], line["row"], index, line["epoch"], view)


def read_run(run_dir: Path) -> Run:
    """Read the folder of a finished, broken or running run.

    Raises ConfigError when it is no run folder or nothing has been logged yet.
    """
    if not (run_dir / "config.json").exists():
        raise ConfigError(f"{run_dir} is not the folder of a run: no config.json in it; fix: give a trainer.run_dir")
    metrics = read_lines(run_dir / "metrics.jsonl") if (run_dir / "metrics.jsonl").exists() else []
    if not metrics:
        raise ConfigError(f"{run_dir}/metrics.jsonl has no line yet; fix: wait for the first step or evaluation")
    timings = read_lines(run_dir / "timings.jsonl") if (run_dir / "timings.jsonl").exists() else []
    spans: dict[str, dict[int, float]] = {}
    step_seconds: dict[int, float] = {}
    phases: dict[str, float] = {}
    for line in timings:
        step = line.pop("step")
        if "total" in line:
            step_seconds[step] = line.pop("total")
            for name, seconds in line.items():
                spans.setdefault(name, {})[step] = seconds
        else:
            for name, seconds in line.items():
                phases[name] = phases.get(name, 0.0) + seconds
    return Run(
        name=run_dir.resolve().name,
        config=json.loads((run_dir / "config.json").read_text()),
        plan=json.loads((run_dir / "plan.json").read_text()),
        commands=tuple((run_dir / "command.txt").read_text().splitlines()),
        curves=_curves(metrics),
        spans=spans,
        step_seconds=step_seconds,
        phases=phases,
    )


def _curves(lines: Sequence[dict[str, Any]]) -> dict[str, Curve]:
    by_name: dict[str, dict[int, float]] = {}
    for line in lines:
        for name, value in line.items():
            if name != "step":
                # An evaluation that was repeated after a resume counts once, the last one.
                by_name.setdefault(name, {})[line["step"]] = float(value)
    return {name: Curve(tuple(sorted(at)), tuple(at[step] for step in sorted(at))) for name, at in by_name.items()}


def choose_samples(run_dir: Path, count: int) -> list[SampleRecord]:
    """At most `count` samples of the latest steps, each of another row: gated ones, and last a wrong answer.

    Gated ones show each removing perturbation in turn; where they are too few, ungated ones follow. Later steps come
    first, at most 20 files are read.
    """
    gated: dict[tuple[str, int], SampleRecord] = {}
    ungated: dict[tuple[str, int], SampleRecord] = {}
    wrong: SampleRecord | None = None
    for sample in _latest_samples(run_dir):
        if wrong is None and sample.wrong and not sample.gated:
            wrong = sample
        else:
            (gated if sample.gated else ungated).setdefault(sample.row, sample)
        if len(gated) >= 4 * count and wrong is not None:
            break
    last = [] if wrong is None else [wrong]
    taken = {sample.row for sample in last}
    first = _alternate([sample for row, sample in gated.items() if row not in taken])
    first += [sample for row, sample in ungated.items() if row not in taken | gated.keys()]
    return (first[: max(count - len(last), 0)] + last)[:count]


def _latest_samples(run_dir: Path) -> Iterator[SampleRecord]:
    for path in sorted((run_dir / "samples").glob("step_*.jsonl"), reverse=True)[:MAX_SAMPLE_FILES]:
        for line in read_lines(path):
            yield SampleRecord(line)


def _alternate(samples: Sequence[SampleRecord]) -> list[SampleRecord]:
    """Deal the samples out by removing perturbation: one of each kind, then again."""
    kinds: dict[tuple[str, ...], list[SampleRecord]] = {}
    for sample in samples:
        kinds.setdefault(tuple(sample.line["removing"]), []).append(sample)
    longest = max((len(queue) for queue in kinds.values()), default=0)
    return [queue[turn] for turn in range(longest) for queue in kinds.values() if turn < len(queue)]
