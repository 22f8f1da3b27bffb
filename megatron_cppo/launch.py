"""Starts ranks, watches them, and ends them together: all of a run on this machine, or the one of a scheduler's task.

A rank is a process of its own and this one its parent, so that a rank that is killed, blocked in a collective or holds
the interpreter's lock is noticed like any other. Where a scheduler starts one launcher per rank, that of rank 0 decides
for all (`link`). Owns processes, signals and what is printed at a run's end; who is to blame says `diagnosis`, what a
rank lets us see `watchdog`. Needs no torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from megatron_cppo import diagnosis
from megatron_cppo.config import UserError
from megatron_cppo.diagnosis import End, Failure, Standing
from megatron_cppo.hub import Hub
from megatron_cppo.link import Link, Message, Peer, open_server, port_of
from megatron_cppo.progress import duration
from megatron_cppo.ranks import RankProcess, adopted_orphans, children, end_ranks, start_rank
from megatron_cppo.watchdog import LEFT, STACKS_SECONDS, gather_stacks

GRACE_SECONDS = 10.0
"""Between asking a rank to end and killing it."""
SETTLE_SECONDS = 1.0
"""After a first failure the others' are awaited: the one that was noticed first need not be the cause."""
ANSWER_SECONDS = 30.0
"""A launcher whose rank has failed waits so long for rank 0's to say how the run ends."""
ARRIVAL_SECONDS = 300.0
"""All launchers of a scheduled run must have started by then."""
POLL_SECONDS = 0.1
STATE_SECONDS = 2.0
STORE = "MEGATRON_CPPO_STORE"
"""Environment of rank 0: the socket on which its store is to listen, bound here so that no port is ever guessed."""


class LaunchError(UserError):
    """The ranks of a scheduled run cannot find each other."""


@dataclass(frozen=True, slots=True)
class Task:
    """What a scheduler tells a process that is to be one rank. Example: Task(3, 8, "node01", 29500)"""

    rank: int
    num_ranks: int
    address: str
    port: int


class _ToldError(BaseException):
    """A signal told this process to end."""

    def __init__(self, number: int) -> None:
        self.number = number


def run_ranks(
    command: Sequence[str],
    *,
    num_ranks: int,
    environment: dict[str, str],
    log_dir: Path | None = None,
    hang_minutes: float = 0.0,
    task: Task | None = None,
) -> int:
    """Run `command` as ranks 0 ... num_ranks - 1, or as `task.rank` alone; returns 0, LEFT, or the cause's exit status.

    When one rank fails, all are ended, and its last words are the last that is printed; when none has made progress
    for `hang_minutes` (0: never looked at), every rank's stacks and who is to blame. Both are kept in `log_dir`. When
    this process is told to end, or dies, the ranks end too. SIGUSR1 shows every rank's stacks, and the run goes on.
    SIGUSR2 to any of a run's launchers has all ranks save after their step and leave; all launchers then return LEFT.
    To be called from the main thread. Raises LaunchError.
    """
    launcher = _Launcher(command, num_ranks, environment, log_dir, 60 * hang_minutes, task)
    # By default this process would end and leave its ranks behind.
    previous = {
        signal.SIGINT: signal.getsignal(signal.SIGINT),
        signal.SIGTERM: signal.signal(signal.SIGTERM, _told),
        signal.SIGUSR1: signal.signal(signal.SIGUSR1, lambda *_: launcher.show_stacks_soon()),
        signal.SIGUSR2: signal.signal(signal.SIGUSR2, lambda *_: launcher.leave_soon()),
    }
    try:
        with adopted_orphans():
            try:
                return launcher.run()
            except KeyboardInterrupt:
                return launcher.told(signal.SIGINT)
            except _ToldError as told:
                return launcher.told(told.number)
            finally:
                launcher.close()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def rank_command(arguments: Sequence[str]) -> list[str]:
    """The command of one rank: this interpreter, the trainer, the user's arguments."""
    return [sys.executable, "-m", "megatron_cppo.train", *arguments]


