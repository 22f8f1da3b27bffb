"""A vLLM server as the rank that drives it sees it, and how one is found to be up, late or hanging.

Must not know what servers are asked, or what becomes of the questions of one that is out (`fleet`).
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

from megatron_cppo.rollout.connection import Connection

LOG = logging.getLogger("megatron_cppo")
LOOK_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """When a server is out: no token for `hang_seconds` while it is asked, not up within `start_seconds`. One that
    started `max_restarts` times again and never answered is given up.
    """

    hang_seconds: float
    start_seconds: float
    max_restarts: int


@dataclass(eq=False, slots=True)
class Server:
    """One server. States: starting, idle (it answers, and has no weights of ours), ready, failed (to be started again,
    or awaited), dropped.
    """

    index: int
    url: str
    ours: bool
    state: str = "starting"
    why: str = ""
    version: int = -1
    asked: int = 0
    garbage: int = 0
    starts: int = 0
    fruitless: int = 0
    """Starts since it last answered; one that was found and comes back has started, too."""
    seen: float = field(default_factory=time.monotonic)
    progress: float = -1.0

    @property
    def name(self) -> str:
        """For people."""
        return f"server {self.index} ({self.url})"

    @property
    def usable(self) -> bool:
        """Whether it can be sent weights."""
        return self.state in ("idle", "ready")


async def look(server: Server, connection: Connection, limits: Limits) -> str:
    """Note that a server is up, or that it has sampled; returns why it is out, "" while it is not."""
    revives = server.state == "failed" and not server.ours
    if server.state == "starting" or revives:
        if await connection.reads(f"{server.url}/health", seconds=LOOK_SECONDS) is not None:
            server.state = "idle"
            server.starts += revives
            server.fruitless += revives
            LOG.info("%s is up", server.name)
        elif time.monotonic() - server.seen > limits.start_seconds:
            return f"it was not up within {limits.start_seconds:.0f} s"
    elif server.state == "ready" and server.asked:
        text = await connection.reads(f"{server.url}/metrics", seconds=LOOK_SECONDS)
        progress = None if text is None else _tokens(text)
        if progress is not None and progress != server.progress:
            server.progress, server.seen = progress, time.monotonic()
        elif time.monotonic() - server.seen > limits.hang_seconds:
            return f"no token came from it for {limits.hang_seconds:.0f} s"
    return ""


def _tokens(metrics: str) -> float:
    """How many tokens a server has read and sampled, by its own count."""
    counted = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")
    return sum(float(line.rsplit(" ", 1)[1]) for line in metrics.splitlines() if line.startswith(counted))
