"""Grading in real worker processes: whatever a reward function does, the run goes on and the others are graded."""

import ctypes
import importlib
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_cppo.rewards import RewardError
from megatron_cppo.rewards.grader import Grade, GradeItem, Grader, GraderError

THINK = "<think>so</think> "


def behave(response_text: str, ground_truth: str, data_source: str) -> float:
    """A hostile reward function: the response says what it does; otherwise its length is the reward."""
    match response_text:
        case "hang":
            while True:
                pass
        case "hang in C":
            return float(9**9**9)
        case "sleep":
            time.sleep(3600)
        case "exit":
            os._exit(1)
        case "sys.exit":
            sys.exit("enough")
        case "segfault":
            ctypes.string_at(0)
        case "allocate":
            hoard = []
            while True:
                hoard.append(bytearray(2**26))
        case "raise":
            raise KeyError("no such answer")
        case "recurse":
            return behave(response_text, ground_truth, data_source)
        case "nan":
            return float("nan")
        case "none":
            return None
        case "alarm":
            signal.alarm(0)
    return float(len(response_text))


def pid_of_worker(response_text: str, ground_truth: str, data_source: str) -> float:
    return float(os.getpid())


def heavy_modules(response_text: str, ground_truth: str, data_source: str) -> float:
    """How many of the trainer's libraries a worker has loaded."""
    return float(len({"torch", "transformers", "megatron"} & set(sys.modules)))


def item(response_text: str, ground_truth: str = "", data_source: str = "test") -> GradeItem:
    return GradeItem(response_text, ground_truth, data_source)


def boxed(answer: str, ground_truth: str) -> GradeItem:
    return item(f"{THINK}\\boxed{{{answer}}}", ground_truth)


@pytest.fixture(scope="module")
def hostile():
    with Grader([f"{__name__}:behave=1.0"], workers=2, deadline_seconds=2.0, memory_limit_gib=0.25) as grader:
        yield grader


@pytest.fixture(scope="module")
def standard():
    with Grader(workers=1, deadline_seconds=5.0) as grader:
        yield grader


@pytest.mark.parametrize(
    ("behaviour", "status", "log"),
    [
        ("hang", "timeout", "took longer than 2 s"),
        ("hang in C", "timeout", None),
        ("sleep", "timeout", None),
        ("exit", "crashed", "ended with exit code 1;"),
        ("segfault", "crashed", f"ended with exit code -{signal.SIGSEGV.value};"),
        ("allocate", "crashed", "ran out of memory"),
        ("raise", "error", r"KeyError: 'no such answer' \(test_grader.py:\d+\)"),
        ("sys.exit", "error", "SystemExit: enough"),
        ("recurse", "error", "RecursionError"),
        ("nan", "error", "must be finite, got nan"),
        ("none", "error", "TypeError"),
    ],
)
def test_a_failing_reward_costs_its_sample_only(hostile, caplog, behaviour, status, log):
    before = hostile.counters
    others = [item("x" * length) for length in range(20)]
    batch = [*others[:7], item(behaviour), *others[7:]]
    with caplog.at_level(logging.WARNING):
        start = time.monotonic()
        grades = hostile.grade(batch)
        seconds = time.monotonic() - start
    name = f"{__name__}:behave"
    assert grades[7] == Grade(0.0, ((name, 0.0),), status)
    for length, grade in enumerate([*grades[:7], *grades[8:]]):
        assert grade == Grade(float(length), ((name, float(length)),), "ok")
    assert hostile.counters == {**before, "ok": before["ok"] + 20, status: before[status] + 1}
    assert seconds < 20
    if log is not None:
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert re.search(log, caplog.records[0].getMessage())


def test_each_event_is_logged_once_and_counted_each_time(hostile, caplog):
    hostile.grade([item("raise")])
    before = hostile.counters["error"]
    with caplog.at_level(logging.WARNING):
        hostile.grade([item("raise"), item("raise", data_source="another")])
    assert caplog.records == []
    assert hostile.counters["error"] == before + 2


def test_many_failures_among_many_items_keep_their_places(hostile):
    texts = [("exit", "raise", "sys.exit")[n % 3] if n % 20 == 5 else f"{n} " * n for n in range(120)]
    grades = hostile.grade([item(text, data_source=str(n)) for n, text in enumerate(texts)])
    for text, grade in zip(texts, grades, strict=True):
        expected = {"exit": "crashed", "raise": "error", "sys.exit": "error"}.get(text, "ok")
        assert grade.status == expected
        assert grade.total == (float(len(text)) if expected == "ok" else 0.0)


def test_workers_persist_and_are_replaced_after_a_kill():
    with Grader([f"{__name__}:pid_of_worker=1", f"{__name__}:behave=0"], workers=1, deadline_seconds=1.0) as grader:
        first, second = grader.grade([item("a"), item("b")])
        assert first.total == second.total != os.getpid()
        assert grader.grade([item("exit")])[0].status == "crashed"
        third, fourth = grader.grade([item("c"), item("d")])
        assert third.total == fourth.total != first.total


def test_workers_load_none_of_the_trainers_libraries():
    import torch  # noqa: F401  # as the trainer has done when it starts a grader

    with Grader([f"{__name__}:heavy_modules=1", "accuracy=0"], workers=1) as grader:
        assert grader.grade([item("a", "b")])[0] == Grade(
            0.0, ((f"{__name__}:heavy_modules", 0.0), ("accuracy", 0.0)), "ok"
        )


