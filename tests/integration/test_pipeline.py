"""Commands of many tasks over one connection: batches, errors of one, lost connections."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from tests.loop_clock import LoopClock
from tests.proxy import FaultyProxy, faulty_proxy
from tollbook.ledger.errors import LedgerUnavailable, RedisCannotServe
from tollbook.ledger.server.connection import connect
from tollbook.ledger.server.embedded import EmbeddedServer
from tollbook.ledger.server.pipeline import CommandPipeline


@pytest.fixture
async def proxy(redis_client: Redis, server_url: str) -> AsyncIterator[FaultyProxy]:
    async with faulty_proxy(server_url) as proxy:
        yield proxy


@pytest.fixture
async def pipeline(proxy: FaultyProxy) -> AsyncIterator[CommandPipeline]:
    async with connect(proxy.url) as client:
        pipeline = CommandPipeline(client)
        await pipeline.execute("PING")
        proxy.sent.clear()
        yield pipeline
        await pipeline.aclose()


def _start(pipeline: CommandPipeline, *command: str | int) -> asyncio.Task[Any]:
    return asyncio.create_task(pipeline.execute(*command))


async def test_commands_issued_together_travel_together(pipeline: CommandPipeline, proxy: FaultyProxy) -> None:
    replies = await asyncio.gather(*(pipeline.execute("INCR", "n") for _ in range(100)))
    assert replies == list(range(1, 101))
    assert len(proxy.sent) == 1


async def test_commands_gather_while_a_batch_is_on_its_way(pipeline: CommandPipeline, proxy: FaultyProxy) -> None:
    proxy.hold_replies()
    first = _start(pipeline, "ECHO", "first")
    await proxy.next_chunk()
    later = [_start(pipeline, "ECHO", number) for number in range(50)]
    await asyncio.sleep(0)
    assert len(proxy.sent) == 1
    proxy.let_replies_pass()
    assert await first == b"first"
    assert await asyncio.gather(*later) == [str(number).encode() for number in range(50)]
    assert len(proxy.sent) == 2


async def test_more_commands_than_a_batch_takes_are_all_answered(pipeline: CommandPipeline) -> None:
    replies = await asyncio.gather(*(pipeline.execute("ECHO", number) for number in range(2_000)))
    assert replies == [str(number).encode() for number in range(2_000)]


async def test_the_error_of_one_command_is_its_own(pipeline: CommandPipeline) -> None:
    replies = await asyncio.gather(
        pipeline.execute("SET", "text", "x"),
        pipeline.execute("INCR", "text"),
        pipeline.execute("NO-SUCH-COMMAND"),
        pipeline.execute("GET", "text"),
        return_exceptions=True,
    )
    assert [type(reply) for reply in replies] == [bytes, ResponseError, ResponseError, bytes]
    assert replies[3] == b"x"


async def test_an_argument_that_cannot_be_sent_fails_its_own_command_only(pipeline: CommandPipeline) -> None:
    wrong: Any = None
    replies = await asyncio.gather(
        pipeline.execute("ECHO", "before"),
        pipeline.execute("ECHO", wrong),
        pipeline.execute("ECHO", "after"),
        return_exceptions=True,
    )
    assert [replies[0], replies[2]] == [b"before", b"after"]
    assert isinstance(replies[1], Exception)
    assert not isinstance(replies[1], LedgerUnavailable)


async def test_a_lost_reply_is_an_unknown_outcome_and_nothing_is_sent_twice(
    pipeline: CommandPipeline, proxy: FaultyProxy, redis_client: Redis
) -> None:
    proxy.loses_replies = True
    replies = await asyncio.gather(pipeline.execute("INCR", "n"), pipeline.execute("INCR", "n"), return_exceptions=True)
    assert all(isinstance(reply, LedgerUnavailable) for reply in replies)
    assert await redis_client.get("n") == b"2"
    proxy.loses_replies = False
    assert await pipeline.execute("INCR", "n") == 3


async def test_commands_work_again_after_the_server_was_away(pipeline: CommandPipeline, proxy: FaultyProxy) -> None:
    await proxy.stop()
    for _ in range(2):
        with pytest.raises(LedgerUnavailable, match="Redis did not answer"):
            await pipeline.execute("PING")
    await proxy.start()
    assert await pipeline.execute("PING") == b"PONG"


async def test_commands_that_wait_behind_a_lost_batch_are_sent_on_a_new_connection(
    pipeline: CommandPipeline, proxy: FaultyProxy
) -> None:
    proxy.hold_replies()
    lost = _start(pipeline, "ECHO", "lost")
    await proxy.next_chunk()
    behind = _start(pipeline, "ECHO", "behind")
    await asyncio.sleep(0)
    proxy.break_connections()
    proxy.let_replies_pass()
    with pytest.raises(LedgerUnavailable):
        await lost
    assert await behind == b"behind"


async def test_a_cancelled_command_takes_no_other_commands_reply(
    pipeline: CommandPipeline, proxy: FaultyProxy, redis_client: Redis
) -> None:
    proxy.hold_replies()
    tasks = [_start(pipeline, "INCR", "n") for _ in range(3)]
    await proxy.next_chunk()
    tasks[1].cancel()
    queued = [_start(pipeline, "INCR", "n") for _ in range(2)]
    await asyncio.sleep(0)
    queued[0].cancel()
    proxy.let_replies_pass()
    assert await asyncio.gather(tasks[0], tasks[2], queued[1]) == [1, 3, 5]
    assert all(task.cancelled() for task in (tasks[1], queued[0]))
    assert await redis_client.get("n") == b"5", "a command that was issued is sent although nobody waits"


async def test_a_server_that_does_not_answer_in_time_is_given_up(proxy: FaultyProxy, loop_clock: LoopClock) -> None:
    async with connect(proxy.url) as client:
        pipeline = CommandPipeline(client, timeout_s=600)
        await pipeline.execute("PING")
        proxy.hold_replies()
        late = _start(pipeline, "ECHO", "late")
        await proxy.next_chunk()
        loop_clock.advance(601)
        with pytest.raises(LedgerUnavailable, match="TimeoutError"):
            await late
        proxy.let_replies_pass()
        # The late reply must not be taken for this one's.
        assert await pipeline.execute("ECHO", "next") == b"next"
        await pipeline.aclose()


async def test_what_is_queued_is_sent_before_the_end(pipeline: CommandPipeline, redis_client: Redis) -> None:
    tasks = [_start(pipeline, "INCR", "n") for _ in range(5)]
    await asyncio.sleep(0)
    await pipeline.aclose()
    assert await asyncio.gather(*tasks) == [1, 2, 3, 4, 5]
    with pytest.raises(LedgerUnavailable, match="closed"):
        await pipeline.execute("INCR", "n")
    assert await redis_client.get("n") == b"5"


async def test_a_server_whose_memory_is_full_keeps_its_connection(private_server: EmbeddedServer) -> None:
    """G8: nothing was done, and the caller may try again."""
    async with connect(private_server.url) as client:
        pipeline = CommandPipeline(client)
        number = await pipeline.execute("CLIENT", "ID")
        await pipeline.execute("CONFIG", "SET", "maxmemory", "1")
        with pytest.raises(RedisCannotServe, match="Redis cannot serve now: its memory is used up: raise maxmemory"):
            await pipeline.execute("SET", "a", "b")
        assert await pipeline.execute("CLIENT", "ID") == number
        await pipeline.aclose()


async def test_a_connection_to_a_new_replica_is_closed_and_its_address_resolved_again(
    private_server: EmbeddedServer,
) -> None:
    """G8: nothing was done; after a failover the address leads to the promoted server."""
    async with connect(private_server.url) as client, client.pubsub() as listening:
        pipeline = CommandPipeline(client)
        await listening.subscribe("channel")
        await listening.get_message(timeout=5)
        number = await pipeline.execute("CLIENT", "ID")
        await pipeline.execute("REPLICAOF", "127.0.0.1", "1")
        waiting = asyncio.create_task(listening.get_message(timeout=None))
        await asyncio.sleep(0)
        with pytest.raises(RedisCannotServe, match="Redis cannot serve now: it is a read-only replica"):
            await pipeline.execute("SET", "a", "b")
        assert await pipeline.execute("CLIENT", "ID") > number
        with pytest.raises(RedisConnectionError):
            await waiting
        await pipeline.aclose()


async def test_an_error_of_the_client_reaches_the_waiting_caller(redis_client: Redis, server_url: str) -> None:
    """Nobody is cancelled for it."""
    async with connect(server_url) as client:
        client.connection_pool.connection_kwargs["no_such_option"] = True
        pipeline = CommandPipeline(client)
        with pytest.raises(LedgerUnavailable, match="TypeError"):
            await pipeline.execute("PING")
        await pipeline.aclose()


async def test_closing_does_not_wait_for_answers(proxy: FaultyProxy) -> None:
    async with connect(proxy.url) as client:
        pipeline = CommandPipeline(client)
        await pipeline.execute("PING")
        proxy.hold_replies()
        asked = asyncio.create_task(pipeline.execute("PING"))
        await proxy.next_chunk()
        pipeline.end_within(0.01)
        for asking in (asked, pipeline.execute("PING")):
            with pytest.raises(LedgerUnavailable):
                await asking
        proxy.let_replies_pass()
        await pipeline.aclose()
