"""Where do two runs part?

    python -m tools.compare_runs A B [--tolerance 1e-4] [--ignore PATTERN ...]

A and B are run folders or metrics.jsonl files. Printed are the first difference between their metrics; each metric's
largest difference, and the step at which its differences begin; steps and metrics that only one of them has. Of two
folders that both hold samples/, also the first answer whose tokens differ: metrics that differ while the tokens are
still the same have drifted (rounding, another kernel, another layout); tokens that differ first were sampled
differently, and everything after them follows from that.

Numbers must be equal to the bit, NaN equal to NaN. With --tolerance T they may differ by T * max(1, |a|, |b|): relative
for large numbers, absolute for small ones. Tokens, steps and names have no tolerance. A half-written last line, of a
run that was killed or is still writing, is left out.

Exit status: 0 no difference, 1 some, 2 the input cannot be compared.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import zip_longest
from pathlib import Path
from typing import Any

from megatron_cppo.config import UserError
from megatron_cppo.runlog import read_lines


class InputError(UserError):
    """Something that is no run, or has nothing to compare."""


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """A line of metrics: its step; whether an evaluation wrote it (after the step's own line); its turn, if repeated.

    >>> str(Place(step=20, is_evaluation=True, turn=0))
    'step 20 (evaluation)'
    """

    step: int
    is_evaluation: bool
    turn: int

    def __str__(self) -> str:
        kind = "evaluation" if self.is_evaluation else "training"
        return f"step {self.step} ({kind}{f', line {self.turn + 1} of it' if self.turn else ''})"


Metrics = dict[Place, dict[str, float]]


@dataclass(frozen=True, slots=True)
class Difference:
    """One number that differs."""

    place: Place
    metric: str
    a: float
    b: float

    @property
    def absolute(self) -> float:
        """|a - b|; infinite when one of them alone is not finite."""
        return abs(self.a - self.b) if math.isfinite(self.a) and math.isfinite(self.b) else math.inf

    @property
    def relative(self) -> float:
        """|a - b| / max(|a|, |b|)."""
        largest = max(abs(self.a), abs(self.b))
        return self.absolute / largest if math.isfinite(self.absolute) and largest else self.absolute


@dataclass(frozen=True, slots=True)
class Absences:
    """What one run alone has: lines, and metrics of lines that both have."""

    lines: tuple[Place, ...]
    metrics: dict[str, tuple[Place, ...]]


@dataclass(frozen=True, slots=True)
class Flip:
    """The first answer whose tokens differ; `position` is the token's, None in place of a token: the answer ended."""

    step: int
    sample_id: int
    position: int
    a: tuple[int, str, float | str] | None
    b: tuple[int, str, float | str] | None
    num_flipped: int
    num_samples: int


def read_metrics(path: Path, ignore: Sequence[str] = ()) -> Metrics:
    """The lines of a run folder or a metrics file, by place, without the metrics that a pattern of `ignore` matches.

    Raises InputError when there is nothing to read or a line is not one of metrics.
    """
    file = path / "metrics.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{file} does not exist; fix: give the folder of a run, or its metrics.jsonl")
    try:
        lines = read_lines(file)
    except ValueError as error:
        raise InputError(str(error)) from error
    if not lines:
        raise InputError(f"{file} has no line yet; fix: wait for the run's first evaluation or step")
    metrics: Metrics = {}
    turns: Counter[tuple[int, bool]] = Counter()
    for number, line in enumerate(lines, start=1):
        step, values = _parsed(line, f"{file}:{number}")
        is_evaluation = any(name.startswith("evaluation/") for name in values)
        kept = {name: value for name, value in values.items() if not any(fnmatchcase(name, p) for p in ignore)}
        if kept or not values:
            metrics[Place(step, is_evaluation, turns[step, is_evaluation])] = kept
            turns[step, is_evaluation] += 1
    if not metrics:
        raise InputError(f"{file} has no metric but those to ignore ({', '.join(ignore)}); fix: ignore fewer")
    return metrics


def _parsed(line: Any, where: str) -> tuple[int, dict[str, float]]:
    if not isinstance(line, dict) or not isinstance(line.get("step"), int):
        raise InputError(f'{where} is no line of metrics, {{"step": 1, ...}}; fix: give a run folder or metrics.jsonl')
    try:
        return line["step"], {name: float(value) for name, value in line.items() if name != "step"}
    except (TypeError, ValueError) as error:
        raise InputError(f"{where} holds a value that is no number ({error}); fix or delete this line") from error


