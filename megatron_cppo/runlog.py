"""What a run leaves behind: the files of its folder, one readable line a step, progress of long phases.

Owns the formats of those files, `report/` reads them. Knows nothing of processes and models: it is constructed on
every rank, takes a rank number, and only rank 0 writes.

    config.json     the config; a folder with another config is refused
    plan.json       what was derived from it          command.txt     one line per start
    metrics.jsonl   one object per step, and one per evaluation: deterministic values only, so two files can be diffed
    timings.jsonl   seconds per span, and of each phase outside a step: everything that a clock said
    samples/        step_000012.jsonl: one object per sample, floats rounded to 6 significant digits
    tensorboard/    both of the above as curves
    failures.jsonl  one object per checkpoint that could not be written while the run went on
    status.json     what the run is doing now: step and phase

JSON knows no NaN: such numbers are written as the strings "nan", "inf" and "-inf", which `float` reads back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import importlib
import importlib.util
import json
import logging
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from megatron_cppo.config import Config, ConfigError, UserError
from megatron_cppo.progress import Progress, brief, duration
from megatron_cppo.resume import refuse_other_config
from megatron_cppo.types import ImageKey, Sample, SampleStatistics
from megatron_cppo.watchdog import Watch

LOG = logging.getLogger("megatron_cppo")

# The readable line of a step: what it calls a metric, and the metric. Absent metrics are left out.
SHOWN = (
    ("reward", "reward/mean"),
    ("accuracy", "reward/accuracy"),
    ("loss", "policy/loss"),
    ("entropy", "policy/entropy"),
    ("kl", "policy/kl"),
    ("cpl", "perception/cpl"),
    ("grad", "optim/grad_norm"),
    ("len", "response/length"),
    ("masked", "perception/masked_share"),
)


class LogError(UserError):
    """A file of the run folder that cannot be written."""


class StepRecord:
    """The metrics and the seconds of one step."""

    __slots__ = ("_clock", "_enter", "metrics", "seconds")

    def __init__(self, clock: Callable[[], float], enter: Callable[[str], None]) -> None:
        self._clock = clock
        self._enter = enter
        self.metrics: dict[str, float] = {}
        self.seconds: dict[str, float] = {}

    def add(self, metrics: Mapping[str, float]) -> None:
        """Add plain numbers that a repeated run would reproduce; a name may be added once."""
        for name, value in metrics.items():
            assert isinstance(value, float | int), f"metric {name} must be a plain number, got {type(value).__name__}"
            assert name not in self.metrics, f"metric {name} was added twice"
            self.metrics[name] = float(value)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Count the seconds inside towards span `name` (host clock: device work counts where the host waits)."""
        assert name not in ("step", "total"), f"span name {name} is taken"
        self._enter(name)
        start = self._clock()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self._clock() - start


