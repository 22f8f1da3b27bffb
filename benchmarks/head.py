"""What does the loss of a head over a split vocabulary cost, here and elsewhere? Time, memory, collectives, errors.

    python -m benchmarks.head [--rows 256 1024] [--repeats 7] [--skip-verl]

Two processes with one thread each hold half of the vocabulary (tensor parallel, gloo). Three tables, for each number of
rows:

- tokens: log-prob of the target and entropy from bfloat16 logits. This project, verl (its own package, in its own
  environment), a gather of the whole vocabulary, a composition of differentiable all-reduces; and log-prob alone from
  this project and Megatron-Core. "compiled" is the same backend fused by torch.compile, the one to use on a CPU with a
  C++ compiler; it is compared where a time is judged.
- views: log-probs of three views of a token, entropy of the original, exact KL(original‖view) of both others. This
  project's one pass against the composition.
- linear: log-prob and entropy from hidden rows and the head's weight. This project's backends against logits that are
  materialised.

A time is that of one forward and backward, the median over repeats, in which implementations take turns; × is how many
times this project's first row it takes, by pairs of the same repeat: median [quartiles]. Casts to float32 are counted
where an implementation needs them. Memory is in u, one float32 buffer of a rank's logits: `held` from forward to
backward, `peak` above the start; inputs are not counted, gradients are. Collectives are calls and the bytes that a rank
hands over. Errors are the worst of a small case against float64: statistics in nats, gradients relative to the
largest (bfloat16 rounds by 2e-3); `off` marks those beyond rounding.

The first run with verl needs a package index, and verl compiles a kernel: a C++ compiler too. Exit status 1 when a bar
is missed or this project is off. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles

from benchmarks.head_peers import ENTROPY, KL, LOGP, VERL, install_verl
from benchmarks.head_ranks import (
    CHUNKED,
    COMPILED,
    COMPOSITION,
    LINEAR,
    OURS,
    OURS_LOGP,
    OVERWRITING,
    RANKS,
    TOKENS,
    VERL_ROW,
    VIEWS,
    Measurement,
    Options,
    Sizes,
)

ROOT = Path(__file__).resolve().parents[1]
OUR_ROWS = (OURS, OVERWRITING, COMPILED, OURS_LOGP, CHUNKED)
NATS, RELATIVE = 1e-3, 1e-2
GRADIENT = "gradient"
TITLES = {
    TOKENS: "log-prob + entropy of logits [N, {width}], bfloat16",
    VIEWS: "three views, each [N, {width}], bfloat16: log-probs, entropy of the original, KL(original‖view) of both",
    LINEAR: "log-prob + entropy of hidden rows [N, {hidden}] @ weight [{width}, {hidden}]ᵀ, bfloat16",
}
Found = dict[tuple[str, int, str], Measurement]


def run_ranks(python: Path, options: Options, folder: Path, malloc: str) -> Found:
    """Start one process per rank, wait for them, and read what they measured; RuntimeError with a rank's last words."""
    result = folder / "result.json"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    if malloc == "keep":
        environment |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
    processes, logs = [], [folder / f"rank{rank}.log" for rank in range(RANKS)]
    for rank, log in enumerate(logs):
        given = [str(rank), str(folder / "store"), str(result), json.dumps(asdict(options))]
        command = [str(python), "-m", "benchmarks.head_ranks", *given]
        with log.open("w") as errors:
            processes.append(
                subprocess.Popen(command, cwd=ROOT, env=environment, stdout=sys.stderr.fileno(), stderr=errors)
            )
    try:
        while any(process.poll() is None for process in processes):
            if any(process.poll() for process in processes):
                break
            time.sleep(0.2)
        for rank, process in enumerate(processes):
            if process.poll():
                raise RuntimeError(f"rank {rank} ended with {process.returncode}:\n{logs[rank].read_text()[-2000:]}")
    finally:
        for process in processes:
            process.kill()
            process.wait()
    measured = [Measurement(**line) for line in json.loads(result.read_text())]
    return {(line.table, line.rows, line.name): line for line in measured}