def differences(a: Metrics, b: Metrics, tolerance: float) -> list[Difference]:
    """The numbers that both have and that differ, in the order in which they were logged."""
    found = []
    for place in sorted(a.keys() & b.keys()):
        for metric in sorted(a[place].keys() & b[place].keys()):
            if not _same(a[place][metric], b[place][metric], tolerance):
                found.append(Difference(place, metric, a[place][metric], b[place][metric]))
    return found


def _same(a: float, b: float, tolerance: float) -> bool:
    if repr(a) == repr(b):  # to the bit: 0.0 is not -0.0, any NaN is NaN
        return True
    if not (tolerance and math.isfinite(a) and math.isfinite(b)):
        return False
    return abs(a - b) <= tolerance * max(1.0, abs(a), abs(b))


def absences(a: Metrics, b: Metrics) -> Absences:
    """What `a` has and `b` lacks."""
    metrics: dict[str, tuple[Place, ...]] = {}
    for place in sorted(a.keys() & b.keys()):
        for metric in sorted(a[place].keys() - b[place].keys()):
            metrics[metric] = (*metrics.get(metric, ()), place)
    return Absences(tuple(sorted(a.keys() - b.keys())), metrics)


def first_flip(a: Path, b: Path, steps: Sequence[int]) -> Flip | None:
    """The first of the samples of `steps`, in the run folders `a` and `b`, whose token ids differ; None if none does.

    Raises InputError when a file of samples cannot be read.
    """
    for step in steps:
        pairs = list(zip_longest(_answers(a, step), _answers(b, step)))
        flipped = [
            (number, position)
            for number, (one, other) in enumerate(pairs)
            if (position := _first_unequal(_ids(one), _ids(other))) is not None
        ]
        if flipped:
            number, position = flipped[0]
            one, other = pairs[number]
            tokens = [_token(answer, position) for answer in (one, other)]
            return Flip(step, (one or other)["sample_id"], position, tokens[0], tokens[1], len(flipped), len(pairs))
    return None


def sample_steps(run_dir: Path) -> set[int]:
    """The steps whose samples a run folder holds."""
    return {int(path.stem.removeprefix("step_")) for path in (run_dir / "samples").glob("step_*.jsonl")}


def _answers(run_dir: Path, step: int) -> list[dict[str, Any]]:
    path = run_dir / "samples" / f"step_{step:06d}.jsonl"
    try:
        lines = read_lines(path)
    except ValueError as error:
        raise InputError(str(error)) from error
    if not all(isinstance(line, dict) and {"sample_id", "token_ids"} <= line.keys() for line in lines):
        raise InputError(f"{path} has a line that is no sample; fix: delete it, or compare the metrics files alone")
    return lines


def _ids(answer: Mapping[str, Any] | None) -> list[int]:
    return [] if answer is None else answer["token_ids"]


def _first_unequal(a: Sequence[int], b: Sequence[int]) -> int | None:
    return next((position for position, (x, y) in enumerate(zip_longest(a, b)) if x != y), None)


def _token(answer: Mapping[str, Any] | None, position: int) -> tuple[int, str, float | str] | None:
    """The token's id, its text, and the engine's log-prob of it."""
    if position >= len(_ids(answer)) or answer is None:
        return None
    texts, logp = answer.get("tokens") or [], answer.get("engine_logp") or []
    return (
        answer["token_ids"][position],
        texts[position] if position < len(texts) else "",
        logp[position] if position < len(logp) else math.nan,
    )


def describe_differences(found: Sequence[Difference], a: Metrics) -> Iterator[str]:
    """The first difference in full, then a table of the metrics that differ, the earliest on top."""
    first = found[0]
    same_line = sum(difference.place == first.place for difference in found)
    yield f"first difference: {first.place}, {first.metric}"
    yield f"  A {first.a!r}"
    yield f"  B {first.b!r}"
    yield (
        f"  absolute {first.absolute:.3g}, relative {first.relative:.3g}; "
        f"{same_line} of the {len(a[first.place])} metrics of this line differ"
    )
    yield ""
    yield f"{'metric':<36}{'begins at step':>15}{'lines':>7}{'largest absolute':>18}{'relative':>10}{'at step':>9}"
    by_metric: dict[str, list[Difference]] = {}
    for difference in found:
        by_metric.setdefault(difference.metric, []).append(difference)
    for metric, of_metric in by_metric.items():
        largest = max(of_metric, key=lambda difference: difference.absolute)
        yield (
            f"{metric:<36}{of_metric[0].place.step:>15}{len(of_metric):>7}{largest.absolute:>18.3g}"
            f"{largest.relative:>10.3g}{largest.place.step:>9}"
        )