def loopback_interface() -> dict[str, str]:
    """What gloo must be told, or it resolves the host's name, which need not lead to this machine."""
    return {"GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}


def _told(number: int, _: FrameType | None) -> NoReturn:
    raise _ToldError(number)


class _Launcher:
    def __init__(
        self,
        command: Sequence[str],
        num_ranks: int,
        environment: dict[str, str],
        log_dir: Path | None,
        limit_seconds: float,
        task: Task | None,
    ) -> None:
        self._command, self._environment, self._log_dir = command, environment, log_dir
        self._num_ranks, self._limit, self._task = num_ranks, limit_seconds, task
        self._hub: Hub | None = None
        self._line: Link | None = None  # to the hub, if that is another launcher
        self._ranks: list[RankProcess] = []
        self._failures: list[Failure] = []
        self._failed_at: float | None = None
        self._end: End | None = None
        self._has_told = False
        self._shows_stacks = self._leaves = False
        self._reported = self._asked = self._started = time.monotonic()
        self._strangers = children()

    def run(self) -> int:
        """From the start of the ranks to their end."""
        self._start()
        while self._end is None:
            self._hear(POLL_SECONDS)
            self._look()
            if self._end is not None:
                break
            if self._line is None:
                self._decide()
            else:
                self._report(self._line)
        self._finish(self._end)
        return self._end.status

    def told(self, number: int) -> int:
        """End the run because a signal said so."""
        end = End(128 + number, -1, f"told to end by signal {number}")
        if self._line is not None and self._task is not None:
            text = f"rank {self._task.rank} was {end.summary}"
            failure = Failure(self._task.rank, "ended", time.time(), text, text + "\n", end.status)
            self._line.send_all({"failed": dataclasses.asdict(failure)})
        if self._hub is not None:
            self._hub.end(dataclasses.replace(end, summary=f"rank 0 was {end.summary}"))
        self._finish(end)
        return end.status

    def show_stacks_soon(self) -> None:
        """Ask for every rank's stacks; from a signal handler."""
        self._shows_stacks = True

    def leave_soon(self) -> None:
        """Have the ranks leave after their step; from a signal handler, any number of times."""
        self._leaves = True

    def close(self) -> None:
        """End what is still running, whatever happened."""
        self._end_ranks(everything=self._end is None or self._end.status != 0)
        for connection in (self._hub, self._line):
            if connection is not None:
                connection.close()

    # Start.

    def _start(self) -> None:
        if self._task is None:
            with open_server("127.0.0.1", 0) as store:
                for rank in range(self._num_ranks):
                    self._start_rank(rank, {"MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": str(rank)}, store, port_of(store))
        elif self._task.rank == 0:
            with open_server("", 0) as store:
                try:
                    self._hub = Hub(self._num_ranks, self._task.port, port_of(store))
                except OSError as error:
                    raise LaunchError(
                        f"MASTER_PORT {self._task.port} cannot be used on the machine of rank 0 ({error}); choose "
                        "another, and start the ranks without torchrun, which takes that port for itself"
                    ) from error
                self._start_rank(0, {"MASTER_ADDR": self._task.address}, store, port_of(store))
        else:
            self._line = self._join(self._task)

    def _join(self, task: Task) -> Link:
        line = Link()
        try:
            line.connect(task.address, task.port, ARRIVAL_SECONDS)
        except OSError as error:
            raise LaunchError(
                f"rank {task.rank} cannot reach rank 0, {task.address}:{task.port} (MASTER_ADDR, MASTER_PORT): {error}"
                "; is rank 0 running there, and may this machine connect to it?"
            ) from error
        peer = line.peers[0]
        peer.rank = 0
        peer.send({"hello": task.rank, "num_ranks": self._num_ranks})
        return line

    def _start_rank(self, rank: int, said: dict[str, str], store: socket.socket | None, port: int) -> None:
        environment = self._environment | {"WORLD_SIZE": str(self._num_ranks), "RANK": str(rank)} | said
        environment["MASTER_PORT"] = str(port)
        inherit = []
        if rank == 0 and store is not None:
            inherit.append(store.fileno())
            environment[STORE] = str(store.fileno())
        self._ranks.append(start_rank(rank, self._command, environment, inherit=inherit))

    # Watch.

    def _hear(self, seconds: float) -> None:
        if self._line is not None:
            for peer, message in self._line.poll(seconds):
                self._hear_hub(peer, message)
        elif self._hub is not None:
            self._hub.hear(seconds)
            self._shows_stacks |= self._hub.stacks_wanted
            self._hub.stacks_wanted = False
        else:
            time.sleep(seconds)

    def _hear_hub(self, peer: Peer, message: Message | None) -> None:
        assert self._task is not None, "a hub is heard without a task"
        if message is None:
            self._end = self._end or self._own_end("the launcher of rank 0 is gone (killed, or its machine is down)")
        elif "store_port" in message:
            self._start_rank(self._task.rank, {"MASTER_ADDR": self._task.address}, None, message["store_port"])
        elif "ask" in message:
            for standing in self._own_standings(with_stacks=True):
                peer.send({"answer": dataclasses.asdict(standing)})
        elif "end" in message:
            self._end = End(**message["end"])

    def _look(self) -> None:
        """Note what this launcher's own ranks did."""
        for rank in self._ranks:
            if self._leaves:  # the ranks of other launchers hear of it from this one, when all agree
                rank.watched.tell_to_leave()
            self._shows_stacks |= not rank.over and rank.watched.was_signalled()
            if not rank.look():
                continue
            if rank.failure is not None:
                self._write_log(rank.rank, rank.failure.text)
                self._failures.append(rank.failure)
            if self._line is not None:
                done, failed = {"standing": dataclasses.asdict(rank.standing())}, rank.failure
                self._line.send_all(done if failed is None else {"failed": dataclasses.asdict(failed)})

    def _own_end(self, otherwise: str) -> End:
        """How the run ends when there is no hub to say it: with this launcher's own failure, if it is one."""
        own = [failure for failure in self._failures if failure.kind != "communication"]
        return End(own[0].status, own[0].rank, own[0].summary) if own else End(1, -1, otherwise)

    def _report(self, line: Link) -> None:
        """Tell the hub how far this launcher's rank is."""
        now = time.monotonic()
        if self._failures:
            self._failed_at = self._failed_at or now
            if now - self._failed_at > ANSWER_SECONDS:
                self._end = self._own_end("the launcher of rank 0 does not answer")
        if self._shows_stacks:
            self._shows_stacks = False
            line.send_all({"stacks": True})
        if now - self._reported >= min(STATE_SECONDS, self._limit / 4 or STATE_SECONDS):
            self._reported = now
            for standing in self._own_standings(with_stacks=False):
                line.send_all({"standing": dataclasses.asdict(standing)})

    # Decide: the only launcher of a run, or rank 0's.

    def _decide(self) -> None:
        now = time.monotonic()
        failures = [*self._failures, *(self._hub.failures if self._hub is not None else ())]
        if failures:
            self._failed_at = self._failed_at or now
            if now - self._failed_at >= SETTLE_SECONDS or len(failures) == self._num_ranks:
                cause = diagnosis.cause(failures)
                self._end_all(End(cause.status, cause.rank, cause.summary))
            return
        standings = self._standings()
        missing = sorted(set(range(self._num_ranks)) - {standing.rank for standing in standings})
        if missing and now - self._started > ARRIVAL_SECONDS:
            count = f"{len(missing)} of {self._num_ranks} ranks"
            self._end_all(
                End(1, -1, f"{count}, the first is {missing[0]}, did not start in {duration(ARRIVAL_SECONDS)}")
            )
        elif not missing and all(standing.done for standing in standings):
            left = any(standing.left for standing in standings)
            self._end_all(End(LEFT, -1, "left after a step, as told") if left else End(0, -1, "done"))
        elif self._shows_stacks:
            self._shows_stacks = False
            self._tell(diagnosis.report(self._asked_standings()), "stacks.txt")
        elif self._limit and now - self._asked >= self._limit / 4:
            idle = max((standing.idle_seconds for standing in standings if not standing.done), default=0.0)
            if idle >= self._limit:
                self._judge(self._asked_standings())

    def _judge(self, standings: Sequence[Standing]) -> None:
        verdict = diagnosis.hang(standings, self._limit)
        if verdict is not None:
            summary = f"no progress for {duration(self._limit)}; {verdict}"
            self._tell(f"{diagnosis.report(standings)}\n{summary}", "hang.txt")
            self._has_told = True
            self._end_all(End(1, -1, summary))

    def _end_all(self, end: End) -> None:
        self._end = end
        if self._hub is not None:
            self._hub.end(end)

    def _standings(self) -> list[Standing]:
        far = self._hub.standings() if self._hub is not None else []
        return sorted([*self._own_standings(with_stacks=False), *far], key=lambda standing: standing.rank)

    def _own_standings(self, *, with_stacks: bool) -> list[Standing]:
        running = {rank.rank: (rank.watched, rank.process.pid) for rank in self._ranks if not rank.over}
        stacks = gather_stacks(running) if with_stacks else {}
        return [rank.standing(stacks.get(rank.rank, "")) for rank in self._ranks]

    def _asked_standings(self) -> list[Standing]:
        """Every rank's, with its stacks."""
        self._asked = asked = time.monotonic()
        if self._hub is not None:
            self._hub.ask()
        answers = {standing.rank: standing for standing in self._own_standings(with_stacks=True)}
        if self._hub is not None:
            while not self._hub.all_answered() and time.monotonic() < asked + 2 * STACKS_SECONDS:
                self._hub.hear(POLL_SECONDS)
            answers |= self._hub.answers
        silent = "its launcher does not answer"
        return [
            standing if standing.done else answers.get(standing.rank, dataclasses.replace(standing, note=silent))
            for standing in self._standings()
        ]

    # End.

    def _finish(self, end: End) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        self._end = end
        self._end_ranks(everything=end.status != 0)
        if end.status in (0, LEFT):
            return
        for rank in self._ranks:
            if rank.failure is None and rank.rank != end.rank:
                self._write_log(rank.rank, f"ended: {end.summary}\n")
        mine = next((rank.failure for rank in self._ranks if rank.rank == end.rank), None)
        if mine is not None:
            where = "" if self._log_dir is None else f"; the logs are in {self._log_dir}"
            communication = mine.kind == "communication" and self._line is None
            table = f"{diagnosis.table(self._standings())}\n" if communication else ""
            head = f"{table}all ranks were ended, as rank {mine.rank} failed{where}\n" if mine.kind != "user" else ""
            self._tell(head + mine.text.rstrip())
        elif not self._has_told:
            self._tell(end.summary if self._task is None else f"rank {self._task.rank} was ended: {end.summary}")

    def _end_ranks(self, *, everything: bool) -> None:
        end_ranks(self._ranks, self._strangers, everything=everything, grace_seconds=GRACE_SECONDS)

    def _tell(self, text: str, keep_as: str = "") -> None:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
        if keep_as and self._log_dir is not None:
            with contextlib.suppress(OSError):
                self._log_dir.mkdir(parents=True, exist_ok=True)
                (self._log_dir / keep_as).write_text(text + "\n")

    def _write_log(self, rank: int, text: str) -> None:
        """Append to a rank's own log; a full disk must not hide what is to be said."""
        if self._log_dir is not None:
            with contextlib.suppress(OSError):
                self._log_dir.mkdir(parents=True, exist_ok=True)
                with (self._log_dir / f"rank{rank}.log").open("a") as file:
                    file.write(text)