class RunLog:
    """The log of one run. Every rank calls the same methods; rank 0 writes, the others only keep time."""

    def __init__(
        self,
        run_dir: Path,
        *,
        rank: int,
        config: Config,
        plan_dict: Mapping[str, Any],
        total_steps: int,
        decode_token: Callable[[int], str],
        describe_view: Callable[[ImageKey], str] | None = None,
        wandb_project: str = "",
        clock: Callable[[], float] = time.perf_counter,
        watch: Watch | None = None,
    ) -> None:
        """Open `run_dir`, new or left by a run of an equal config (call `resume` then).

        `decode_token` gives the text of one token id, `describe_view` the name of the perturbation drawn for an image
        (None: the objective draws no views). `watch` hears of all progress, on every rank. Raises ConfigError when the
        folder belongs to another config, or when W&B is asked for and not installed.
        """
        self.run_dir = run_dir
        self._writes = rank == 0
        self._total_steps = total_steps
        self._decode_token = functools.cache(decode_token)
        self._describe_view = describe_view
        self._clock = clock
        self.watch = watch or Watch()
        self._last_step = 0
        self._in_step = False
        self._first_start: float | None = None
        self._steps_done = 0
        self._purge_step: int | None = None
        self._tensorboard: Any = None
        self._wandb: Any = None
        self._lock: TextIO | None = None
        if not self._writes:
            return
        refuse_other_config(run_dir, config)
        run_dir.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(run_dir)
        wandb = _import_wandb(wandb_project) if wandb_project else None
        (run_dir / "samples").mkdir(parents=True, exist_ok=True)
        # Whole or not at all: a run that is killed right here must be able to start again.
        _replace(run_dir / "config.json", [json.dumps(dataclasses.asdict(config), indent=1)])
        _replace(run_dir / "plan.json", [json.dumps(plan_dict, indent=1)])
        _append(run_dir / "command.txt", shlex.join(sys.orig_argv))
        if wandb is not None:
            self._wandb = _start_wandb(wandb, wandb_project, run_dir, config)

    @contextmanager
    def step(self, step: int) -> Iterator[StepRecord]:
        """Record step `step` (counted from 1); its lines are written when the block ends without an error."""
        start = self._clock()
        if self._first_start is None:
            self._first_start = start
        assert step > self._last_step, f"step {step} after step {self._last_step}"
        record = StepRecord(self._clock, lambda name: self._status(step, name))
        self._in_step = True
        yield record
        self._in_step = False
        self._last_step = step
        self._steps_done += 1
        if not self._writes:
            return
        seconds = record.seconds | {"total": self._clock() - start}
        self._write_metrics(step, record.metrics)
        self._write_timings(step, seconds)
        LOG.info("%s", self._line(step, record))

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Write what an evaluation after step `step` (0: before training) measured, as evaluation/<name>."""
        if not self._writes:
            return
        record = StepRecord(self._clock, _ignore_name)
        record.add({f"evaluation/{name}": value for name, value in values.items()})
        self._write_metrics(step, record.metrics)
        shown = "  ".join(f"{name} {brief(value)}" for name, value in values.items())
        LOG.info("step %d/%d  evaluation  %s", step, self._total_steps, shown)

    def samples(self, step: int, samples: Sequence[Sample], statistics: Sequence[SampleStatistics]) -> None:
        """Write the step's samples, each with what the update saw of it; `sample_id` is the index in `samples`."""
        if not self._writes:
            return
        by_id = {seen.sample_id: seen for seen in statistics}
        assert len(by_id) == len(statistics), f"step {step}: two statistics of one sample"
        assert by_id.keys() <= set(range(len(samples))), f"step {step}: statistics of unknown samples {sorted(by_id)}"
        lines = [
            json.dumps(self._sample_line(step, i, sample, by_id.get(i)), allow_nan=False)
            for i, sample in enumerate(samples)
        ]
        _replace(self.run_dir / "samples" / f"step_{step:06d}.jsonl", lines)

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show the progress of `total` units of work; yields `advance(n)`. Outside a step its seconds are kept."""
        start = self._clock()
        if not self._in_step:
            self._status(self._last_step, name)
        progress = Progress(name, total, sys.stderr, self._clock)

        def advance(count: int) -> None:
            self.watch.advance()
            if self._writes:
                progress.advance(count)

        yield advance
        if not self._writes:
            return
        progress.close()
        if not self._in_step:
            self._write_timings(self._last_step, {name: self._clock() - start})

    def failure(self, step: int, what: str, text: str) -> None:
        """Warn of, and count, something of step `step` that failed without ending the run ("checkpoint").

        Its line stays when a run goes back to an earlier step: what a disk did is no function of the step.
        """
        if not self._writes:
            return
        path = self.run_dir / "failures.jsonl"
        try:
            _append(path, json.dumps({"step": step, "what": what, "text": text}))
        except LogError as error:  # the disk that refused the checkpoint, perhaps
            LOG.warning("step %d/%d  %s; not counted, as %s", step, self._total_steps, text, error)
            return
        count = sum(line["what"] == what for line in read_lines(path))
        LOG.warning("step %d/%d  %s (%s failures so far: %d)", step, self._total_steps, text, what, count)

    def resume(self, step: int) -> None:
        """Forget everything after step `step`, the last one that a checkpoint holds; 0 starts over.

        A half-written last line, left by a killed run, is dropped. Call it before the first step.
        """
        assert self._steps_done == 0, f"resume({step}) after {self._steps_done} steps"
        self._last_step = step
        self._purge_step = step + 1
        if not self._writes:
            return
        for name in ("metrics.jsonl", "timings.jsonl", "failures.jsonl"):
            path = self.run_dir / name
            if path.exists():
                # Nothing is kept of step 0 when the run starts over, as it will be evaluated again.
                stays = name == "failures.jsonl"
                kept = [line for line in read_lines(path) if stays or (step > 0 and line["step"] <= step)]
                _replace(path, [json.dumps(line) for line in kept])
        for path in (self.run_dir / "samples").glob("step_*.jsonl"):
            if int(path.stem.removeprefix("step_")) > step:
                path.unlink()

    def close(self, phase: str = "done") -> None:
        """Say that the run is done (or how else it ends), and finish TensorBoard's and W&B's curves."""
        self._status(self._last_step, phase)
        if self._lock is not None:
            self._lock.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _status(self, step: int, phase: str) -> None:
        self.watch.enter(step, phase)
        if self._writes:
            with contextlib.suppress(LogError):  # nothing depends on it
                _replace(self.run_dir / "status.json", [json.dumps({"step": step, "phase": phase})])

    def _write_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        line = {"step": step} | {name: _plain(value) for name, value in metrics.items()}
        _append(self.run_dir / "metrics.jsonl", json.dumps(line, sort_keys=True, allow_nan=False))
        self._write_curves(step, metrics)

    def _write_timings(self, step: int, seconds: Mapping[str, float]) -> None:
        # In the order of the loop, which the report keeps.
        _append(
            self.run_dir / "timings.jsonl",
            json.dumps({"step": step} | {name: _rounded(value) for name, value in seconds.items()}),
        )
        self._write_curves(step, {f"seconds/{name}": value for name, value in seconds.items()})

    def _write_curves(self, step: int, values: Mapping[str, float]) -> None:
        if self._tensorboard is None:
            # Takes seconds to import, and a resumed run must first know which events to hide.
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=self._purge_step)
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)
        self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log({"step": step, **values})

    def _line(self, step: int, record: StepRecord) -> str:
        shown = [f"{name} {brief(record.metrics[metric])}" for name, metric in SHOWN if metric in record.metrics]
        spans = " ".join(f"{name} {seconds:.1f}" for name, seconds in record.seconds.items())
        assert self._first_start is not None, f"step {step} was never started"
        left = (self._clock() - self._first_start) / self._steps_done * (self._total_steps - step)
        return f"step {step}/{self._total_steps}  {'  '.join(shown)} | {spans} s  eta {duration(left)}"

    def _sample_line(self, step: int, sample_id: int, sample: Sample, seen: SampleStatistics | None) -> dict[str, Any]:
        prompt = sample.prompt
        if seen is not None:
            length = len(sample.token_ids)
            assert len(seen.logp) == len(seen.entropy) == length, f"sample {sample_id}: {length} tokens, {seen}"
        return {
            "step": step,
            "sample_id": sample_id,
            "split": prompt.split,
            "row": prompt.row,
            "epoch": prompt.epoch,
            "index": sample.index,
            "data_source": prompt.data_source,
            "prompt": prompt.text,
            "ground_truth": prompt.ground_truth,
            "num_images": len(prompt.grids),
            "preserving": self._view_names(prompt.images("preserving")),
            "removing": self._view_names(prompt.images("removing")),
            "response": sample.text,
            "truncated": sample.truncated,
            "version": sample.version,
            "earlier": sample.earlier,
            "reward": _rounded(sample.reward),
            "rewards": {name: _rounded(value) for name, value in sample.rewards},
            "grading": sample.grading,
            "advantage": _rounded(sample.advantage),
            "token_ids": list(sample.token_ids),
            "tokens": [self._decode_token(token) for token in sample.token_ids],
            "engine_logp": [_rounded(value) for value in sample.logp],
            "logp": None if seen is None else [_rounded(value) for value in seen.logp],
            "entropy": None if seen is None else [_rounded(value) for value in seen.entropy],
            "entropy_removing": None
            if seen is None or seen.entropy_removing is None
            else [_rounded(value) for value in seen.entropy_removing],
            "mask": None if seen is None or seen.mask is None else list(seen.mask),
        }

    def _view_names(self, keys: Sequence[ImageKey]) -> list[str]:
        return [] if self._describe_view is None else [self._describe_view(key) for key in keys]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; a half-written last line, of a run that was killed or is writing, is left out.

    Raises ValueError when any other line is broken.
    """
    lines = path.read_text().split("\n")
    if lines[-1] == "":
        lines.pop()
    objects: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            objects.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}:{number} is not JSON ({error}); fix or delete this line") from error
    return objects