def describe_absences(only: Absences, run: str) -> Iterator[str]:
    """What only `run` has, a line each."""
    for is_evaluation, kind in ((False, "training"), (True, "evaluation")):
        steps = [place.step for place in only.lines if place.is_evaluation == is_evaluation]
        if steps:
            yield f"only {run} has the {kind} line{'s' * (len(steps) > 1)} of {_listed(steps)}"
    for metric, places in only.metrics.items():
        yield f"only {run} has {metric} at {_listed([place.step for place in places])}"


def _listed(steps: Sequence[int]) -> str:
    """step 3 | steps 3 to 7 | steps 3, 5, 9, ... (12 of them)"""
    if len(steps) == 1:
        return f"step {steps[0]}"
    if list(steps) == list(range(steps[0], steps[-1] + 1)):
        return f"steps {steps[0]} to {steps[-1]}"
    shown = ", ".join(map(str, steps[:5]))
    return f"steps {shown}" + (f", ... ({len(steps)} of them)" if len(steps) > 5 else "")


def describe_samples(flip: Flip | None, steps: Sequence[int], first_metric_step: int | None) -> Iterator[str]:
    """The first flipped token, and whether it or a drift of the numbers came first."""
    if flip is None:
        yield f"samples: the same tokens at {_listed(steps)}"
        if first_metric_step is not None:
            yield "so these answers were sampled alike, and the numbers drifted"
        return
    yield f"samples: tokens differ first at step {flip.step}, sample {flip.sample_id}, token {flip.position}"
    for run, token in (("A", flip.a), ("B", flip.b)):
        told = "no token: the answer has ended" if token is None else f"{token[0]} {token[1]!r}, log-prob {token[2]}"
        yield f"  {run} {told}"
    yield f"  {flip.num_flipped} of the step's {flip.num_samples} answers differ"
    if first_metric_step is not None and first_metric_step < flip.step:
        yield f"so the numbers drifted first, from step {first_metric_step}, until sampling flipped at step {flip.step}"
    else:
        yield f"so sampling flipped at step {flip.step}, before any metric had differed"


def compare(a: Path, b: Path, *, tolerance: float = 0.0, ignore: Sequence[str] = ()) -> list[str]:
    """What differs between two run folders or metrics files, in lines to be read; none when nothing does.

    Raises InputError when they cannot be compared.
    """
    metrics_a, metrics_b = read_metrics(a, ignore), read_metrics(b, ignore)
    found = differences(metrics_a, metrics_b, tolerance)
    report = list(describe_differences(found, metrics_a)) if found else []
    report += describe_absences(absences(metrics_a, metrics_b), "A")
    report += describe_absences(absences(metrics_b, metrics_a), "B")
    steps = sorted(sample_steps(a) & sample_steps(b))
    if steps:
        flip = first_flip(a, b, steps)
        if flip is not None or report:
            report += describe_samples(flip, steps, found[0].place.step if found else None)
    return report


def main(arguments: list[str]) -> int:
    """Compare and print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", metavar="A", type=Path, help="run folder or metrics.jsonl")
    parser.add_argument("b", metavar="B", type=Path, help="the other one")
    parser.add_argument("--tolerance", type=float, default=0.0, help="0 (default): equal to the bit")
    parser.add_argument(
        "--ignore", nargs="+", default=[], metavar="PATTERN", help="metrics to leave out, like 'evaluation/*'"
    )
    given = parser.parse_args(arguments)
    if not 0 <= given.tolerance < math.inf:
        parser.error(f"--tolerance must be 0 or a positive number, got {given.tolerance}")
    try:
        report = compare(given.a, given.b, tolerance=given.tolerance, ignore=given.ignore)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if report:
        print("\n".join([f"A {given.a}", f"B {given.b}", *report]))
        return 1
    print("no difference" + (f" beyond {given.tolerance:g} * max(1, |a|, |b|)" if given.tolerance else ", to the bit"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
