"""Launchers and ranks without torch: whatever ends one ends all, soon, and the cause is what is printed last."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
END_SECONDS = 100
HANG_SECONDS = 4.0
RANK = """
import os, pathlib, subprocess, sys, time
from megatron_cppo import ranks, watchdog
from megatron_cppo.config import UserError
watch = watchdog.attach(os.environ[ranks.WATCH])
watch.enter(3, "reward")
folder, rank = pathlib.Path({folder!r}), int(os.environ["RANK"])
(folder / f"pid{{rank}}").write_text(str(os.getpid()))
while len(list(folder.glob("pid?"))) < {num_ranks}:
    time.sleep(0.01)
    watch.advance()
{does}
"""
LAUNCHER = """
import os, sys
from megatron_cppo import launch
task = None
if "RANK" in os.environ:
    task = launch.Task(int(os.environ["RANK"]), {num_ranks}, "127.0.0.1", int(os.environ["MASTER_PORT"]))
command = [sys.executable, "-c", {rank!r}]
sys.exit(launch.run_ranks(command, num_ranks={num_ranks}, environment=dict(os.environ), task=task, **{settings!r}))
"""
WAIT = "time.sleep(600)"
# PyDLL keeps the interpreter's lock; a signal that is answered ends one sleep.
HOLD_INTERPRETER = "import ctypes; [ctypes.PyDLL(None).sleep(600) for _ in iter(int, 1)]"
ON_RANK_1 = "if rank == 1: "


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + END_SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


@dataclass
class Started:
    """A run of two ranks that was started; `launchers` has one process, or one for each rank."""

    folder: Path
    launchers: list[subprocess.Popen[str]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def start(self, does: str, *, scheduled: bool, hang_seconds: float = 0.0) -> None:
        rank = RANK.format(folder=str(self.folder), num_ranks=2, does=does)
        settings = {"hang_minutes": hang_seconds / 60}
        port = free_port()
        for launcher in range(2 if scheduled else 1):
            # pathlib.Path does not survive repr.
            text = LAUNCHER.format(num_ranks=2, rank=rank, settings=settings).replace(
                "**{", f"log_dir=__import__('pathlib').Path({str(self.folder / 'logs')!r}), **{{"
            )
            environment = {name: value for name, value in os.environ.items() if name != "RANK"}
            environment |= {"RANK": str(launcher), "MASTER_PORT": str(port)} if scheduled else {}
            # A shell's background jobs ignore SIGINT, and their children inherit that.
            self.launchers.append(
                subprocess.Popen(
                    [sys.executable, "-c", "import signal; signal.signal(2, signal.default_int_handler)\n" + text],
                    env=environment,
                    cwd=ROOT,
                    stderr=subprocess.PIPE,
                    text=True,
                    start_new_session=True,
                )
            )

    def pids(self) -> list[int]:
        """The ranks' processes, once all are up."""
        files = [self.folder / f"pid{rank}" for rank in range(2)]
        wait_until(lambda: all(file.exists() and file.read_text() for file in files), "the ranks did not start")
        return [int(file.read_text()) for file in files]

    def statuses(self) -> list[int]:
        """Wait for the end; what was printed is in `said` then, and nothing may be left."""
        self.said = [launcher.communicate(timeout=END_SECONDS)[1] for launcher in self.launchers]
        for file in self.folder.glob("pid*"):
            pid = int(file.read_text())
            wait_until(lambda pid=pid: not alive(pid), f"{file.name} outlived its launcher")
        return [launcher.returncode for launcher in self.launchers]

    def log(self, name: str) -> str:
        return (self.folder / "logs" / name).read_text()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Started]:
    started = Started(tmp_path)
    yield started
    for launcher in started.launchers:
        launcher.kill()
        launcher.wait()


BOTH = pytest.mark.parametrize("scheduled", [False, True], ids=["local", "scheduled"])


