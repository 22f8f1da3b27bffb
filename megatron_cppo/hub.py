"""Rank 0's launcher of a scheduled run, as the other launchers see it: who is there, how far, what failed.

Owns the messages between launchers. Must not know processes, nor what follows from what it hears (`launch`).

    to the hub      hello, standing (every few seconds; done or not), answer (with stacks), failed, stacks (show them)
    from the hub    store_port (welcome), ask (for an answer), end
"""

from __future__ import annotations

import dataclasses
import time

from megatron_cppo.diagnosis import End, Failure, Standing
from megatron_cppo.link import Link, Message, Peer


class Hub:
    """The other launchers of a run of `num_ranks`, which connect to `port` and are told where rank 0's store is."""

    def __init__(self, num_ranks: int, port: int, store_port: int) -> None:
        """Start to listen. Raises OSError when the port is taken."""
        self.failures: list[Failure] = []
        self.stacks_wanted = False
        self.answers: dict[int, Standing] = {}
        self._num_ranks, self._store_port = num_ranks, store_port
        self._heard: dict[int, tuple[Standing, float]] = {}
        self._link = Link()
        self._link.listen(port)

    def hear(self, seconds: float) -> None:
        """Note what comes within the time, at least once."""
        for peer, message in self._link.poll(seconds):
            if message is None:
                self._miss(peer)
            elif "hello" in message:
                self._welcome(peer, message)
            elif peer.rank < 0:
                self._link.drop(peer)
            else:
                self._note(peer, message)

    def standings(self) -> list[Standing]:
        """The last that was heard of each rank that has come."""
        now = time.monotonic()
        return [
            dataclasses.replace(standing, idle_seconds=standing.idle_seconds + now - heard)
            for standing, heard in self._heard.values()
        ]

    def ask(self) -> None:
        """Ask all for their stacks, which come into `answers`."""
        self.answers = {}
        self._link.send_all({"ask": True})

    def all_answered(self) -> bool:
        """Whether all that are there have answered."""
        return all(peer.rank < 0 or peer.rank in self.answers for peer in self._link.peers)

    def end(self, end: End) -> None:
        """Tell all that the run ends, and how."""
        self._link.send_all({"end": dataclasses.asdict(end)})

    def close(self) -> None:
        """Wait a little until all have read it."""
        self._link.close()

    def _note(self, peer: Peer, message: Message) -> None:
        if "standing" in message:
            standing = Standing(**message["standing"])
            self._heard[standing.rank] = (standing, time.monotonic())
            # Those that left end together: a scheduler takes a first status that is not 0 as the end of all.
            if standing.done and not standing.left:
                peer.send({"end": dataclasses.asdict(End(0, -1, "done"))})
        elif "answer" in message:
            standing = Standing(**message["answer"])
            self.answers[standing.rank] = standing
        elif "failed" in message:
            self.failures.append(Failure(**message["failed"]))
        elif "stacks" in message:
            self.stacks_wanted = True

    def _miss(self, peer: Peer) -> None:
        failed = any(failure.rank == peer.rank for failure in self.failures)
        if peer.rank >= 0 and not failed and not self._heard[peer.rank][0].done:
            text = f"the launcher of rank {peer.rank} is gone (killed, or its machine is down)"
            self.failures.append(Failure(peer.rank, "lost", time.time(), text, text + "\n", 1))

    def _welcome(self, peer: Peer, message: Message) -> None:
        rank, num_ranks = message["hello"], message.get("num_ranks")
        wanted = isinstance(rank, int) and 0 < rank < self._num_ranks and num_ranks == self._num_ranks
        taken = wanted and rank in self._heard
        if taken or not wanted:
            there = ", which is there already" if taken else ""
            has = f"rank 0 is of a run of {self._num_ranks} ranks, this one says rank {rank} of {num_ranks}{there}"
            peer.send({"end": dataclasses.asdict(End(2, -1, f"{has}; give each run a MASTER_PORT of its own"))})
            return
        peer.rank = rank
        new = Standing(rank, 0, "start", 0, 0.0, 0, "", note="not started yet", done=False)
        self._heard[rank] = (new, time.monotonic())
        peer.send({"store_port": self._store_port})
