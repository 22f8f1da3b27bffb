"""The servers of a run and the requests that they work on, driven by one rank.

Owns the dealing out of questions, and faults: a question whose server fails goes to another one,
unanswered and therefore never twice. Knows neither ranks nor processes: that a server must be started again, or be sent
weights, it says (`Todo`) and waits. What is asked and answered is `wire`'s, the calls are `connection`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from megatron_cppo.rollout import wire
from megatron_cppo.rollout.connection import FAILURES, Connection, KeyRefusedError
from megatron_cppo.rollout.engine import EngineError
from megatron_cppo.rollout.health import LOOK_SECONDS, Limits, Server, look
from megatron_cppo.rollout.wire import Part, Question, Rules, WireError
from megatron_cppo.serving import SERVER_KEY

LOG = logging.getLogger("megatron_cppo")
MAX_TRIES = 5
"""A question that so many servers have failed at ends the run: it is the question."""
MAX_GARBAGE = 3
"""Replies in a row that are no answers; the server is then taken for broken."""
ASK_AHEAD = 1.25
"""Samples given to a server at once, of those that it decodes at once: the next ones wait there and not here."""
PAUSE_SECONDS = 60.0
ABORT_SECONDS = 10.0
"""Answers that are aborted arrive within that; who owes one then is no longer waited for."""
ABORT_AGAIN_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Todo:
    """What the driving rank must do next: wait, start (servers), sync (servers), done."""

    kind: str
    servers: tuple[int, ...] = ()
    num_answers: int = 0
    dropped: tuple[int, ...] = ()
    """Servers that are given up: what is left of their processes holds memory."""


@dataclass(eq=False, slots=True)
class _Ticket:
    questions: list[Question]
    answers: dict[tuple[int, int], tuple[tuple[Part, ...], bool]] = field(default_factory=dict)
    """By (place, index): the sample's parts, and whether it was cut at the longest length."""
    num_wanted: int = 0


@dataclass(eq=False, slots=True)
class _Piece:
    ticket: _Ticket
    question: Question
    tries: int = 0