@pytest.mark.parametrize(
    ("does", "status", "last", "scheduled"),
    [
        ("raise ValueError('own words')", 1, "ValueError: own words", False),
        ("raise ValueError('own words')", 1, "ValueError: own words", True),
        ("watch.say(UserError('wrong; got 1; fix: 2'), kind='user'); sys.exit(2)", 2, "wrong; got 1; fix: 2", False),
        ("os._exit(7)", 7, "rank 1 ended with exit status 7", False),
        ("os.kill(os.getpid(), 9)", 137, "rank 1 was killed by signal 9 (perhaps out of memory: see dmesg)", True),
        ("import faulthandler; faulthandler._sigsegv()", 139, "rank 1 was killed by signal 11", False),
    ],
    ids=["raises", "raises, scheduled", "user error", "exits", "killed, scheduled", "crashes"],
)
def test_the_failing_rank_has_the_last_word(does: str, status: int, last: str, scheduled: bool, run: Started) -> None:
    run.start(f"{ON_RANK_1}{does}\n{WAIT}", scheduled=scheduled)
    run.pids()
    start = time.monotonic()
    assert run.statuses() == [status] * len(run.launchers), run.said
    assert time.monotonic() - start < 10
    assert run.said[-1].strip().split("\n")[-1] == last
    assert run.log("rank1.log").strip().split("\n")[-1] == last
    assert ("Traceback" in run.said[-1]) == ("raise" in does)
    assert ("Segmentation fault" in run.said[-1]) == ("_sigsegv" in does)
    assert "ended: rank 1" in run.log("rank0.log")
    if scheduled:
        assert run.said[0].count("\n") == 1, "a survivor says one line"
        assert run.said[0].startswith("rank 0 was ended: rank 1 ")


@BOTH
def test_broken_communication_does_not_hide_its_cause(scheduled: bool, run: Started) -> None:
    """The rank that fails first, and loudest, only noticed that the other was gone."""
    echo = "if rank == 0: raise RuntimeError('gloo/transport/tcp/pair.cc: Connection closed by peer')\n"
    run.start(f"{echo}time.sleep(0.3)\nraise ValueError('the cause')", scheduled=scheduled)
    assert run.statuses() == [1] * len(run.launchers)
    assert run.said[-1].strip().endswith("ValueError: the cause")
    assert "closed by peer" not in "".join(run.said)
    assert "closed by peer" in run.log("rank0.log")


def test_what_a_dead_rank_started_ends_too(run: Started) -> None:
    child = "child = subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
    child += "(folder / f'pid{rank}child').write_text(str(child.pid))\n"
    run.start(f"{child}time.sleep(0.5)\n{ON_RANK_1}os.kill(os.getpid(), 9)\n{WAIT}", scheduled=False)
    assert run.statuses() == [137]
    assert len(list(run.folder.glob("pid?child"))) == 2


@pytest.mark.parametrize(
    ("number", "scheduled"), [(signal.SIGTERM, True), (signal.SIGINT, False)], ids=["scheduled, SIGTERM", "Ctrl-C"]
)
def test_being_told_to_end_is_quiet(number: signal.Signals, scheduled: bool, run: Started) -> None:
    run.start(WAIT, scheduled=scheduled)
    run.pids()
    os.killpg(run.launchers[-1].pid, number)  # as a terminal and a scheduler do: its ranks get it, too
    assert run.statuses() == [128 + number] * len(run.launchers)
    assert all(said.count("\n") == 1 and f"signal {number:d}" in said for said in run.said), run.said


@BOTH
def test_ranks_die_with_a_killed_launcher(scheduled: bool, run: Started) -> None:
    """And where each rank has a launcher, the others notice."""
    run.start(WAIT, scheduled=scheduled)
    run.pids()
    run.launchers[-1].kill()
    assert run.statuses() == ([1, -9] if scheduled else [-9])
    assert not scheduled or run.said[0] == (
        "rank 0 was ended: the launcher of rank 1 is gone (killed, or its machine is down)\n"
    )


def test_ranks_end_when_rank_0s_launcher_is_killed(run: Started) -> None:
    run.start(WAIT, scheduled=True)
    run.pids()
    run.launchers[0].kill()
    assert run.statuses() == [-9, 1]
    assert run.said[1] == "rank 1 was ended: the launcher of rank 0 is gone (killed, or its machine is down)\n"


@BOTH
@pytest.mark.parametrize("to_rank", [False, True], ids=["launcher", "rank"])
def test_sigusr1_shows_all_stacks_and_the_run_goes_on(to_rank: bool, scheduled: bool, run: Started) -> None:
    run.start("def busy():\n  while not (folder / 'enough').exists(): time.sleep(0.01)\nbusy()", scheduled=scheduled)
    rank = run.pids()[1]
    os.kill(rank if to_rank else run.launchers[-1].pid, signal.SIGUSR1)
    shown = run.folder / "logs" / "stacks.txt"
    wait_until(lambda: shown.exists() and "no progress" in shown.read_text(), "no stacks came")
    (run.folder / "enough").touch()
    assert run.statuses() == [0] * len(run.launchers)
    assert "in busy" in run.said[0]
    assert [line.split()[:3] for line in run.said[0].strip().split("\n")[-2:]] == [
        ["0", "3", "reward"],
        ["1", "3", "reward"],
    ]


