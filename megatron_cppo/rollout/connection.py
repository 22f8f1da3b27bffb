"""HTTP to vLLM servers: a thread with an event loop, on the rank that drives, and what one call may take.

Owns the connections and their time limits; knows neither what is asked nor what a failed call means (`fleet`).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

import aiohttp

from megatron_cppo.rollout.engine import EngineError

CALL_SECONDS = 600.0
"""For a call that pauses, moves or loads; not for one that generates."""
CONNECT_SECONDS = 10.0
FAILURES = (TimeoutError, aiohttp.ClientError, OSError)
"""What a server that is gone, slow or confused looks like."""
Result = TypeVar("Result")


class Connection:
    """Runs coroutines on a thread of its own, and makes their calls with the servers' key."""

    def __init__(self, key: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="rollouts", daemon=True)
        self._thread.start()
        self.session = self.wait(self._open(key))

    def begin(self, work: Coroutine[Any, Any, Result]) -> Future[Result]:
        """Start `work` on the loop; called by other threads."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def wait(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Do `work` on the loop; called by other threads."""
        return self.begin(work).result()

    def close(self) -> None:
        """Let go of all connections, and end the thread."""
        self.wait(self.session.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()

    async def call(self, url: str, *, method: str, body: Any = None, query: Mapping[str, str] | None = None) -> Any:
        """The JSON that a route answers, None for an empty answer. Raises EngineError for anything else."""
        limit = aiohttp.ClientTimeout(total=CALL_SECONDS, sock_connect=CONNECT_SECONDS)
        try:
            async with self.session.request(method, url, json=body, params=query, timeout=limit) as response:
                text = await response.text()
                if response.status != 200:
                    raise EngineError(f"it answered {response.status}: {text[:500]}")
                return await response.json(content_type=None) if text else None
        except EngineError:
            raise
        except (*FAILURES, ValueError) as error:
            raise EngineError(str(error) or type(error).__name__) from error

    async def reads(self, url: str, *, seconds: float) -> str | None:
        """What a route answers within `seconds`; None when it does not, or refuses."""
        limit = aiohttp.ClientTimeout(total=seconds, sock_connect=seconds)
        try:
            async with self.session.get(url, timeout=limit) as response:
                return await response.text() if response.status == 200 else None
        except FAILURES:
            return None

    @staticmethod
    async def _open(key: str) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            # A connection that is kept may be closed by the server just when it is used again.
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
            headers={"Authorization": f"Bearer {key}"},
        )
