"""Who is to blame when a run fails or hangs, and how it is told. Pure: from what was observed to text.

Must not know processes, signals and sockets (`launch`, `link`, `watchdog`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from megatron_cppo.progress import duration

# A rank whose innermost Python frame is in one of these waits for other ranks. On a GPU a rank may wait at any line
# that needs a result; then no rank seems to wait, and the one that stands elsewhere is named.
_WAITING = re.compile(
    r"/torch/distributed/(distributed_c10d|_functional_collectives)\.py$"
    r"|/megatron/core/(pipeline_parallel/p2p_communication|tensor_parallel/\w+|distributed/\w+)\.py$"
)
_THREAD = re.compile(r"^(?:Current thread|Thread) 0x([0-9a-f]+).*\(most recent call first\):$")
_FRAME = re.compile(r'^  File "(.*)", line (\d+|\?\?\?) in (.*)$')


@dataclass(frozen=True, slots=True)
class Failure:
    """One rank's end. `kind`: error, communication (an echo), user, killed, ended (as it was told), status, lost.

    Example: Failure(rank=3, kind="killed", time=1.7e9, summary="killed by signal 9", text="rank 3 was ...", status=137)
    """

    rank: int
    kind: str
    time: float
    summary: str
    text: str
    status: int


@dataclass(frozen=True, slots=True)
class End:
    """How a run ends: the exit status, the rank that caused it (-1: none did), one line about it."""

    status: int
    rank: int
    summary: str


@dataclass(frozen=True, slots=True)
class Standing:
    """Where one rank stands. `stack` is what faulthandler wrote, `note` says why there is none.

    One that is `done` and has `left` saved after a step, as it was told: the run is not at its end.
    """

    rank: int
    step: int
    phase: str
    entered: int
    idle_seconds: float
    main_thread: int
    stack: str
    note: str
    done: bool
    left: bool = False


Frame = tuple[str, str, str]
"""(file, line, function)"""


def cause(failures: Sequence[Failure]) -> Failure:
    """The failure that the others follow from: the earliest, but broken communication only if there is nothing else."""
    own = [failure for failure in failures if failure.kind != "communication"]
    return min(own or failures, key=lambda failure: failure.time)


def exit_text(rank: int, returncode: int) -> tuple[str, str, int]:
    """(kind, sentence, exit status) of a rank that ended without last words; `returncode` as in subprocess."""
    if returncode >= 0:
        return "status", f"rank {rank} ended with exit status {returncode}", returncode
    number = -returncode
    if number in (2, 15):
        return "ended", f"rank {rank} was ended by signal {number}", 128 + number
    why = " (perhaps out of memory: see dmesg)" if number == 9 else ""
    return "killed", f"rank {rank} was killed by signal {number}{why}", 128 + number


def threads(stack: str) -> dict[int, list[Frame]]:
    """The frames of each thread of faulthandler's text, innermost first; with several dumps, those of the last."""
    found: dict[int, list[Frame]] = {}
    frames: list[Frame] = []
    for line in stack.split("\n"):
        if match := _THREAD.match(line):
            frames = found[int(match[1], 16)] = []
        elif match := _FRAME.match(line):
            frames.append((match[1], match[2], match[3]))
    return found


def waits(standing: Standing) -> bool:
    """Whether a rank waits for other ranks: its main thread, or the one that computes gradients for it."""
    every = threads(standing.stack)
    main = every.get(standing.main_thread, [])
    tops = [frames[0][0] for frames in every.values() if frames]
    if not main:
        return False
    if "/torch/autograd/" in main[0][0]:
        return any(_WAITING.search(top) for top in tops)
    return bool(_WAITING.search(main[0][0]))


def hang(standings: Sequence[Standing], limit_seconds: float) -> str | None:
    """The verdict on a run in which some rank makes no progress; None if such ranks only wait for one that does."""
    alive = [standing for standing in standings if not standing.done]
    late = [standing for standing in alive if standing.idle_seconds >= limit_seconds]
    busy = [standing for standing in late if not waits(standing)]
    if 0 < len(busy) < max(len(alive), 2):
        return f"{_named(busy)}: not waiting for another rank"
    if not late or len(late) < len(alive):
        return None
    return _blame(late, [standing for standing in standings if standing.done])


def _blame(stuck: Sequence[Standing], done: Sequence[Standing]) -> str:
    if done and waits(stuck[0]):
        return f"{_named(done)}: at its end already, while the others wait"
    first = min(standing.entered for standing in stuck)
    behind = [standing for standing in stuck if standing.entered == first]
    if len(behind) < len(stuck):
        return f"{_named(behind)}: still in phase {behind[0].phase!r} of step {behind[0].step}"
    places = Counter(_place(standing) for standing in stuck)
    if len(places) > 1:
        (usual, most), (_, second) = places.most_common(2)
        odd = [standing for standing in stuck if most == second or _place(standing) != usual]
        return f"{_named(odd)}: " + ("at different places" if most == second else "at another place than the others")
    return "no suspect: all ranks stand at the same place; the network or a device hangs, or this takes so long"


def _named(standings: Sequence[Standing]) -> str:
    numbers = _ranges([standing.rank for standing in standings])
    return f"suspect rank {numbers}" if len(standings) == 1 else f"suspect ranks {numbers}"


def _ranges(ranks: Sequence[int]) -> str:
    """[0, 2, 3, 4] as "0, 2-4"."""
    parts: list[list[int]] = []
    for rank in sorted(ranks):
        if parts and parts[-1][1] == rank - 1:
            parts[-1][1] = rank
        else:
            parts.append([rank, rank])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def _place(standing: Standing) -> tuple[Frame, ...]:
    return tuple(threads(standing.stack).get(standing.main_thread, []))


def report(standings: Sequence[Standing]) -> str:
    """Every rank's stacks, and below them the table."""
    return f"{stacks(standings)}\n\n{table(standings)}"


def table(standings: Sequence[Standing]) -> str:
    """One line a rank: step, phase, time since its last progress, whether it waits, where it stands."""
    rows = [("rank", "step", "phase", "no progress for", "waits", "where")]
    for standing in standings:
        waiting = "-" if standing.note else "yes" if waits(standing) else "no"
        where = standing.note or _where(_place(standing))
        idle = "-" if standing.done else duration(standing.idle_seconds)
        rows.append((str(standing.rank), str(standing.step), standing.phase, idle, waiting, where))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[5]]).rstrip()
        for row in rows
    )


def _where(frames: Sequence[Frame]) -> str:
    """The innermost frame, after the innermost one of this package or of the user."""
    if not frames:
        return "unknown"
    foreign = ("/site-packages/", "/lib/python", "<frozen ")
    ours = next((frame for frame in frames if not any(part in frame[0] for part in foreign)), None)
    shown = [ours] if ours in (None, frames[0]) else [ours, frames[0]]
    return " > ".join(f"{PurePath(file).name}:{line} {name}" for file, line, name in (f or frames[0] for f in shown))


def stacks(standings: Sequence[Standing]) -> str:
    """Every rank's stacks, all threads; ranks whose stacks are equal share one text."""
    groups: dict[str, list[int]] = {}
    for standing in standings:
        text = re.sub(r"0x[0-9a-f]+", "0x", standing.stack).strip() or f"  no stack: {standing.note}"
        groups.setdefault(text, []).append(standing.rank)
    return "\n".join(
        f"--- rank{'s' if len(ranks) > 1 else ''} {_ranges(ranks)}\n{text}" for text, ranks in groups.items()
    )
