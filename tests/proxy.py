"""A TCP proxy in front of a real server. It makes connection faults: replies that are delayed, held back or lost."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from urllib.parse import urlsplit

from tests.servers import PATIENCE_S


class FaultyProxy:
    """`sent` has the chunks that clients sent. A fault lasts until the test ends it."""

    def __init__(self, upstream: str) -> None:
        target = urlsplit(upstream)
        self._host, self._port = target.hostname or "127.0.0.1", target.port or 6379
        self._password = f"{target.username}:{target.password}@" if target.password else ""
        self._server: asyncio.Server | None = None
        self._replies_may_pass = asyncio.Event()
        self._replies_may_pass.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._own_port = 0
        self.sent: list[bytes] = []
        self.received = asyncio.Event()
        self.loses_replies = False
        self.delay_s = 0.0
        """Delay of everything, in both directions, as over a long line."""
        self.holds_replies_to: bytes | None = None
        """From the command with this text on, replies are held."""

    @property
    def url(self) -> str:
        return f"redis://{self._password}127.0.0.1:{self._own_port}/0"

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._own_port)
        self._own_port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Refuse connections and break those there are."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self.break_connections()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def move_to(self, upstream: str) -> None:
        """Connect new connections to another server, as when an address moves; open ones stay."""
        target = urlsplit(upstream)
        self._host, self._port = target.hostname or "127.0.0.1", target.port or 6379

    def break_connections(self) -> None:
        for writer in list(self._writers):
            writer.close()
        self._writers.clear()

    def hold_replies(self) -> None:
        self._replies_may_pass.clear()

    def let_replies_pass(self) -> None:
        self._replies_may_pass.set()

    async def next_chunk(self) -> None:
        """Wait until a client sends something."""
        self.received.clear()
        await asyncio.wait_for(self.received.wait(), PATIENCE_S)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        with suppress(OSError):
            server_reader, server_writer = await asyncio.open_connection(self._host, self._port)
            self._writers |= {writer, server_writer}
            # A side that leaves something unread resets its connection, which ends the forwarding with an error. Then
            # the other side must be closed too, or the server keeps a client that is gone.
            await asyncio.gather(
                _closing(server_writer, self._forward_commands(reader, server_writer)),
                _closing(writer, self._forward_replies(server_reader, writer)),
                return_exceptions=True,
            )
        self._tasks.discard(task)

    async def _forward_commands(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(2**20):
            if self.holds_replies_to is not None and self.holds_replies_to in chunk:
                self.holds_replies_to = None
                self.hold_replies()
            self._pass_on(writer, chunk)
            self.sent.append(chunk)
            self.received.set()

    async def _forward_replies(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(2**20):
            await self._replies_may_pass.wait()
            if self.loses_replies:
                break
            self._pass_on(writer, chunk)

    def _pass_on(self, writer: asyncio.StreamWriter, chunk: bytes) -> None:
        if self.delay_s:
            asyncio.get_running_loop().call_later(self.delay_s, writer.write, chunk)
        else:
            writer.write(chunk)


async def _closing(writer: asyncio.StreamWriter, forwarding: Awaitable[None]) -> None:
    try:
        await forwarding
    finally:
        writer.close()


@asynccontextmanager
async def faulty_proxy(upstream: str) -> AsyncIterator[FaultyProxy]:
    proxy = FaultyProxy(upstream)
    await proxy.start()
    try:
        yield proxy
    finally:
        proxy.let_replies_pass()
        await proxy.stop()