def test_accuracy_and_format_are_weighted(standard):
    grades = standard.grade(
        [
            boxed(r"\frac{2}{4}", "0.5"),
            boxed("0.6", "0.5"),
            item(r"\boxed{17°}", "17"),
            item("no box", "17"),
            item("no box: None", "None"),
            boxed(r"\frac{", "0.5"),
            boxed("5", r"} \frac{"),
            boxed("A. 30°", "A"),
        ]
    )
    assert [grade.total for grade in grades] == [1.0, 0.1, 0.9, 0.0, 0.0, 0.1, 0.1, 1.0]
    assert {grade.status for grade in grades} == {"ok"}
    assert grades[2].parts == (("accuracy", 1.0), ("format", 0.0))


def test_capped_answers_and_missing_gold_are_flagged_at_once(standard):
    before = standard.counters
    start = time.monotonic()
    grades = standard.grade([boxed("9**9**9", "7.5"), boxed("99999999!", "1/2"), boxed("5", ""), boxed("5", "5")])
    assert time.monotonic() - start < 3.0
    assert [grade.status for grade in grades] == ["capped", "capped", "none_gold", "ok"]
    assert [grade.total for grade in grades] == [0.1, 0.1, 0.1, 1.0]
    assert standard.counters == {
        **before,
        "capped": before["capped"] + 2,
        "none_gold": before["none_gold"] + 1,
        "ok": before["ok"] + 1,
    }


def test_a_sympy_expansion_that_never_ends_is_killed():
    expansion = boxed("(x+1)^{9999}", "(1+x)^{9998}")
    with Grader(workers=1, deadline_seconds=1.0) as grader:
        grades = grader.grade([boxed("1", "1"), expansion, boxed("2", "2")])
    assert [grade.status for grade in grades] == ["ok", "timeout", "ok"]
    assert [grade.total for grade in grades] == [1.0, 0.0, 1.0]


def test_the_cache_changes_nothing_but_time(standard):
    batch = [boxed(f"\\frac{{{n % 7}}}{{14}}", f"{n % 5}/14") for n in range(60)]
    fresh = standard.grade(batch)
    assert standard.grade(list(reversed(batch))) == list(reversed(fresh))
    with Grader(workers=2, cache_size=3) as small:
        assert small.grade(batch) == fresh
        assert small.grade(batch[10:20]) == fresh[10:20]
        assert len(small._cache) == 3


def test_the_cache_is_keyed_on_everything_and_skips_the_worker():
    with Grader([f"{__name__}:behave=1", f"{__name__}:pid_of_worker=0"], workers=1, deadline_seconds=1.0) as grader:
        known = grader.grade([item("abc")])
        assert grader.grade([item("exit"), item("exit", "other gold")])[1].status == "crashed"
        assert grader.grade([item("abc")]) == known, "a cached grade holds the first worker's process id"
        for changed in (item("abcd"), item("abc", "gold"), item("abc", "", "another source")):
            assert grader.grade([changed])[0].parts[1] != known[0].parts[1]
        assert grader.counters["crashed"] == 2


def test_no_items_no_grades(standard):
    assert standard.grade([]) == []


def test_long_and_odd_texts_travel(hostile):
    texts = ["x" * 3_000_000, "\ud800 lone surrogate", "\0", "日本語" * 1000]
    assert [grade.total for grade in hostile.grade([item(text) for text in texts])] == [float(len(t)) for t in texts]


def test_wrong_rewards_fail_before_a_worker_starts():
    with pytest.raises(RewardError, match="did you mean 'accuracy'"):
        Grader(["acuracy=1"])
    with pytest.raises(RewardError, match="name=weight"):
        Grader(["accuracy"])


def test_workers_that_cannot_start_are_reported(tmp_path, monkeypatch):
    """The module imports here, not there: it is the environment of the workers that is broken."""
    (tmp_path / "only_once.py").write_text("def reward(response_text, ground_truth, data_source):\n    return 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.import_module("only_once")
    (tmp_path / "only_once.py").unlink()
    grader = Grader(["only_once:reward=1"], workers=1)
    with pytest.raises(GraderError, match="do not start: 3 in a row ended with exit code 1"):
        grader.grade([item("a")])
    with pytest.raises(GraderError, match="closed"):
        grader.grade([item("a")])


def test_an_interrupted_call_leaves_no_late_replies(hostile):
    """Ctrl-C while a sample is graded: the next call must not take the old replies for its own."""
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            hostile.grade([item("hang", str(n)) for n in range(8)])
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    assert [grade.total for grade in hostile.grade([item("y" * n) for n in range(30, 40)])] == list(range(30, 40))


def test_close_ends_the_workers_and_may_be_repeated():
    grader = Grader([f"{__name__}:pid_of_worker=1"], workers=1)
    pid = int(grader.grade([item("a")])[0].total)
    assert is_alive(pid)
    grader.close()
    grader.close()
    assert not is_alive(pid)
    with pytest.raises(GraderError, match="closed"):
        grader.grade([item("a")])


@pytest.mark.parametrize("response_text", ["idle", "hang in C"])
def test_workers_die_with_their_parent(response_text):
    """The parent is killed outright, with its workers idle or amid a call that never returns to Python."""
    program = (
        "import threading, time\n"
        f"from {__name__} import *\n"
        f"grader = Grader(['{__name__}:behave=1'], workers=2, deadline_seconds=0.5)\n"
        "grader.grade([item('a' * n) for n in range(9)])\n"
        "print(*[worker._process.pid for worker in grader._workers], flush=True)\n"
        f"grader.grade([item({response_text!r}, str(n)) for n in range(2)])\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2
        time.sleep(0.2)
        assert all(is_alive(pid) for pid in pids)
        parent.kill()
    deadline = time.monotonic() + 5.0
    while any(is_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_alive(pid) for pid in pids)


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
