"""Strangers without a key cannot use up what the gateway needs: descriptors, memory, the loop."""

import asyncio
import resource
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import uvicorn

from tollbook.gateway.connections import BoundedConnection, max_client_connections
from tollbook.observability.server import SignallessServer, listen

OK = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


async def answer(_scope: Any, _receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@asynccontextmanager
async def serving(**limits: Any) -> AsyncGenerator[int]:
    limits = {"max_connections": 8, "head_timeout_s": 30.0, **limits}
    listening = listen("127.0.0.1", 0, setting="TEST")
    protocol: Any = partial(BoundedConnection, **limits)
    config = uvicorn.Config(answer, log_config=None, lifespan="off", ws="none", http=protocol)
    server = SignallessServer(config)
    with listening:
        task = asyncio.create_task(server.serve(sockets=[listening]))
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            await task


async def connect(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", port)


async def read_end(reader: asyncio.StreamReader) -> bytes:
    """Read until the connection is closed, by an end or a reset."""
    read = b""
    async with asyncio.timeout(10):
        try:
            while part := await reader.read(65_536):
                read += part
        except ConnectionResetError:
            pass
    return read


async def test_more_connections_than_the_limit_are_closed_and_those_within_it_are_served() -> None:
    async with serving(max_connections=3) as port:
        within = [await connect(port) for _ in range(3)]
        for reader, writer in within:  # The server has taken all three.
            writer.write(OK)
            assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
        more, _ = await connect(port)
        assert await read_end(more) == b""

        within[0][1].close()
        assert await read_end(within[0][0]) == b""
        for _ in range(100):  # Until the server has noticed the end.
            reader, writer = await connect(port)
            writer.write(OK)
            if await reader.read(4) == b"HTTP":
                return
    raise AssertionError("a connection that was closed still counts")


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: x\r\n"])
async def test_a_head_that_does_not_come_closes_the_connection(sent: bytes) -> None:
    async with serving(head_timeout_s=0.05) as port:
        reader, writer = await connect(port)
        writer.write(sent)
        assert await read_end(reader) == b""


async def test_a_second_head_that_does_not_come_closes_the_connection_too() -> None:
    async with serving(head_timeout_s=0.05) as port:
        reader, writer = await connect(port)
        writer.write(OK)
        assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
        writer.write(b"GET / HT")
        assert await read_end(reader) == b""


@pytest.mark.parametrize("begin", [b"GET / HTTP/1.1\r\nHost: x\r\nX: ", b"GET /", b"GET / HTTP/1.1\r\nX"])
async def test_an_endless_head_is_cut_off(begin: bytes) -> None:
    async with serving(max_head_bytes=64 * 1024) as port:
        reader, writer = await connect(port)
        reading = asyncio.create_task(read_end(reader))
        writer.write(begin)
        sent = 0
        try:
            while not reading.done() and sent < 50_000_000:
                writer.write(b"a" * 100_000)
                sent += 100_000
                await writer.drain()
        except ConnectionError:
            pass
        await reading
        assert sent < 10_000_000


async def test_a_long_body_does_not_count_as_a_head() -> None:
    async with serving(max_head_bytes=1_000) as port:
        reader, writer = await connect(port)
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5000000\r\n\r\n" + b"a" * 5_000_000 + OK)
        assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
        assert b"HTTP/1.1 200" in await reader.readuntil(b"ok")


def test_clients_leave_descriptors_for_redis_and_providers() -> None:
    open_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)

    assert 64 <= max_client_connections() <= max(64, open_files // 2)