def ratio(one: Measurement, base: Measurement) -> tuple[float, float, float]:
    """How many times `base` it takes: the median and the quartiles of the repeats' own ratios."""
    ratios = [a / b for a, b in zip(one.seconds, base.seconds, strict=True)]
    low, _, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return median(ratios), low, high


def is_off(line: Measurement) -> bool:
    """Whether its numbers are wrong beyond rounding."""
    return any(not error <= (RELATIVE if name == GRADIENT else NATS) for name, error in line.errors.items())


def table_lines(lines: Sequence[Measurement]) -> list[str]:
    """One table in Markdown; the first line is the base of the ratios."""
    table = lines[0].table
    statistics = [LOGP, ENTROPY, *([KL] if table == VIEWS else []), GRADIENT]
    peaks = ["peak without weight gradient", "peak"] if table == LINEAR else ["peak"]
    head = ["", "ms", "×", "held", *peaks, "forward", "backward", *(f"error {name}" for name in statistics), ""]
    rows = [head, ["---", *["---:"] * (len(head) - 2), "---"]]
    for line in lines:
        if line.failure:
            rows.append([line.name, *["–"] * (len(head) - 2), line.failure])
            continue
        times = "1" if line is lines[0] else "–"
        if line is not lines[0] and not lines[0].failure:
            times = "{:.2f} [{:.2f}, {:.2f}]".format(*ratio(line, lines[0]))
        rows.append(
            [
                line.name,
                f"{1000 * median(line.seconds):.0f}",
                times,
                f"{line.held:.4f}",
                *([f"{line.peak_without_weight:.2f}"] if table == LINEAR else []),
                f"{line.peak:.2f}",
                *(
                    f"{calls} × {total // calls:,} B" if calls else "0"
                    for calls, total in (line.forward, line.backward)
                ),
                *(f"{line.errors[name]:.1e}" if name in line.errors else "–" for name in statistics),
                "off" if is_off(line) else "",
            ]
        )
    return ["| " + " | ".join(row) + " |" for row in rows]


@dataclass(frozen=True, slots=True)
class Bar:
    """What a row has to reach at every number of rows; `value` may also need the row that it is compared with."""

    text: str
    table: str
    name: str
    against: str
    value: Callable[[Measurement, Measurement], float]
    limit: float
    at_least: bool = False

    def judge(self, found: Found, rows: int) -> tuple[str, bool | None]:
        """The value at some number of rows, and whether it reaches the limit; None where it was not measured."""
        lines = [found.get((self.table, rows, name)) for name in (self.name, self.against)]
        if any(line is None or not line.seconds for line in lines):
            return "not measured", None
        value = self.value(*[line for line in lines if line is not None])
        return f"{value:.4g}", value >= self.limit if self.at_least else value <= self.limit


def _times(line: Measurement, against: Measurement) -> float:
    return ratio(against, line)[0]


def _held(line: Measurement, _: Measurement) -> float:
    return line.held


def _peak(line: Measurement, _: Measurement) -> float:
    return line.peak


def _peak_without_weight(line: Measurement, _: Measurement) -> float:
    return line.peak_without_weight


BARS = (
    Bar(
        "log-prob + entropy: verl takes at least 3 times as long", TOKENS, COMPILED, VERL_ROW, _times, 3, at_least=True
    ),
    Bar("log-prob + entropy: held between forward and backward 0 u (under 0.001)", TOKENS, OURS, OURS, _held, 0.001),
    Bar("log-prob + entropy: peak at most 0.6 u", TOKENS, OURS, OURS, _peak, 0.6),
    Bar("the same with overwrite_logits: at most 0.1 u", TOKENS, OVERWRITING, OVERWRITING, _peak, 0.1),
    Bar(
        "three views: the composition at least 6 times as long", VIEWS, COMPILED, COMPOSITION, _times, 6, at_least=True
    ),
    Bar("linear: peak without weight gradient at most 0.3 u", LINEAR, OURS, OURS, _peak_without_weight, 0.3),
)


