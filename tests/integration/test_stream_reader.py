"""Reading the ledger over a connection that falls silent."""

import pytest
from redis.asyncio import Redis

from tests.proxy import faulty_proxy
from tollbook.ledger import stream
from tollbook.ledger.errors import LedgerUnavailable
from tollbook.ledger.keys import Keys
from tollbook.ledger.server.connection import connect
from tollbook.ledger.stream import StreamReader


async def test_a_late_reply_is_not_taken_for_the_next_one(
    redis_client: Redis, server_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither as an empty ledger, nor as the answer to another command."""
    async with faulty_proxy(server_url) as proxy, connect(proxy.url) as client:
        reader = StreamReader(client, Keys())
        now_ms = await reader.now_ms()
        proxy.hold_replies()
        with monkeypatch.context() as patched:
            patched.setattr(stream, "_TIMEOUT_S", 0.0)
            with pytest.raises(LedgerUnavailable):
                await reader.read_after(count=1)
        proxy.let_replies_pass()
        assert await reader.now_ms() >= now_ms
        await reader.aclose()