class Fleet:
    """All servers of a run. Its public methods are called by one thread, which is not the loop's."""

    def __init__(self, rules: Rules, *, key: str, label: str, max_sequences: int, limits: Limits) -> None:
        """`label` begins the name of every version of the weights, so that another run's are known as such."""
        self.servers: list[Server] = []
        self.version = -1
        self._rules, self._label = rules, label
        self._most = max(1, int(max_sequences * ASK_AHEAD))
        self.limits = limits
        self._pending: deque[_Piece] = deque()
        self._running: dict[asyncio.Task[None], tuple[Server, _Piece]] = {}
        self._calling: dict[asyncio.Task[Any], Server] = {}
        self._held = True
        self._failure = ""
        self._changed = threading.Condition()
        self.connection = Connection(key)
        self._looking = self.connection.begin(self._look_after())

    # ------------------------------------------------------------------ for the driving rank

    def submit(self, questions: Sequence[Question]) -> _Ticket:
        """Have questions answered; returns at once."""
        ticket = _Ticket(list(questions), num_wanted=sum(question.count for question in questions))
        self.connection.wait(self._add([_Piece(ticket, question) for question in questions]))
        return ticket

    def todo(self, ticket: _Ticket | None, *, seconds: float, all_up: bool = False) -> Todo:
        """What is to be done before `ticket` is answered (None: before weights can be sent); waits at most `seconds`.

        All servers are awaited when they start for the first time; one that was started again only with `all_up`, or
        where no other is up.

        Raises EngineError when no server is left, or a question was failed at by several.
        """
        deadline = time.monotonic() + seconds
        with self._changed:
            while True:
                todo = self._next(ticket, all_up)
                left = deadline - time.monotonic()
                if todo.kind != "wait" or left <= 0:
                    dropped = tuple(server.index for server in self.servers if server.state == "dropped")
                    return dataclasses.replace(todo, dropped=dropped)
                self._changed.wait(left)

    def started(self, index: int, url: str, *, ours: bool) -> None:
        """A server is being started at `url`, or is said to be there."""
        self.connection.wait(self._start(index, url, ours))

    def hold(self) -> None:
        """Abort what runs, clear all caches, and ask nothing until `let_go`. Partial answers are kept."""
        self.connection.wait(self._hold())

    def let_go(self) -> None:
        """Ask again."""
        self.connection.wait(self._let_go())

    def post(self, server: Server, path: str, body: Any = None, **query: str) -> Future[Any]:
        """Call a route of one server; a failure fails the server, and is raised as EngineError by the future."""
        return self.connection.begin(self._call(server, path, method="POST", body=body, query=query))

    def get(self, server: Server, path: str) -> Future[Any]:
        """Read a route of one server, like `post`."""
        return self.connection.begin(self._call(server, path, method="GET"))

    def fail(self, server: Server, why: str) -> None:
        """Take a server out: it is to be started again."""
        self.connection.wait(self._fail_soon(server, why))

    def drop(self, server: Server) -> None:
        """Do without a server from now on."""
        LOG.warning("%s is given up: %s", server.name, server.why)
        server.state = "dropped"

    def lacks(self, server: Server) -> None:
        """A server is up and has no whole version."""
        server.version, server.state = -1, "idle"

    def has(self, server: Server, version: int) -> None:
        """A server has the weights of `version`."""
        server.version, server.state = version, "ready"

    def label(self, version: int) -> str:
        """What a version is called on the servers."""
        return f"{self._label}-{version}"

    def usable(self) -> list[Server]:
        """The servers that can be sent weights."""
        return [server for server in self.servers if server.usable]

    def close(self) -> None:
        """Let go of all connections; nothing may be asked any more."""
        self._looking.cancel()
        self.connection.wait(self._close())
        self.connection.close()

    def _next(self, ticket: _Ticket | None, all_up: bool) -> Todo:
        if self._failure:
            raise EngineError(self._failure)
        alive = [server for server in self.servers if server.state != "dropped"]
        if not alive:
            told = "\n  ".join(f"{server.name}: {server.why}" for server in self.servers)
            raise EngineError(f"no vLLM server is left:\n  {told}")
        num_answers = 0 if ticket is None else len(ticket.answers)
        if ticket is not None and num_answers == ticket.num_wanted:
            return Todo("done", num_answers=num_answers)
        failed = tuple(server.index for server in alive if server.state == "failed" and server.ours)
        if failed:
            return Todo("start", failed, num_answers)
        if ticket is None:
            awaited = any(server.state == "starting" and (all_up or server.starts == 1) for server in alive)
            waits = awaited or not self.usable()
            return Todo("wait" if waits else "done")
        behind = tuple(server.index for server in alive if server.state == "idle")
        return Todo("sync", behind, num_answers) if behind else Todo("wait", num_answers=num_answers)

    # ------------------------------------------------------------------ in the loop

    async def _close(self) -> None:
        for task in list(self._running):
            task.remove_done_callback(self._asked)
            task.cancel()

    async def _add(self, pieces: Sequence[_Piece]) -> None:
        self._pending.extend(pieces)
        self._deal()

    async def _start(self, index: int, url: str, ours: bool) -> None:
        if index == len(self.servers):
            self.servers.append(Server(index, url, ours))
        server = self.servers[index]
        server.url, server.state, server.version, server.garbage = url, "starting", -1, 0
        server.starts += 1
        server.fruitless += 1
        server.seen = time.monotonic()

    async def _hold(self) -> None:
        self._held = True
        await self._everywhere("/pause", query={"mode": "abort"})
        # What was still on its way to a server waits there for the end of the pause, and has to be aborted by itself.
        deadline = time.monotonic() + ABORT_SECONDS
        while self._running and time.monotonic() < deadline:
            _, waiting = await asyncio.wait(list(self._running), timeout=ABORT_AGAIN_SECONDS)
            if waiting:
                await self._everywhere("/abort_requests", body={})
        for task in list(self._running):  # the server aborts what nobody waits for
            task.cancel()
        if self._running:
            await asyncio.wait(list(self._running))

    async def _everywhere(self, path: str, **how: Any) -> None:
        await asyncio.gather(*(self._quietly(server, path, **how) for server in self.usable()))

    async def _quietly(self, server: Server, path: str, **how: Any) -> None:
        """Call a route; the server that it fails at is out, which is all that is to be known."""
        with contextlib.suppress(EngineError):
            await self._call(server, path, method="POST", seconds=PAUSE_SECONDS, **how)

    async def _let_go(self) -> None:
        self._held = False
        self._deal()

    def _deal(self) -> None:
        """Give what is pending to the servers that have room, the least busy first."""
        while self._pending and not self._held:
            question = self._pending[0].question
            open_ = [
                server
                for server in self.servers
                if server.state == "ready"
                and server.version == self.version
                and (server.asked == 0 or server.asked + question.count <= self._most)
            ]
            if not open_:
                return
            server = min(open_, key=lambda server: server.asked)
            if server.asked == 0:
                server.seen = time.monotonic()
            server.asked += question.count
            piece = self._pending.popleft()
            task = self.connection.loop.create_task(self._ask(server, server.starts, piece))
            self._running[task] = server, piece
            task.add_done_callback(self._asked)

    def _asked(self, task: asyncio.Task[None]) -> None:
        _, piece = self._running.pop(task)
        if task.cancelled():  # its server is out, or pauses
            self._pending.appendleft(piece)
        elif task.exception() is not None:
            self._failure = f"the driver of the rollouts failed: {task.exception()!r}"
        self._deal()
        self._tell()

    async def _ask(self, server: Server, start: int, piece: _Piece) -> None:
        body = wire.request(piece.question, self._rules)
        labels = {self.label(server.version): server.version}
        try:
            async with self.connection.session.post(f"{server.url}/inference/v1/generate", json=body) as response:
                if response.status >= 500:
                    raise aiohttp.ClientError(f"it answered {response.status}: {(await response.text())[:300]}")
                reply = await response.json(content_type=None)
                if response.status in (401, 403):
                    raise KeyRefusedError(f"it answered {response.status}")
                if response.status in (400, 413, 422):  # every server would say so
                    self._failure = f"{server.name} refuses a request: {str(reply)[:500]}"
                if response.status != 200:
                    raise WireError(f"it answered {response.status}: {str(reply)[:300]}")
            answers = wire.answers(reply, piece.question, self._rules, versions=labels)
        except KeyRefusedError:
            self._refused(server)
        except FAILURES as error:
            if server.starts == start:
                self._fail(server, str(error) or type(error).__name__)
            self._again(piece)
        except ValueError as error:  # no JSON, or no answer
            server.garbage += 1
            LOG.warning("%s gave no answer (%d in a row): %s", server.name, server.garbage, error)
            if server.garbage >= MAX_GARBAGE and server.starts == start:
                self._fail(server, f"{server.garbage} replies in a row were no answers, the last: {error}")
            self._again(piece, str(error))
        else:
            server.garbage = server.fruitless = 0
            self._take(piece, answers)
        finally:
            if server.starts == start and server.state == "ready":
                server.asked -= piece.question.count

    def _take(self, piece: _Piece, answers: Sequence[wire.Answer]) -> None:
        for answer in answers:
            question = piece.question
            parts = (*question.parts, answer.part) if answer.part.token_ids else question.parts
            place = (question.place, answer.index)
            assert place not in piece.ticket.answers, f"sample {place} was answered twice"
            if answer.reason != "abort":
                piece.ticket.answers[place] = (parts, answer.reason == "length")
                continue
            num_tokens = sum(len(part.token_ids) for part in parts)
            # Other random numbers than the first part's, and than any other sample's.
            seed = question.seed + 1_000_000 * (num_tokens + 1) + answer.index
            rest = dataclasses.replace(question, index=answer.index, count=1, parts=parts, seed=seed)
            self._pending.appendleft(_Piece(piece.ticket, rest))

    def _again(self, piece: _Piece, why: str = "") -> None:
        piece.tries += 1
        if piece.tries >= MAX_TRIES:
            where = f"{piece.question.prompt.split} row {piece.question.prompt.row}"
            self._failure = f"{where} was asked {piece.tries} times and never answered; the last reply: {why or 'none'}"
        self._pending.appendleft(piece)

    async def _call(self, server: Server, path: str, **how: Any) -> Any:
        task = asyncio.current_task()
        assert task is not None, "called by the loop"
        self._calling[task] = server
        try:
            return await self.connection.call(f"{server.url}{path}", **how)
        except KeyRefusedError as error:
            self._refused(server)
            raise EngineError(self._failure) from error
        except EngineError as error:
            self._fail(server, f"{path}: {error}")
            raise EngineError(f"{server.name}: {path}: {error}") from error
        except asyncio.CancelledError:
            if server.usable or server.state == "starting":  # it is not the server that is out
                raise
            raise EngineError(f"{server.name}: {path}: {server.why}") from None
        finally:
            del self._calling[task]

    def _refused(self, server: Server) -> None:
        self._failure = f"{server.name} refuses the run's key; set {SERVER_KEY} to the one that it was started with"
        self._tell()

    async def _fail_soon(self, server: Server, why: str) -> None:
        self._fail(server, why)

    def _fail(self, server: Server, why: str) -> None:
        if server.state in ("failed", "dropped"):
            return
        LOG.warning("%s is out: %s; its %d answers go to others", server.name, why, server.asked)
        server.state, server.why, server.version, server.asked = "failed", why, -1, 0
        server.seen = time.monotonic()
        owing = {task: asked for task, (asked, _) in self._running.items()} | self._calling
        for task, asked in owing.items():
            if asked is server and task is not asyncio.current_task():
                task.cancel()
        if server.fruitless > self.limits.max_restarts:
            self.drop(server)
        self._tell()

    def _tell(self) -> None:
        with self._changed:
            self._changed.notify_all()

    # ------------------------------------------------------------------ health

    async def _look_after(self) -> None:
        while True:
            await asyncio.gather(*(self._look_at(server) for server in self.servers))
            self._deal()
            self._tell()
            await asyncio.sleep(LOOK_SECONDS)

    async def _look_at(self, server: Server) -> None:
        why = await look(server, self.connection, self.limits)
        if why and server.state == "failed":  # it was awaited for long enough
            self.drop(server)
        elif why:
            self._fail(server, why)