def print_bars(found: Found, rows: Sequence[int], tables: Sequence[str]) -> bool:
    """Print every bar with its value at each number of rows; whether none is missed."""
    fine = True
    print("\n## Bars\n")
    for bar in BARS:
        if bar.table in tables:
            judged = [bar.judge(found, number) for number in rows]
            values = ", ".join(f"N={number}: {value}" for number, (value, _) in zip(rows, judged, strict=True))
            verdicts = [verdict for _, verdict in judged]
            verdict = "MISSED" if False in verdicts else "not measured" if None in verdicts else "met"
            fine &= False not in verdicts
            print(f"- {verdict}: {bar.text} ({values})")
    return fine


def machine(with_verl: bool) -> str:
    """Where and with what this was measured."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return (
        f"{model}, {os.cpu_count()} cores; torch {version('torch')}, megatron-core {version('megatron-core')}, "
        f"verl {VERL if with_verl else 'skipped'}, commit {commit.stdout.strip() or 'unknown'}; "
        f"{date.today().isoformat()}"
    )


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 1024], help="N, tokens; 1024 takes about 18 GB")
    parser.add_argument("--repeats", type=int, default=7, help="of every implementation, in turns")
    parser.add_argument("--tables", nargs="+", choices=tuple(TITLES), default=list(TITLES))
    parser.add_argument("--vocab-size", type=int, default=151936, help="of both ranks together")
    parser.add_argument("--hidden", type=int, default=544, help="hidden size of the table `linear`")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--skip-verl", action="store_true", help="install and measure no verl")
    parser.add_argument(
        "--malloc",
        choices=("keep", "default"),
        default="keep",
        help="keep freed memory in the process, as the caching allocator of a GPU does (glibc), or return it, so that "
        "whoever allocates much pays for fresh pages every time",
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/head"), help="where verl's environment is kept")
    given = parser.parse_args(arguments)
    if given.vocab_size % RANKS:
        parser.error(f"--vocab-size {given.vocab_size} cannot be cut into {RANKS} equal shards; give an even number")
    if min(given.repeats, *given.rows) < 1:
        parser.error("--repeats and --rows must be at least 1")
    for rows in given.rows if LINEAR in given.tables else []:
        try:
            Sizes(rows, given.vocab_size, given.hidden).check()
        except ValueError as error:
            parser.error(str(error))
    return given


def main(arguments: Sequence[str]) -> int:
    """Measure and print; returns the exit status."""
    given = parse(arguments)
    with_verl = TOKENS in given.tables and not given.skip_verl
    python = install_verl(given.folder.resolve() / f"verl-{VERL}") if with_verl else Path(sys.executable)
    found: Found = {}
    for table in given.tables:
        # Processes of its own, so that one table's memory is free for the next.
        options = Options(
            given.rows, given.repeats, given.temperature, given.vocab_size, given.hidden, table, with_verl
        )
        with tempfile.TemporaryDirectory() as folder:
            found |= run_ranks(python, options, Path(folder), given.malloc)
    print(f"{machine(with_verl)}; {given.repeats} repeats, T = {given.temperature:g}, --malloc {given.malloc}")
    for table in given.tables:
        title = TITLES[table].format(width=given.vocab_size // RANKS, hidden=given.hidden)
        for rows in given.rows:
            unit = Sizes(rows, given.vocab_size, given.hidden).unit
            print(f"\n## {title}\n\nN = {rows}, u = {unit / 2**20:.0f} MiB\n")
            print("\n".join(table_lines([line for key, line in found.items() if key[:2] == (table, rows)])))
    fine = print_bars(found, given.rows, given.tables)
    ours = [line for line in found.values() if line.name in OUR_ROWS]
    return 0 if fine and not any(line.failure or is_off(line) for line in ours) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
