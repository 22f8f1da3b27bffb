"""The grading worker: a process of its own that serves reward requests over one socket.

Owns: running reward functions, whatever they do, and surviving what they raise.
Must not know: deadlines' consequences, caching, other workers (`grader`). Imports neither torch nor transformers.
Protocol: the grader sends a `Setup`; the worker answers `READY`; then for each list of (response_text, ground_truth,
data_source) it sends one `Reply` per item, in order. A closed socket ends it.
"""

import math
import os
import resource
import signal
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Literal

from megatron_cppo.rewards import RewardFunction, resolve
from megatron_cppo.rewards.accuracy import accuracy_reward, refusal, warm_up
from megatron_cppo.rewards.boxed import extract_boxed

READY = "ready"
OUT_OF_MEMORY_EXIT_CODE = 70
_IDLE_SECONDS = 1.0

Item = tuple[str, str, str]
"""(response_text, ground_truth, data_source)"""


@dataclass(frozen=True, slots=True)
class Setup:
    """What a worker is told at start-up; `memory_limit_bytes` is what grading may add to its address space."""

    names: tuple[str, ...]
    deadline_seconds: float
    memory_limit_bytes: int | None
    parent_pid: int


@dataclass(frozen=True, slots=True)
class Reply:
    """Unweighted values, one per reward name; on "error" all zero, and `message` says which function raised what."""

    values: tuple[float, ...]
    status: Literal["ok", "capped", "none_gold", "error"]
    message: str = ""


def serve(socket_fd: int) -> None:
    """Serve requests on the inherited socket until it closes or the parent is gone."""
    os.set_inheritable(socket_fd, False)
    os.dup(socket_fd)  # closed by the kernel alone: the parent sees the end only once the exit code stands
    connection = Connection(socket_fd)
    setup: Setup = connection.recv()
    functions = {name: resolve(name) for name in setup.names}
    if accuracy_reward in functions.values():
        warm_up()
    _limit_memory(setup.memory_limit_bytes)
    connection.send(READY)
    while os.getppid() == setup.parent_pid:
        try:
            if connection.poll(_IDLE_SECONDS):
                _serve_chunk(connection, functions, connection.recv(), setup.deadline_seconds)
        except (EOFError, OSError):
            return


def grade_item(functions: dict[str, RewardFunction], item: Item) -> Reply:
    """All rewards of one item; the worker ends here if memory runs out."""
    values = []
    for name, function in functions.items():
        with _Guard() as guard:
            value = float(function(*item))
            if not math.isfinite(value):
                raise ValueError(f"the reward must be finite, got {value}")
            values.append(value)
        if guard.raised is not None:
            return Reply((0.0,) * len(functions), "error", f"reward {name!r} raised {guard.describe()}")
    reason = None
    if accuracy_reward in functions.values():
        reason = refusal(extract_boxed(item[0]), item[1])
    return Reply(tuple(values), reason or "ok")


class _Guard:
    """Holds back whatever a reward function raises, be it `sys.exit`: it is foreign code, and the next item is waiting.

    Running out of memory ends the process instead: what is left of it is not to be trusted.
    """

    __slots__ = ("raised",)

    def __enter__(self) -> "_Guard":
        self.raised: BaseException | None = None
        return self

    def __exit__(self, kind: type | None, raised: BaseException | None, trace: TracebackType | None) -> bool:
        if isinstance(raised, MemoryError):
            os._exit(OUT_OF_MEMORY_EXIT_CODE)
        self.raised = raised
        return True

    def describe(self) -> str:
        assert self.raised is not None, "nothing was raised"
        summary = traceback.format_exception_only(self.raised)[-1].strip()
        frames = traceback.extract_tb(self.raised.__traceback__)
        return f"{summary} ({Path(frames[-1].filename).name}:{frames[-1].lineno})"


def _serve_chunk(
    connection: Connection, functions: dict[str, RewardFunction], chunk: Sequence[Item], deadline_seconds: float
) -> None:
    for item in chunk:
        # The parent kills at the deadline. Should the parent be gone, the kernel does, even amid a call into C.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, 2 * deadline_seconds + 1)
        reply = grade_item(functions, item)
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send(reply)


def _limit_memory(limit_bytes: int | None) -> None:
    if limit_bytes is None:
        return
    held_pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit_bytes += held_pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
