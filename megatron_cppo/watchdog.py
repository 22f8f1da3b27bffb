"""What a rank lets its launcher see: how far it is, where it stands, and its last words. And whether it is to leave.

Owns the three small files that the two share. The launcher makes them without a name, a rank inherits them open, so
nothing is left behind. They need nothing of the rank while it works: marking progress is a store to shared memory, and
the stacks are written by a signal handler in C, so they come also from a rank that holds the interpreter's lock or is
blocked in a collective. A rank is told to leave by a word in that memory, which it may not even have opened yet.
Must not know what becomes of a rank that fails (`launch`) nor who is to blame (`diagnosis`).
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import mmap
import os
import signal
import struct
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass
from types import TracebackType

# Phases entered, marks, step, the main thread's number (0: not attached yet), the phase's name.
_STATE = struct.Struct("@qqqQ48s")
# Behind it, from the launcher to the rank: whether to leave.
_LEAVE = struct.Struct("@q")
_SIZE = _STATE.size + _LEAVE.size
LEFT = 75
"""Exit status of a rank that left after a step, as it was told (EX_TEMPFAIL: the same command goes on)."""
_FATAL = "Fatal Python error"
STACKS_SECONDS = 5.0
"""A rank that has not written its stacks by then, does not: it is stopped, or stuck in the kernel."""


@dataclass(frozen=True, slots=True)
class State:
    """How far a rank is. Example: State(entered=12, marks=340, step=3, main_thread=140243, phase="update")"""

    entered: int
    marks: int
    step: int
    main_thread: int
    phase: str


class Watch:
    """A rank's own side; without a launcher it marks what nobody reads."""

    def __init__(self, memory: mmap.mmap | None = None, words: int | None = None) -> None:
        self._memory = mmap.mmap(-1, _SIZE) if memory is None else memory
        self._words = words
        self._entered = self._marks = self._step = self._main_thread = 0
        self._phase = b"start"

    def enter(self, step: int, phase: str) -> None:
        """Say that `phase` of `step` begins; all ranks call this equally often."""
        self._entered += 1
        self._step, self._phase = step, phase.encode()
        self._store()

    def advance(self) -> None:
        """Say that work is being done; cheap enough for every token."""
        self._marks += 1
        self._store()

    def is_told_to_leave(self) -> bool:
        """Whether the launcher wants this rank to save after its step, and to end with the status LEFT."""
        return bool(_LEAVE.unpack_from(self._memory, _STATE.size)[0])

    def say(self, error: BaseException, *, kind: str) -> None:
        """Leave the last words: `kind` "user" for a mistake of the user, "error", or "communication" for an echo."""
        if self._words is None:
            return
        lines = [str(error)] if kind == "user" else traceback.format_exception(error)
        summary = (str(error) if kind == "user" else traceback.format_exception_only(error)[-1]).strip().split("\n")[0]
        words = {"kind": kind, "time": time.time(), "summary": summary, "text": "".join(lines).rstrip() + "\n"}
        os.write(self._words, json.dumps(words).encode())

    def answer_signals(self, stacks: int) -> None:
        """From now on SIGUSR1 and a crash in C write the stacks of all threads to the file `stacks`."""
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
        faulthandler.enable(file=stacks, all_threads=True)
        self._main_thread = threading.main_thread().ident or 0
        self._store()

    def end_with_words(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """What `sys.excepthook` is set to: the launcher prints the traceback, when it has ended the other ranks.

        The process ends at once: its threads and clean-ups may be stuck with ranks that are gone.
        """
        self.say(error, kind="communication" if is_echo(error) else "error")
        logging.shutdown()
        os._exit(1)

    def _store(self) -> None:
        state = (self._entered, self._marks, self._step, self._main_thread, self._phase)
        _STATE.pack_into(self._memory, 0, *state)


def attach(descriptors: str) -> Watch:
    """Connect this process to its launcher, which gave it the files of `Watched.descriptors`."""
    state, stacks, words = (int(number) for number in descriptors.split(","))
    for descriptor in (state, stacks, words):
        os.set_inheritable(descriptor, False)
    watch = Watch(mmap.mmap(state, _SIZE), words)
    watch.answer_signals(stacks)
    sys.excepthook = watch.end_with_words
    return watch


def is_echo(error: BaseException) -> bool:
    """Whether an exception tells of other ranks' failure, or at least not of this rank's own: communication broke."""
    if any(kind.__name__ == "DistError" for kind in type(error).__mro__):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    inside = bool(frames) and "/torch/distributed/" in frames[-1].filename
    return type(error) is RuntimeError and (inside or "gloo" in str(error))


class Watched:
    """The launcher's side of one rank's files."""

    def __init__(self) -> None:
        # Closed when the object goes; they have no name, so that is all there is to clean.
        self._state = tempfile.TemporaryFile()  # noqa: SIM115
        self._stacks = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        self._words = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        self._state.truncate(_SIZE)
        self._memory = mmap.mmap(self._state.fileno(), _SIZE)
        self._read = 0

    @property
    def descriptors(self) -> tuple[int, int, int]:
        """The open files that the rank must inherit."""
        return self._state.fileno(), self._stacks.fileno(), self._words.fileno()

    def state(self) -> State:
        """How far the rank is."""
        entered, marks, step, main_thread, phase = _STATE.unpack_from(self._memory, 0)
        return State(entered, marks, step, main_thread, phase.rstrip(b"\0").decode(errors="replace") or "start")

    def tell_to_leave(self) -> None:
        """Want it to leave; may be said before the rank attaches, and again."""
        _LEAVE.pack_into(self._memory, _STATE.size, 1)

    def words(self) -> dict[str, str | float] | None:
        """The last words, once they are whole."""
        said = os.pread(self._words.fileno(), os.fstat(self._words.fileno()).st_size, 0)
        with contextlib.suppress(ValueError):
            return json.loads(said) if said else None
        return None

    def unread(self) -> str:
        """Stacks that were written since the last `forget`."""
        size = os.fstat(self._stacks.fileno()).st_size
        return os.pread(self._stacks.fileno(), size - self._read, self._read).decode(errors="replace")

    def crash(self) -> str:
        """What was written by a crash in C; it names the signal and has the stacks."""
        _, fatal, rest = self.unread().partition(_FATAL)
        return fatal + rest

    def was_signalled(self) -> bool:
        """Whether stacks came that this launcher did not ask for: somebody sent SIGUSR1 to the rank itself."""
        text = self.unread()
        return bool(text) and _FATAL not in text

    def forget(self) -> None:
        """Start anew with `unread`."""
        self._read = os.fstat(self._stacks.fileno()).st_size


def gather_stacks(ranks: dict[int, tuple[Watched, int]]) -> dict[int, str]:
    """Each rank's stacks of all threads now, "" where none come in time; takes {rank: (its files, its process)}.

    A rank that has not attached yet is not asked: the signal would end it.
    """
    asked = {rank: watched for rank, (watched, _) in ranks.items() if watched.state().main_thread}
    for rank, watched in asked.items():
        watched.forget()
        with contextlib.suppress(ProcessLookupError):
            os.kill(ranks[rank][1], signal.SIGUSR1)
    deadline = time.monotonic() + STACKS_SECONDS
    seen: dict[int, str] = {}
    while time.monotonic() < deadline:
        time.sleep(0.1)
        now = {rank: watched.unread() for rank, watched in asked.items()}
        if now == seen and all(now.values()):
            break
        seen = now
    for watched in asked.values():
        watched.forget()
    return dict.fromkeys(ranks, "") | seen
