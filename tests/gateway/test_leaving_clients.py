"""Clients that leave, stop reading, or send without end: nothing stays behind or grows without a limit."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import httpx
import pytest
from redis.asyncio import Redis

from tests.gateway.serving import KEY, MODEL, Served, open_served
from tests.servers import PATIENCE_S, wait_until

pytestmark = pytest.mark.slow

PATH: Final = "/v1/chat/completions"
RETRY: Final = "x-stainless-retry-count"


@pytest.fixture
async def served(redis_client: Redis, server_url: str, tmp_path: Path) -> AsyncIterator[Served]:
    async with open_served(server_url, tmp_path, attempt_timeout_s=20) as served:
        yield served
        await wait_until(lambda: served.gateway.calls.under_way == 0)
        await served.calling.check_guarantees()


def body_of(content: str = "Hello", **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], **fields}


def request_bytes(body: bytes, *, headers: str = "") -> bytes:
    head = f"POST {PATH} HTTP/1.1\r\nhost: g\r\nauthorization: Bearer {KEY}\r\ncontent-length: {len(body)}\r\n{headers}"
    return head.encode() + b"\r\n" + body


@asynccontextmanager
async def connected(served: Served) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Connect with little room for what is not read."""
    address = urlsplit(served.gateway.url)
    with socket.socket() as link:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        link.setblocking(False)
        await asyncio.get_running_loop().sock_connect(link, (address.hostname, address.port))
        reader, writer = await asyncio.open_connection(sock=link, limit=1_024)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()


async def rest_of(reader: asyncio.StreamReader) -> bytes:
    """Read until the connection ends, in whichever way."""
    found = b""
    async with asyncio.timeout(PATIENCE_S):
        with contextlib.suppress(ConnectionError):
            while chunk := await reader.read(2**16):
                found += chunk
    return found


async def test_a_client_that_leaves_in_mid_body_is_not_an_internal_error(served: Served) -> None:
    whole = request_bytes(json.dumps(body_of()).encode())
    async with connected(served) as (_, writer):
        writer.write(whole[:-20])
        await writer.drain()

    counts = served.gateway.counts.requests
    await wait_until(counts.total, what="the end of the request")
    assert dict(counts) == {499: 1}
    assert served.calling.provider.requests == 0


async def test_a_client_that_never_reads_is_cut_off_at_the_limit(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    """Its call ends and its hold is settled; what it left unread takes no memory, then or later."""
    async with open_served(server_url, tmp_path, attempt_timeout_s=20, gateway_timeout_s=6) as served:
        served.calling.provider.config = replace(served.calling.provider.config, chunk_ms=0)
        body = json.dumps(body_of("Hello [[completion_tokens=20000]]", max_tokens=30_000, stream=True)).encode()
        async with connected(served) as (reader, writer):
            writer.write(request_bytes(body))
            await wait_until(lambda: served.gateway.calls.under_way == 1)
            [call] = served.gateway.calls.running
            await wait_until(lambda: call.unread > 0, what="deltas that nobody reads")
            await wait_until(lambda: served.gateway.calls.under_way == 0, what="the end at the limit")
            assert call.unread <= 16 + 1, "deltas, and the end"
            await wait_until(lambda: served.gateway.counts.requests.total() == 1, what="the end of the request")
            assert b"[DONE]" not in await rest_of(reader)
        await served.calling.check_guarantees()


async def test_clients_that_leave_while_they_wait_for_holds_leave_nothing_behind(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    """Neither a hold nor a waiting call is left, and no call is made for them once there is money again (G2)."""
    limits = httpx.Limits(max_connections=None)
    async with (
        open_served(server_url, tmp_path, attempt_timeout_s=30, gateway_wait_s=60) as served,
        httpx.AsyncClient(
            base_url=served.gateway.url, headers=served.client.headers, limits=limits, timeout=60
        ) as many,
    ):
        await served.calling.set_cap(150_000)
        served.calling.script("stream_hang")
        async with served.client.stream("POST", PATH, json=body_of(stream=True, max_tokens=200)) as first:
            begun = first.aiter_bytes()
            await anext(begun)
            asking = [
                asyncio.create_task(many.post(PATH, json=body_of(f"{n}", stream=n % 2 == 0, max_tokens=200), headers=h))
                for n in range(200)
                for h in [{} if n % 3 else {RETRY: "0"}]
            ]
            await wait_until(lambda: served.runtime.reservations.waiting == 200, what="200 waiting calls")
            for each in asking:
                each.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
            await wait_until(lambda: served.runtime.reservations.waiting == 0, what="that nobody waits any more")
            await wait_until(lambda: served.gateway.calls.under_way == 1, what="the end of their calls")
        await wait_until(lambda: served.gateway.calls.under_way == 0)
        assert served.calling.provider.requests == 1
        keys = served.runtime.handle.keys[0]
        assert await redis_client.zcard(keys.holds) == 0
        assert await redis_client.hlen(keys.waiters) == 0
        await served.calling.check_guarantees()


@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "streamed"])
async def test_an_answer_that_was_delivered_is_not_joined(served: Served, is_streamed: bool) -> None:
    first = await served.chat("Hello", stream=is_streamed, headers={RETRY: "0"})
    other = await served.chat("Hello", stream=is_streamed, headers={RETRY: "1"})

    assert first.headers["x-tollbook-call-id"] != other.headers["x-tollbook-call-id"]
    assert served.calling.provider.requests == 2


async def test_a_retry_with_the_clients_own_key_is_not_paid_twice_where_the_first_stream_left_early(
    served: Served,
) -> None:
    """The call of the first request goes on, since the second request waits for it."""
    served.calling.provider.config = replace(served.calling.provider.config, slow_ms=300)
    served.calling.script("slow")
    headers = {"idempotency-key": "a"}
    first = asyncio.create_task(served.chat(stream=True, headers=headers))
    await wait_until(lambda: served.calling.provider.requests == 1)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)

    again = await served.chat(stream=True, headers=headers)

    assert again.status_code == 200
    assert served.calling.provider.requests == 1


@pytest.mark.parametrize("number", [1, 100], ids=["one long header", "many headers"])
async def test_a_head_without_end_is_refused(served: Served, number: int) -> None:
    """The parser itself has no limit."""
    line = b"x" * (2**21 // number)
    async with connected(served) as (reader, writer):
        writer.write(b"GET /v1/models HTTP/1.1\r\nhost: g\r\n")
        try:
            for each in range(number):
                writer.write(b"x-%d: " % each + line + b"\r\n")
                await writer.drain()
        except ConnectionError:
            pass  # It was refused before it was all sent.
        assert b" 200 " not in await rest_of(reader)
    assert not served.gateway.counts.requests


async def test_long_headers_within_the_limit_are_accepted(served: Served) -> None:
    reply = await served.chat(headers={"x-own": "x" * 30_000})

    assert reply.status_code == 200


async def test_bodies_are_taken_up_to_the_limit_and_refused_beyond(served: Served) -> None:
    """Also where a body does not say how long it is."""
    limit = 32 * 1024 * 1024
    text = json.dumps(body_of()).encode()

    async def chunks(size: int) -> AsyncIterator[bytes]:
        yield text
        for begin in range(len(text), size, 2**20):
            yield b" " * min(2**20, size - begin)

    within = await served.client.post(PATH, content=chunks(limit))
    beyond = await served.client.post(PATH, content=chunks(limit + 1))

    assert within.status_code == 200
    assert (beyond.status_code, beyond.json()["error"]["code"]) == (413, "request_too_large")
