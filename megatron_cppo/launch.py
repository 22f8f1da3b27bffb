"""Starts the ranks of a run on this machine, one process each, and ends them together.

On a cluster the scheduler starts the ranks (one task per GPU) and this module is not used.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

GRACE_SECONDS = 10.0


def run_ranks(command: Sequence[str], *, num_ranks: int, environment: dict[str, str]) -> int:
    """Run `command` as ranks 0 ... num_ranks - 1; returns 0, or the exit status of the first rank that failed.

    When one rank fails, or this process is told to end, the others are told so too, and killed after a grace period.
    Rendezvous is on loopback. To be called from the main thread.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = environment | {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    previous = signal.signal(signal.SIGTERM, _exit)  # by default this process would end and leave its ranks behind
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(num_ranks):
            ranks.append(subprocess.Popen(command, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}))
        return _wait(ranks)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        _end(ranks)
        signal.signal(signal.SIGTERM, previous)


def rank_command(arguments: Sequence[str]) -> list[str]:
    """The command of one rank: this interpreter, the trainer, the user's arguments."""
    return [sys.executable, "-m", "megatron_cppo.train", *arguments]


def loopback_interface() -> dict[str, str]:
    """What gloo must be told, or it resolves the host's name, which need not lead to this machine."""
    return {"GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}


def _exit(number: int, _: FrameType | None) -> None:
    sys.exit(128 + number)


def die_with_parent() -> None:
    """On Linux, have the kernel end this rank when the launcher dies: it may be killed without a chance to tell."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    while True:
        states = [rank.poll() for rank in ranks]
        failed = [state for state in states if state]
        if failed:
            return failed[0] if failed[0] > 0 else 128 - failed[0]
        if all(state == 0 for state in states):
            return 0
        time.sleep(0.1)


def _end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    running = [rank for rank in ranks if rank.poll() is None]
    for rank in running:
        rank.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for rank in running:
        try:
            rank.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.kill(rank.pid, signal.SIGKILL)
            rank.wait()
