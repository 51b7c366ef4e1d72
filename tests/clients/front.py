"""A proxy between clients and the gateway: counts the requests of each scenario, and breaks a connection if told to.

The first two parts of a path name client and scenario; the rest is the gateway's.
"""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

import aiohttp
from aiohttp import web

BROKEN: Final = "retry"
"""Of this scenario, the first request's connection is broken while the provider works."""
_HOP_BY_HOP: Final = frozenset({"connection", "content-length", "host", "keep-alive", "transfer-encoding"})


@dataclass(frozen=True, slots=True)
class Seen:
    """One request of a client; status 0: its connection was broken."""

    path: str
    status: int


class Front:
    """A reverse proxy on the loopback interface; use it with `async with`."""

    def __init__(self, gateway_url: str, provider_asked: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """`provider_asked` waits until the provider has a request that it did not have when it was called."""
        self._gateway_url = gateway_url
        self._provider_asked = provider_asked
        self.seen: defaultdict[tuple[str, str], list[Seen]] = defaultdict(list)
        self.url = ""

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120), auto_decompress=False)
        app = web.Application(client_max_size=64 * 1024 * 1024)
        app.router.add_route("*", "/{client}/{scenario}/{path:.*}", self._pass_on)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._runner.cleanup()
        await self._session.close()

    async def _pass_on(self, request: web.Request) -> web.StreamResponse:
        client, scenario, path = (request.match_info[name] for name in ("client", "scenario", "path"))
        seen = self.seen[client, scenario]
        if scenario == BROKEN and not seen:
            seen.append(Seen(f"/{path}", 0))
            return await self._break(request, path)
        async with await self._ask(request, path) as reply:
            seen.append(Seen(f"/{path}", reply.status))
            headers = {name: value for name, value in reply.headers.items() if name.lower() not in _HOP_BY_HOP}
            answer = web.StreamResponse(status=reply.status, headers=headers)
            await answer.prepare(request)
            async for chunk in reply.content.iter_any():
                await answer.write(chunk)
            await answer.write_eof()
            return answer

    async def _break(self, request: web.Request, path: str) -> web.StreamResponse:
        """Leave the gateway once it has asked the provider, and break the client's connection."""
        asked = asyncio.create_task(self._provider_asked())
        asking = asyncio.create_task(self._ask(request, path))
        await asyncio.wait({asked, asking}, return_when=asyncio.FIRST_COMPLETED)
        for task in (asked, asking):
            task.cancel()
        await asyncio.gather(asked, asking, return_exceptions=True)
        if request.transport is not None:
            request.transport.abort()
        return web.Response(status=502)

    async def _ask(self, request: web.Request, path: str) -> aiohttp.ClientResponse:
        headers = [(name, value) for name, value in request.headers.items() if name.lower() not in _HOP_BY_HOP]
        body = await request.read()
        query = f"?{request.query_string}" if request.query_string else ""
        return await self._session.request(
            request.method, f"{self._gateway_url}/{path}{query}", headers=headers, data=body or None
        )