@BOTH
def test_all_launchers_leave_together_when_one_is_told(scheduled: bool, run: Started) -> None:
    """A scheduler takes the first status that is not 0 as the end of all: none may come before the last rank's."""
    told = "while not (watch.is_told_to_leave() or (folder / 'told').exists()): time.sleep(0.01)\n"
    slow = "if rank == 0: time.sleep(2); (folder / 'slow').touch()\n"
    run.start(f"{told}(folder / 'told').touch()\n{slow}sys.exit(watchdog.LEFT)", scheduled=scheduled)
    rank = run.pids()[1]
    os.kill(rank, signal.SIGUSR2)  # nothing to a rank, which ignores it
    time.sleep(0.3)
    assert not (run.folder / "told").exists()
    for _ in range(2):
        run.launchers[-1].send_signal(signal.SIGUSR2)
    run.launchers[-1].wait(END_SECONDS)
    assert (run.folder / "slow").exists(), "it did not wait for the other one"
    assert run.statuses() == [75] * len(run.launchers)
    assert run.said == [""] * len(run.launchers)


@pytest.mark.parametrize(
    ("does", "scheduled"),
    [(HOLD_INTERPRETER, True), ("os.read(os.pipe()[0], 1)", False)],
    ids=["holds the interpreter, scheduled", "reads for ever"],
)
def test_a_hanging_rank_is_named_while_the_others_go_on(does: str, scheduled: bool, run: Started) -> None:
    others = "if rank == 0:\n  for _ in range(6000): time.sleep(0.1); watch.advance()\nstuck()"
    run.start(f"def stuck(): {does}\n{others}", scheduled=scheduled, hang_seconds=HANG_SECONDS)
    run.pids()
    start = time.monotonic()
    assert run.statuses() == [1] * len(run.launchers)
    assert time.monotonic() - start < HANG_SECONDS + 10
    last = run.said[0].strip().split("\n")[-1]
    assert last == "no progress for 4s; suspect rank 1: not waiting for another rank"
    assert "in stuck" in run.said[0]
    assert "--- rank 0\n" in run.said[0]
    assert run.log("hang.txt") == run.said[0]


def test_a_stopped_rank_is_named_and_ended(run: Started) -> None:
    run.start(f"{ON_RANK_1}os.kill(os.getpid(), 19)\n{WAIT}", scheduled=False, hang_seconds=HANG_SECONDS)
    wait_until((run.folder / "logs" / "hang.txt").exists, "no hang was seen")
    start = time.monotonic()
    assert run.statuses() == [1]
    assert time.monotonic() - start < 8, "it was only killed after the grace period"
    assert "--- rank 1\n  no stack: does not answer: stopped, or stuck in the kernel" in run.said[0]


def test_ctrl_c_is_not_for_a_rank_and_without_the_hang_watch_it_may_stand_still(run: Started) -> None:
    run.start("time.sleep(1)", scheduled=False)
    os.kill(run.pids()[1], signal.SIGINT)
    assert run.statuses() == [0]
    assert run.said == [""]


def test_a_launcher_of_another_run_is_refused(run: Started) -> None:
    """Two runs that were given one port must not mix."""
    run.start(WAIT, scheduled=True)
    run.pids()
    port = next(text for text in _environment(run.launchers[1].pid) if text.startswith("MASTER_PORT="))
    text = LAUNCHER.format(num_ranks=3, rank="", settings={})
    environment = dict(os.environ) | {"RANK": "2", "MASTER_PORT": port.removeprefix("MASTER_PORT=")}
    other = subprocess.run([sys.executable, "-c", text], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert other.returncode == 2
    assert "rank 0 is of a run of 2 ranks, this one says rank 2 of 3" in other.stderr
    assert all(launcher.poll() is None for launcher in run.launchers)
    run.launchers[0].terminate()
    assert run.statuses() == [143, 143]


def _environment(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/environ").read_text().split("\0")