def _locked(run_dir: Path) -> TextIO:
    """The folder's lock, held while the returned file is open. Raises ConfigError when another process holds it."""
    file = (run_dir / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise ConfigError(
            f"another process is running in {run_dir}; wait for it, end it, or choose another --trainer.run-dir"
        ) from error
    return file


def _import_wandb(project: str) -> Any:
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"trainer.wandb_project is {project!r}, but the package wandb is not installed; fix: pip install wandb, "
            "or leave trainer.wandb_project empty (metrics.jsonl and TensorBoard are written in any case)"
        )
    return importlib.import_module("wandb")


def _start_wandb(wandb: Any, project: str, run_dir: Path, config: Config) -> Any:
    """Start or continue the folder's W&B run; the step is a metric, so that a resumed run may go back."""
    path = run_dir / "wandb_id.txt"
    if not path.exists():
        path.write_text(os.urandom(4).hex() + "\n")
    run = wandb.init(
        project=project,
        id=path.read_text().strip(),
        name=run_dir.resolve().name,
        dir=str(run_dir),
        config=dataclasses.asdict(config),
        resume="allow",
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn a refusal of the disk into a LogError: steps whose numbers are not kept must not go on."""
    try:
        yield
    except OSError as error:
        raise LogError(
            f"{path} cannot be written ({error.strerror}); make room there (or mend what is refused) and start the "
            "same command again: it goes on from the newest checkpoint"
        ) from error


def _append(path: Path, line: str) -> None:
    with _writing(path), path.open("a") as file:
        file.write(line + "\n")


def _replace(path: Path, lines: Sequence[str]) -> None:
    """Write a whole file in one go: a reader, or a killed run, sees the old one or the new one."""
    partial = path.with_suffix(".partial")
    with _writing(path):
        partial.write_text("".join(line + "\n" for line in lines))
        partial.replace(path)


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _rounded(value: float) -> float | str:
    return _plain(float(f"{value:.6g}"))


def _ignore_name(name: str) -> None:
    """What a record that has no spans makes of one."""
