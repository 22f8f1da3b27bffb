"""Ranks that fail or hang amid gloo's collectives, and the trainer's own command: `failing_ranks` does it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_cppo.launch import loopback_interface
from tests.distributed.test_launchers import alive, free_port, wait_until
from tests.distributed.tiny_run import REWARD, Launcher, write_recipe

ROOT = Path(__file__).parents[2]
HANG_SECONDS = 5.0
END_SECONDS = 300


def outcome(how: str, folder: Path, *, num_ranks: int, scheduled: bool, hang_seconds: float = 0.0) -> tuple[int, str]:
    """Run `failing_ranks`; returns the exit status of all launchers, and what the decisive one printed.

    That is the failing rank's, or rank 0's for a hang.
    """
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    environment |= loopback_interface() | {"OMP_NUM_THREADS": "1"}
    task = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "tests.distributed.failing_ranks", how, str(num_ranks), str(folder)]
    launchers = [
        subprocess.Popen(
            [*command, str(hang_seconds)],
            env=environment | (task | {"RANK": str(rank)} if scheduled else {}),
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_ranks if scheduled else 1)
    ]
    said = [launcher.communicate(timeout=END_SECONDS)[1] for launcher in launchers]
    statuses = {launcher.returncode for launcher in launchers}
    assert len(statuses) == 1, said
    for file in folder.glob("pid*"):
        pid = int(file.read_text())
        wait_until(lambda pid=pid: not alive(pid), f"{file.name} is still there")
    return statuses.pop(), said[0 if hang_seconds else -1]


@pytest.mark.parametrize(
    ("how", "num_ranks", "scheduled", "status", "last"),
    [
        ("raise", 3, False, 1, "ValueError: the last rank's own words"),
        ("raise", 2, True, 1, "ValueError: the last rank's own words"),
        ("kill", 2, False, 137, "rank 1 was killed by signal 9 (perhaps out of memory: see dmesg)"),
        ("early", 2, True, 1, "ImportError: before the ranks have met"),
        ("wait", 2, True, 0, ""),
    ],
)
def test_a_failure_amid_a_collective(
    how: str, num_ranks: int, scheduled: bool, status: int, last: str, tmp_path: Path
) -> None:
    found, said = outcome(how, tmp_path, num_ranks=num_ranks, scheduled=scheduled)
    assert found == status
    assert said.strip().split("\n")[-1] == last
    assert "gloo" not in said, "an echo is printed"
    if how in ("raise", "kill"):
        assert "gloo" in (tmp_path / "rank0.log").read_text(), "the echo, in whichever words the kernel put it"


@pytest.mark.parametrize(
    ("how", "num_ranks", "scheduled", "verdict", "where"),
    [
        ("subgroup", 3, False, "rank 2: at another place than the others", "all_reduce"),
        ("subgroup", 2, True, "ranks 0-1: at different places", "all_reduce"),
        ("interpreter", 2, False, "rank 1: not waiting for another rank", "hold_interpreter"),
    ],
)
def test_a_hang_in_a_collective(
    how: str, num_ranks: int, scheduled: bool, verdict: str, where: str, tmp_path: Path
) -> None:
    status, said = outcome(how, tmp_path, num_ranks=num_ranks, scheduled=scheduled, hang_seconds=HANG_SECONDS)
    assert status == 1
    lines = said.strip().split("\n")
    assert lines[-1] == f"no progress for 5s; suspect {verdict}"
    table = [line.split() for line in lines[-1 - num_ranks : -1]]
    assert [row[:4] for row in table] == [[str(rank), "1", "update", table[rank][3]] for rank in range(num_ranks)]
    assert [row[4] for row in table] == ["yes"] * (num_ranks - 1) + ["no" if how == "interpreter" else "yes"]
    assert lines[-2].endswith(where)
    assert said.count(" in run_rank") >= 2, "the stacks of both places"
    assert (tmp_path / "hang.txt").read_text() == said


def test_the_trainer_ends_when_a_rank_is_killed(tmp_path: Path) -> None:
    """The real command: its stacks while it runs, then one rank killed; the graders end, too."""
    write_recipe(tmp_path)
    launcher = Launcher(tmp_path)
    process = launcher.start("run", "--trainer.num_steps", "1000", "--trainer.save_every_steps", "0")
    try:
        status = tmp_path / "run" / "status.json"
        deadline = time.monotonic() + END_SECONDS
        while not (status.exists() and '"step": 2' in status.read_text()):
            assert time.monotonic() < deadline, launcher.said("run")
            assert process.poll() is None, launcher.said("run")
            time.sleep(0.05)
        process.send_signal(signal.SIGUSR1)
        shown = tmp_path / "run" / "logs" / "stacks.txt"
        wait_until(lambda: shown.exists() and "no progress" in shown.read_text(), "no stacks came")
        assert shown.read_text().count("in reinforce") >= 1
        for row in shown.read_text().strip().split("\n")[-2:]:  # both ranks mark their progress
            assert int(row.split()[1]) >= 2
            assert row.split()[2] in ("rollout", "reward", "batch", "score", "update", "sync")
        family = descendants(process.pid)
        ranks = [pid for pid in family if parent(pid) == process.pid]
        assert len(ranks) == 2
        assert len(family) == 4, "two ranks and their graders"
        start = time.monotonic()
        os.kill(ranks[1], signal.SIGKILL)
        assert process.wait(END_SECONDS) == 128 + signal.SIGKILL
        assert time.monotonic() - start < 15
        last = launcher.said("run").strip().split("\n")[-1]
        assert last.endswith("was killed by signal 9 (perhaps out of memory: see dmesg)")
        for pid in family:
            wait_until(lambda pid=pid: not alive(pid), f"process {pid} is left")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


BUSY_THREAD = """
import atexit, os, threading, torch

def work(square=torch.ones(300, 300)):
    while True:
        square @ square

threading.Thread(target=work, daemon=True).start()
atexit.register(lambda: open(f"left{os.environ.get('RANK')}", "w").close())
"""


def test_a_thread_of_torch_that_outlives_its_work_does_not_abort_a_run_that_is_done(tmp_path: Path) -> None:
    """It comes back from an operation when the interpreter is taken down; gloo's threads may, too, once in a while."""
    write_recipe(tmp_path, BUSY_THREAD + REWARD)
    launcher = Launcher(tmp_path)
    assert launcher.finish("run", "--trainer.num_steps", "2") == 0, launcher.said("run")
    assert {"leftNone", "left0", "left1"} <= {path.name for path in tmp_path.glob("left*")}, "exit functions are run"


def parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except FileNotFoundError:
        return 0


def descendants(pid: int) -> list[int]:
    """All processes below `pid`."""
    every = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    parents = {number: parent(number) for number in every}
    found, new = [], [pid]
    while new:
        new = [number for number, of in parents.items() if of in new]
        found += new
    return found
