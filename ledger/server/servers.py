"""Chooses the server for a command: the node that has a key, or every primary. Without a cluster, there is only one.

For code that sends commands in another way than with a client's methods or a CommandPipeline.
"""

from collections.abc import Sequence
from typing import Any, cast

from redis.asyncio import Redis
from redis.exceptions import AskError

from tollbook.ledger.server.cluster import Address, Cluster
from tollbook.ledger.server.connection import ServerClient, time_ms
from tollbook.ledger.server.slots import Command, slot_of


async def cluster_of(redis: Redis) -> Cluster | None:
    """Return a client's cluster; None for one server. Errors: RedisError; LedgerUnavailable."""
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
    """Report an error of a server from `server_of`, so that the next call finds the right server."""
    if isinstance(redis, ServerClient):
        redis.note_problem(problem)


def place_of(server: Redis) -> str:
    """Return the address or socket of a server, without password."""
    options = server.connection_pool.connection_kwargs
    return str(options["path"]) if "path" in options else str(Address(options["host"], options["port"]))


async def clock_ms(redis: Redis, key: str) -> int:
    """Return the time in milliseconds, by the clock of the server that has a key. Errors: RedisError; OSError."""
    server: Any = await server_of(redis, key)
    return time_ms(await server.time())


async def read_together(redis: Redis, key: str, commands: Sequence[Command], *, is_one_moment: bool) -> list[Any]:
    """Send read-only commands to the server that has `key`, and return each reply or error.

    With `is_one_moment`, nothing is written between them. Errors: RedisError; OSError; LedgerUnavailable.
    """

    async def read(client: Redis) -> list[Any]:
        pipe = client.pipeline(transaction=is_one_moment)
        for command in commands:
            pipe.execute_command(*command)  # pyright: ignore[reportUnknownMemberType]
        return await pipe.execute(raise_on_error=False)

    async def send(address: Address, _: bool) -> list[Any]:
        replies = await read(cast("Cluster", cluster).client(address))
        # If a key has moved, all commands are sent again.
        if (moved := next((each for each in replies if isinstance(each, AskError)), None)) is not None:
            raise moved
        return replies

    cluster = await cluster_of(redis)
    return await read(redis) if cluster is None else await cluster.follow(("GET", key), send)


def all_good(replies: list[Any]) -> list[Any]:
    """Return the replies if none is an error. Errors: the first error among them."""
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    return replies
