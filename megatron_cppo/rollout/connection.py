"""HTTP to vLLM servers: a thread with an event loop, on the rank that drives, and what one call may take.

Owns the connections and their time limits; knows neither what is asked nor what a failed call means (`fleet`).
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import threading
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp

from megatron_cppo.rollout.engine import EngineError

CALL_SECONDS = 600.0
"""For a call that moves or loads; not for one that generates."""
CONNECT_SECONDS = 10.0
FAILURES = (TimeoutError, aiohttp.ClientError, OSError)
"""What a server that is gone, slow or confused looks like."""
Result = TypeVar("Result")


class KeyRefusedError(EngineError):
    """A server does not take the run's key: it is another's, or was given another one."""


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

    async def call(
        self,
        url: str,
        *,
        method: str,
        body: Any = None,
        query: Mapping[str, str] | None = None,
        seconds: float = CALL_SECONDS,
    ) -> Any:
        """The JSON that a route answers, None for an empty answer. Raises EngineError for anything else."""
        limit = aiohttp.ClientTimeout(total=seconds, sock_connect=CONNECT_SECONDS)
        try:
            async with self.session.request(method, url, json=body, params=query, timeout=limit) as response:
                text = await response.text()
                if response.status in (401, 403):
                    raise KeyRefusedError(f"it answered {response.status}: {text[:500]}")
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


def listen_towards(urls: Sequence[str]) -> socket.socket:
    """A socket on the interface from which this machine reaches the servers, and on no other.

    Raises EngineError when one cannot be reached, or when some run on this machine's loopback and some elsewhere.
    """
    mine = {}
    for url in urls:
        parts = urlsplit(url)
        try:
            family, kind, _, _, place = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind) as probe:  # connecting such a socket sends nothing
                probe.connect(place)
                mine[url] = probe.getsockname()[0]
        except OSError as error:
            raise EngineError(
                f"vllm.addresses: {url} cannot be reached ({error}); give the servers' addresses"
            ) from error
    if len({ipaddress.ip_address(address).is_loopback for address in mine.values()}) > 1:
        near = [url for url, address in mine.items() if ipaddress.ip_address(address).is_loopback]
        raise EngineError(
            f"vllm.addresses: {', '.join(near)} is on this machine's loopback, and others are not; name it by the "
            "machine's own address"
        )
    address = next(iter(mine.values()))
    return socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
