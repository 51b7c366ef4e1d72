"""A border around one worker process: everything that it says to Redis and to the provider passes here.

At a moment that a test names by the bytes that pass, the border closes: nothing passes in either
direction, on any connection. A worker that is killed then is dead at exactly that moment, as far as
anybody else can see; one behind a border that is opened again was only slow.
"""

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, Self
from urllib.parse import urlsplit

from tests.servers import PATIENCE_S


@dataclass(frozen=True, slots=True)
class Moment:
    """When the border closes: at the first request with these bytes in it, or right behind that request.

    "before": the request does not pass. "after": it passes, and its reply does not. `number` counts such requests.
    """

    side: Literal["before", "after"]
    said: bytes
    number: int = 1


class Border:
    """Two proxies, before Redis and before the provider, that open and close together."""

    def __init__(self, redis_url: str, provider_url: str, moment: Moment) -> None:
        self.reached = asyncio.Event()
        self._moment = moment
        self._seen = 0
        self._upstreams = {"redis": urlsplit(redis_url), "provider": urlsplit(provider_url)}
        self._servers: dict[str, asyncio.Server] = {}
        self._may_pass = asyncio.Event()
        self._may_pass.set()
        self._links: set[asyncio.Task[None]] = set()

    @property
    def redis_url(self) -> str:
        """Where the worker finds Redis."""
        return self._url("redis")

    @property
    def provider_url(self) -> str:
        """Where the worker finds the provider."""
        return self._url("provider")

    async def __aenter__(self) -> Self:
        for name, upstream in self._upstreams.items():

            async def serve(
                reader: asyncio.StreamReader,
                writer: asyncio.StreamWriter,
                host: str = upstream.hostname or "",
                port: int = upstream.port or 0,
            ) -> None:
                await self._link(reader, writer, host, port)

            self._servers[name] = await asyncio.start_server(serve, "127.0.0.1")
        return self

    async def __aexit__(self, *_: object) -> None:
        for server in self._servers.values():
            server.close()
        await self.cut()

    async def is_reached(self) -> None:
        """Return once the border has closed."""
        async with asyncio.timeout(PATIENCE_S):
            await self.reached.wait()

    def open(self) -> None:
        """Let pass what waits, and everything from now on."""
        self._may_pass.set()

    async def cut(self) -> None:
        """Break all connections; what waits at the border never passes."""
        links = list(self._links)
        for link in links:
            link.cancel()
        await asyncio.gather(*links, return_exceptions=True)

    def _url(self, name: str) -> str:
        port = self._servers[name].sockets[0].getsockname()[1]
        user, at, _ = self._upstreams[name].netloc.rpartition("@")
        return self._upstreams[name]._replace(netloc=f"{user}{at}127.0.0.1:{port}").geturl()

    async def _link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str, port: int) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._links.add(task)
        # A link that is cut or broken has nobody to tell.
        with suppress(OSError, asyncio.CancelledError):
            upstream_reader, upstream_writer = await asyncio.open_connection(host, port)
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._pass(reader, upstream_writer, is_request=True))
                    group.create_task(self._pass(upstream_reader, writer, is_request=False))
            finally:
                upstream_writer.transport.abort()
        writer.transport.abort()
        self._links.discard(task)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_request: bool) -> None:
        with suppress(OSError):
            while chunk := await reader.read(2**20):
                is_the_moment = is_request and self._is_the_moment(chunk)
                if is_the_moment and self._moment.side == "before":
                    self._close()
                await self._may_pass.wait()
                writer.write(chunk)
                if is_the_moment and self._moment.side == "after":
                    self._close()
            writer.close()

    def _is_the_moment(self, chunk: bytes) -> bool:
        if self.reached.is_set() or self._moment.said not in chunk:
            return False
        self._seen += 1
        return self._seen == self._moment.number

    def _close(self) -> None:
        self._may_pass.clear()
        self.reached.set()
