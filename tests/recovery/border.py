"""A border around one worker process: everything that it says to Redis and to the provider passes here.

Where Redis is several servers, they tell the worker of each other. So their replies are changed on the way: for each
server's port, they have that of its proxy.

At a moment that a test names by the bytes that pass, the border closes: nothing passes in either
direction, on any connection. For all others, a worker that is killed then has died at exactly that
moment; a worker whose border is opened again was only slow.
"""

import asyncio
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal, Self

from tests.deployments import ports_in
from tests.servers import PATIENCE_S

# A port in CLUSTER SLOTS and in MOVED or ASK; in what a Sentinel answers.
_PORT: Final = re.compile(rb"(?<=:)\d{5}(?=\r\n)|(?<=\r\n\$5\r\n)\d{5}(?=\r\n)")


@dataclass(frozen=True, slots=True)
class Moment:
    """When the border closes: at the first request with these bytes in it, or right behind that request.

    "before": the request does not pass. "after": it passes, and its reply does not. `number` counts such requests.
    """

    side: Literal["before", "after"]
    said: bytes
    number: int = 1


class Border:
    """Proxies, before the servers of Redis and before the provider, that open and close together."""

    def __init__(self, redis_url: str, provider_url: str, moment: Moment, ports: Sequence[int] = ()) -> None:
        """`ports`: of further servers, of which those of `redis_url` tell."""
        self.reached = asyncio.Event()
        self._redis_url = redis_url
        self._provider_url = provider_url
        self._moment = moment
        self._seen = 0
        self._upstreams = {*ports_in(redis_url), *ports_in(provider_url), *ports}
        self._servers: dict[int, asyncio.Server] = {}
        self._proxies: dict[bytes, bytes] = {}
        self._may_pass = asyncio.Event()
        self._may_pass.set()
        self._links: set[asyncio.Task[None]] = set()

    @property
    def redis_url(self) -> str:
        """Where the worker finds Redis."""
        return self._by_proxies(self._redis_url)

    @property
    def provider_url(self) -> str:
        """Where the worker finds the provider."""
        return self._by_proxies(self._provider_url)

    async def __aenter__(self) -> Self:
        for port in self._upstreams:
            server = await asyncio.start_server(partial(self._link, port=port), "127.0.0.1")
            self._servers[port] = server
            self._proxies[b"%d" % port] = b"%d" % server.sockets[0].getsockname()[1]
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
        """Open the border: pass on what waits, and everything from now on."""
        self._may_pass.set()

    async def cut(self) -> None:
        """Break all connections; what waits at the border never passes."""
        links = list(self._links)
        for link in links:
            link.cancel()
        await asyncio.gather(*links, return_exceptions=True)

    def _by_proxies(self, url: str) -> str:
        for port, proxy in self._proxies.items():
            url = url.replace(f":{port.decode()}", f":{proxy.decode()}")
        return url

    async def _link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._links.add(task)
        # A link that is cut or broken has no receiver.
        with suppress(OSError, asyncio.CancelledError):
            upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", port)
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
                writer.write(chunk if is_request else _PORT.sub(self._proxy_of, chunk))
                if is_the_moment and self._moment.side == "after":
                    self._close()
            writer.close()

    def _proxy_of(self, found: re.Match[bytes]) -> bytes:
        return self._proxies.get(found[0], found[0])

    def _is_the_moment(self, chunk: bytes) -> bool:
        if self.reached.is_set() or self._moment.said not in chunk:
            return False
        self._seen += 1
        return self._seen == self._moment.number

    def _close(self) -> None:
        self._may_pass.clear()
        self.reached.set()
