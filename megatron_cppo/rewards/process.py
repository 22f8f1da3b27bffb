"""One grading worker as the parent sees it: started, given a chunk, listened to, killed.

Owns: the child process and its socket, and which requests it has not answered yet.
Must not know: what a request means, or what becomes of one that fails (`grader`).
A plain subprocess, not `multiprocessing`: that would import the parent's main module, the trainer, in each worker.
"""

import contextlib
import json
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import Connection

from megatron_cppo.rewards.worker import READY, Item, Reply, Setup

START_UP_SECONDS = 120.0
"""Imports from a busy network file system are slow; a worker that takes longer is taken for dead."""
_MESSAGE_SECONDS = 10
_COMMAND = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "from megatron_cppo.rewards.worker import serve; serve(int(sys.argv[1]))"
)


class WorkerProcess:
    """A worker and the request numbers it still owes, oldest first; `pending[0]` is the one being graded."""

    def __init__(self, names: tuple[str, ...], deadline_seconds: float, memory_limit_bytes: int | None) -> None:
        ours, theirs = socket.socketpair()
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):  # a worker that stops amid a message
            ours.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", _MESSAGE_SECONDS, 0))
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _COMMAND, str(theirs.fileno()), json.dumps(sys.path)],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.connection = Connection(ours.detach())
        self.pending: deque[int] = deque()
        self.is_ready = False
        self._deadline_seconds = deadline_seconds
        self._expires = time.monotonic() + START_UP_SECONDS
        with contextlib.suppress(OSError):  # a worker that died at once shows as a closed socket
            self.connection.send(Setup(names, deadline_seconds, memory_limit_bytes, os.getpid()))

    @property
    def is_idle(self) -> bool:
        """Ready and owing nothing."""
        return self.is_ready and not self.pending

    @property
    def seconds_left(self) -> float:
        """Until the next message is due; infinite when none is."""
        return math.inf if self.is_idle else self._expires - time.monotonic()

    def is_overdue(self) -> bool:
        """Past its deadline with nothing to read: a reply that is there already counts, however late it is read."""
        return self.seconds_left <= 0 and not self.connection.poll()

    def assign(self, numbers: Sequence[int], items: Sequence[Item]) -> bool:
        """Send requests to an idle worker; False if it turns out to be dead."""
        assert self.is_idle, f"worker still owes {list(self.pending)}"
        try:
            self.connection.send(items)
        except OSError:
            return False
        self.pending.extend(numbers)
        self._expires = time.monotonic() + self._deadline_seconds
        return True

    def receive(self) -> tuple[int, Reply] | None:
        """The next answered request, None for the start-up message. Raises EOFError or OSError if the worker died."""
        message = self.connection.recv()
        self._expires = time.monotonic() + self._deadline_seconds
        if message == READY:
            self.is_ready = True
            return None
        assert isinstance(message, Reply), f"worker sent {message!r}"
        return self.pending.popleft(), message

    def kill(self) -> int | None:
        """End the worker and whatever it started; the exit code as in `subprocess`, its own if it had ended before.

        None if the kernel does not let go of it within a second (it hangs in a file system); it is reaped later.
        """
        if self._process.returncode is None:  # not reaped, so the number is still its own
            os.killpg(self._process.pid, signal.SIGKILL)
        self.connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1.0)
        return self._process.returncode
