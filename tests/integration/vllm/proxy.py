"""A server between the engine and a real vLLM that passes everything on, and spoils replies when it is told to."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import aiohttp
from aiohttp import web


class Proxy:
    """Passes requests for `target` on; `spoil` sees path and body of each reply, and gives the body that is sent."""

    def __init__(self, target: str) -> None:
        self.spoil: Callable[[str, bytes], bytes] = lambda path, body: body
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._up = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._up.wait(20), "the proxy did not start"

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._start())
        self._loop.run_forever()

    async def _start(self) -> None:
        application = web.Application(client_max_size=2**28)
        application.router.add_route("*", "/{path:.*}", self._pass_on)
        runner = web.AppRunner(application)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        assert site._server is not None
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
        self._up.set()

    async def _pass_on(self, request: web.Request) -> web.Response:
        keep = {name: value for name, value in request.headers.items() if name in ("Authorization", "Content-Type")}
        try:
            async with (
                aiohttp.ClientSession() as session,
                session.request(
                    request.method, self._target + request.path_qs, data=await request.read(), headers=keep
                ) as reply,
            ):
                body = self.spoil(request.path, await reply.read())
                return web.Response(status=reply.status, body=body, content_type="application/json")
        except aiohttp.ClientError as error:
            return web.Response(status=502, text=str(error))
