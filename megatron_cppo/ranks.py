"""The processes of this machine's ranks: started, looked at, ended with all that they left behind.

Owns what the kernel is asked for (to end a rank with its parent, to be given its orphans). Must not know why a run ends
(`launch`).
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from megatron_cppo import diagnosis
from megatron_cppo.diagnosis import Failure, Standing
from megatron_cppo.watchdog import LEFT, State, Watched

WATCH = "MEGATRON_CPPO_WATCH"
"""Environment of a rank: its files, for `watchdog.attach`."""

_LIBC = ctypes.CDLL(None)


def die_with_parent() -> None:
    """On Linux, have the kernel end this process when its parent does: that one may be killed without a last word."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def leave(status: int) -> NoReturn:
    """End this process, whose work is done and whose exit functions run, without taking the interpreter down.

    Threads of torch outlive its groups. One of gloo that frees the last collective's tensors, or one that comes back
    from an operation, asks for the interpreter; is that just being taken down, the process is aborted
    ("terminate called without an active exception") after all is done (https://github.com/pytorch/pytorch/pull/179291).
    """
    atexit._run_exitfuncs()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # whoever read it is gone, or it is closed
            stream.flush()
    os._exit(status)


def _before_rank() -> None:
    """In a new rank: Ctrl-C is the launcher's to hear, and SIGUSR1 means nothing before it attaches.

    SIGUSR2 never does, nor to what the rank starts: a scheduler sends it to every process, and launchers pass it on
    (`Watched.tell_to_leave`).
    """
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


@contextlib.contextmanager
def adopted_orphans() -> Iterator[None]:
    """On Linux, become the parent of what ranks leave behind (grading workers, checkpoint writers)."""
    PR_SET_CHILD_SUBREAPER = 36
    if sys.platform == "linux":
        _LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1)
    yield
    if sys.platform == "linux":
        _LIBC.prctl(PR_SET_CHILD_SUBREAPER, 0)


def children() -> set[int]:
    """The processes whose parent is this one; empty where there is no /proc."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.add(int(stat.parent.name))
    return found


@dataclass(slots=True)
class RankProcess:
    """One rank that this launcher has started."""

    rank: int
    process: subprocess.Popen[bytes]
    watched: Watched
    state: State
    changed: float
    over: bool = False
    left: bool = False
    failure: Failure | None = None

    def look(self) -> bool:
        """Note its progress; True once, when it has ended or failed."""
        state = self.watched.state()
        if state != self.state:
            self.state, self.changed = state, time.monotonic()
        if self.over:
            return False
        returncode = self.process.poll()
        words = self.watched.words()
        if returncode is None and words is None:
            return False
        self.over = True
        if words is not None:
            status = 2 if words["kind"] == "user" else 1
            text, summary = str(words["text"]), f"rank {self.rank} failed: {words['summary']}"
            self.failure = Failure(self.rank, str(words["kind"]), float(words["time"]), summary, text, status)
        elif returncode == LEFT:
            self.left = True
        elif returncode:
            kind, text, status = diagnosis.exit_text(self.rank, returncode)
            crash = self.watched.crash()
            self.failure = Failure(self.rank, kind, time.time(), text, f"{crash}{text}\n", status)
        return True

    def standing(self, stack: str = "") -> Standing:
        """Where it is; with `stack`, what `gather_stacks` brought."""
        state, note = self.state, ""
        if self.over:
            note = "ended" if self.failure is None else self.failure.summary
        elif not state.main_thread:
            note = "not started yet"
        elif not stack:
            note = "does not answer: stopped, or stuck in the kernel"
        idle = time.monotonic() - self.changed
        done = self.over and self.failure is None
        return Standing(
            *(self.rank, state.step, state.phase, state.entered, idle, state.main_thread, stack),
            note=note,
            done=done,
            left=self.left,
        )


def start_rank(
    rank: int, command: Sequence[str], environment: dict[str, str], *, inherit: Sequence[int]
) -> RankProcess:
    """Start one rank, with the open files `inherit`."""
    watched = Watched()
    process = subprocess.Popen(
        command,
        env=environment | {WATCH: ",".join(map(str, watched.descriptors))},
        pass_fds=[*watched.descriptors, *inherit],
        preexec_fn=_before_rank,
    )
    return RankProcess(rank, process, watched, watched.state(), time.monotonic())


def end_ranks(ranks: Sequence[RankProcess], strangers: set[int], *, everything: bool, grace_seconds: float) -> None:
    """End the ranks, and with `everything` also what they left: children of this process that are no `strangers`."""
    running = [rank.process for rank in ranks if rank.process.poll() is None]
    for process in running:
        process.terminate()
        process.send_signal(signal.SIGCONT)  # one that is stopped would not hear of it
    deadline = time.monotonic() + grace_seconds
    for process in running:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace_seconds)  # stuck in the kernel: it ends when that lets go
    deadline = time.monotonic() + grace_seconds
    while everything and (left := children() - strangers) and time.monotonic() < deadline:
        for number in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        time.sleep(0.01)
        for number in left:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(number, os.WNOHANG)
