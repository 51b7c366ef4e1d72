"""Which server to ask: the one that has a key, or every primary. On one server, that is always the same.

For what sends its commands in another way than over a client's methods or a CommandPipeline.
"""

from collections.abc import Sequence
from typing import Any, cast

from redis.asyncio import Redis
from redis.exceptions import AskError

from tollbook.ledger.server.cluster import Address, Cluster
from tollbook.ledger.server.connection import ServerClient, time_ms
from tollbook.ledger.server.slots import Command, slot_of


async def cluster_of(redis: Redis) -> Cluster | None:
    """Return the cluster that a client speaks to; None for one server. Errors: RedisError; LedgerUnavailable."""
    return await redis.cluster() if isinstance(redis, ServerClient) else None


async def server_of(redis: Redis, key: str) -> Redis:
    """Return a client of the server that has a key. Errors: RedisError; LedgerUnavailable."""
    cluster = await cluster_of(redis)
    return redis if cluster is None else cluster.client(await cluster.place_of(slot_of(key)))


async def primaries(redis: Redis) -> list[Redis]:
    """Return a client of each server that takes writes. Errors: RedisError; LedgerUnavailable."""
    cluster = await cluster_of(redis)
    return [redis] if cluster is None else [cluster.client(address) for address in await cluster.primaries()]


def note_problem(redis: Redis, problem: Exception) -> None:
    """Take note of what a server of `server_of` has answered, or that it did not, so that the next one is right."""
    if isinstance(redis, ServerClient):
        redis.note_problem(problem)


def place_of(server: Redis) -> str:
    """Return where a server is reached, without password."""
    options = server.connection_pool.connection_kwargs
    return str(options["path"]) if "path" in options else str(Address(options["host"], options["port"]))


async def clock_ms(redis: Redis, key: str) -> int:
    """Return the time in milliseconds, by the clock of the server that has a key. Errors: RedisError; OSError."""
    server: Any = await server_of(redis, key)
    return time_ms(await server.time())


async def read_together(redis: Redis, key: str, commands: Sequence[Command], *, is_one_moment: bool) -> list[Any]:
    """Send commands that only read, all at the server that has `key`, and return each reply or error.

    With `is_one_moment`, nothing is written between them. Errors: RedisError; OSError; LedgerUnavailable.
    """

    async def read(client: Redis) -> list[Any]:
        pipe = client.pipeline(transaction=is_one_moment)
        for command in commands:
            pipe.execute_command(*command)  # pyright: ignore[reportUnknownMemberType]
        return await pipe.execute(raise_on_error=False)

    async def send(address: Address, _: bool) -> list[Any]:
        replies = await read(cast("Cluster", cluster).client(address))
        # Where a key has moved, all are read again.
        if (moved := next((each for each in replies if isinstance(each, AskError)), None)) is not None:
            raise moved
        return replies

    cluster = await cluster_of(redis)
    return await read(redis) if cluster is None else await cluster.follow(("GET", key), send)


def all_good(replies: list[Any]) -> list[Any]:
    """Return replies that hold no error. Errors: the first one among them."""
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    return replies
