"""tools/compare_runs.py: it names the first place where two runs part, and says whether tokens or numbers parted."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_cppo.runlog import read_lines
from tests.unit.example_run import write_run
from tools.compare_runs import InputError, compare, main, read_metrics

ROOT = Path(__file__).parents[2]
NUM_STEPS = 20
Lines = list[dict[str, Any]]


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "example"
    write_run(folder, NUM_STEPS)
    return folder


@pytest.fixture
def runs(example: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two equal run folders, to be made unequal."""
    return Path(shutil.copytree(example, tmp_path / "a")), Path(shutil.copytree(example, tmp_path / "b"))


def edit(file: Path, change: Callable[[Lines], object]) -> None:
    """Change the lines of a file in place."""
    lines = read_lines(file)
    change(lines)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def set_metric(run: Path, step: int, metric: str, value: float | str) -> None:
    def change(lines: Lines) -> None:
        (line,) = [line for line in lines if line["step"] == step and metric in line]
        line[metric] = value

    edit(run / "metrics.jsonl", change)


def metric_at(run: Path, step: int, metric: str) -> float:
    (value,) = [line[metric] for line in read_lines(run / "metrics.jsonl") if line["step"] == step and metric in line]
    return value


def test_equal_runs_are_equal_to_the_bit(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(*runs) == []
    assert compare(runs[0] / "metrics.jsonl", runs[1]) == [], "a file and a folder are compared alike"
    assert main([str(run) for run in runs]) == 0
    assert capsys.readouterr().out == "no difference, to the bit\n"


def test_the_first_difference_is_the_earliest_not_the_largest(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    value = metric_at(runs[0], 7, "policy/loss")
    set_metric(runs[1], 7, "policy/loss", value + 1e-15)
    set_metric(runs[1], 9, "policy/loss", 2.0)
    set_metric(runs[1], 9, "policy/entropy", 3.0)
    set_metric(runs[1], 20, "evaluation/accuracy", 0.0)
    assert main([str(run) for run in runs]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[2:5] == [
        "first difference: step 7 (training), policy/loss",
        f"  A {value!r}",
        f"  B {value + 1e-15!r}",
    ]
    assert said[5].startswith("  absolute 1e-15, relative ")
    assert said[5].endswith("1 of the 30 metrics of this line differ")
    table = {line.split()[0]: line.split()[1:] for line in said[8:11]}
    assert list(table) == ["policy/loss", "policy/entropy", "evaluation/accuracy"]
    assert (table["policy/loss"][:2], table["policy/loss"][-1]) == (["7", "2"], "9")
    assert (table["evaluation/accuracy"][:2], table["evaluation/accuracy"][-1]) == (["20", "1"], "20")


def test_the_tolerance_is_relative_above_one_and_absolute_below(runs: tuple[Path, Path]) -> None:
    for run, small, large in ((runs[0], 0.0, 1000.0), (runs[1], 0.0009, 1000.9)):
        set_metric(run, 3, "policy/kl", small)
        set_metric(run, 3, "response/length", large)
    assert compare(*runs, tolerance=1e-3) == []
    assert compare(*runs, tolerance=8.9e-4)[0] == "first difference: step 3 (training), policy/kl"
    set_metric(runs[1], 3, "response/length", 1001.1)
    assert compare(*runs, tolerance=1e-3)[0] == "first difference: step 3 (training), response/length"


@pytest.mark.parametrize(
    ("one", "other", "tolerance", "same"),
    [
        ("nan", "nan", 0.0, True),
        ("inf", "inf", 0.0, True),
        ("-inf", "inf", 1e9, False),
        ("nan", 1.0, 1e9, False),
        (1.0, "inf", 1e9, False),
        (0.0, -0.0, 0.0, False),
        (0.0, -0.0, 1e-9, True),
        (1, 1.0, 0.0, True),
    ],
)
def test_what_counts_as_equal(
    one: float | str, other: float | str, tolerance: float, same: bool, runs: tuple[Path, Path]
) -> None:
    for run, value in zip(runs, (one, other), strict=True):
        set_metric(run, 3, "policy/kl", value)
    found = compare(*runs, tolerance=tolerance)
    assert (found == []) is same, found


def test_what_one_run_alone_has_is_a_difference(runs: tuple[Path, Path]) -> None:
    def cut(lines: Lines) -> None:
        del lines[-3:]  # steps 19 and 20, and the evaluation
        for line in lines:
            if line["step"] in (4, 8):
                del line["perception/cpl"]

    edit(runs[1] / "metrics.jsonl", cut)
    edit(runs[0] / "metrics.jsonl", lambda lines: lines.insert(4, lines[3] | {"policy/kl": 7.0}))
    found = compare(*runs)
    assert found[:4] == [
        "only A has the training lines of steps 3, 19, 20",
        "only A has the evaluation line of step 20",
        "only A has perception/cpl at steps 4, 8",
        "samples: the same tokens at steps 5, 10, 15, 20",
    ], found
    assert compare(*reversed(runs))[0] == "only B has the training lines of steps 3, 19, 20"


def test_ignored_metrics_are_neither_compared_nor_missed(runs: tuple[Path, Path]) -> None:
    set_metric(runs[1], 7, "policy/loss", 2.0)
    edit(runs[1] / "metrics.jsonl", lambda lines: lines.pop())
    assert compare(*runs, ignore=["policy/*"]) != []
    assert compare(*runs, ignore=["evaluation/*"]) != []
    assert compare(*runs, ignore=["policy/*", "evaluation/*"]) == []
    with pytest.raises(InputError, match="no metric but those to ignore"):
        compare(*runs, ignore=["*"])


def change_token(run: Path, step: int, sample: int, position: int) -> None:
    def change(lines: Lines) -> None:
        lines[sample]["token_ids"][position] += 1
        lines[sample]["tokens"][position] = "other"

    edit(run / "samples" / f"step_{step:06d}.jsonl", change)


def test_flipped_tokens_are_told_from_drifted_numbers(runs: tuple[Path, Path]) -> None:
    set_metric(runs[1], 10, "policy/loss", 2.0)
    assert compare(*runs)[-2:] == [
        "samples: the same tokens at steps 5, 10, 15, 20",
        "so these answers were sampled alike, and the numbers drifted",
    ]
    change_token(runs[1], 10, 7, 3)
    change_token(runs[1], 10, 9, 0)
    change_token(runs[1], 15, 0, 0)
    (sample,) = [line for line in read_lines(runs[0] / "samples/step_000010.jsonl") if line["sample_id"] == 7]
    token, logp = sample["token_ids"][3], sample["engine_logp"][3]
    assert compare(*runs)[-5:] == [
        "samples: tokens differ first at step 10, sample 7, token 3",
        f"  A {token} {sample['tokens'][3]!r}, log-prob {logp}",
        f"  B {token + 1} 'other', log-prob {logp}",
        "  2 of the step's 20 answers differ",
        "so sampling flipped at step 10, before any metric had differed",
    ]
    set_metric(runs[1], 9, "policy/loss", 2.0)
    assert compare(*runs)[-1] == "so the numbers drifted first, from step 9, until sampling flipped at step 10"


def test_an_answer_that_ends_early_and_tokens_alone_are_differences(runs: tuple[Path, Path]) -> None:
    edit(runs[1] / "samples/step_000005.jsonl", lambda lines: lines[2]["token_ids"].pop())
    length = len(read_lines(runs[0] / "samples/step_000005.jsonl")[2]["token_ids"])
    found = compare(*runs)
    assert found[0] == f"samples: tokens differ first at step 5, sample 2, token {length - 1}"
    assert found[2] == "  B no token: the answer has ended"
    assert main([str(run) for run in (*runs, "--tolerance", "1e9")]) == 1, "tokens have no tolerance"
    edit(runs[0] / "samples/step_000005.jsonl", lambda lines: lines.pop())
    assert compare(*runs)[3] == "  2 of the step's 20 answers differ"


def test_a_half_written_last_line_is_left_out(runs: tuple[Path, Path]) -> None:
    with (runs[1] / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "policy/lo')
    assert compare(*runs) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "metrics.jsonl does not exist; fix: give the folder of a run, or its metrics.jsonl"),
        ("", "has no line yet; fix: wait"),
        ('{"step": 1, "a": 1}\nnonsense\n{"step": 2}\n', "metrics.jsonl:2 is not JSON"),
        ("[1]\n[2]\n", 'metrics.jsonl:1 is no line of metrics, {"step": 1, ...}; fix: give a run folder'),
        ('{"step": 1, "a": 1}\n{"a": 1}\n', "metrics.jsonl:2 is no line of metrics"),
        ('{"step": 1, "a": "much"}\n', "metrics.jsonl:1 holds a value that is no number (could not convert"),
        ('{"step": 1, "a": null}\n', "metrics.jsonl:1 holds a value that is no number"),
    ],
)
def test_unusable_input_is_named(
    text: str | None, said: str, runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (runs[1] / "metrics.jsonl").unlink()
    if text is not None:
        (runs[1] / "metrics.jsonl").write_text(text)
    assert main([str(run) for run in runs]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert said in printed.err


def test_a_file_of_something_else_among_the_samples_is_named(runs: tuple[Path, Path]) -> None:
    (runs[1] / "samples/step_000005.jsonl").write_text('{"step": 5}\n')
    with pytest.raises(InputError, match=r"step_000005.jsonl has a line that is no sample; fix: delete it"):
        compare(*runs)


def test_reading_keeps_every_line_of_a_run(example: Path) -> None:
    metrics = read_metrics(example)
    assert [(place.step, place.is_evaluation) for place in sorted(metrics)] == [
        (0, True),
        *((step, False) for step in range(1, NUM_STEPS + 1)),
        (NUM_STEPS, True),
    ]
    assert sum(map(len, metrics.values())) == sum(len(line) - 1 for line in read_lines(example / "metrics.jsonl"))


@pytest.mark.parametrize("command", [["tools/compare_runs.py"], ["-m", "tools.compare_runs"]])
def test_the_command_line(command: list[str], example: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, *command, *arguments]
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)

    shown = run("--help")
    assert shown.returncode == 0
    assert "Exit status: 0 no difference, 1 some, 2 the input cannot be compared." in shown.stdout
    assert run(str(example), str(example), "--tolerance", "1e-4", "--ignore", "policy/*", "optim/*").returncode == 0
    refused = run(str(example), str(example), "--tolerance", "-1")
    assert refused.returncode == 2
    assert "--tolerance must be 0 or a positive number, got -1.0" in refused.stderr
