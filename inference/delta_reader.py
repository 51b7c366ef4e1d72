"""Reading along: what a worker has appended of a task's answer, in order, then the result."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Final, cast

from redis.asyncio import Redis

from tollbook.inference.errors import ResultTimeout
from tollbook.inference.task_deltas import TaskUpdate, read_entry
from tollbook.ledger.results import Results
from tollbook.ledger.server.servers import cluster_of

_LOOK_AGAIN_MS: Final = 1_000
"""A task may have no stream, or end without saying so in it: the result is looked for this often."""
_MAX_ENTRIES: Final = 500


async def read_along(
    redis: Redis, results: Results, keys: Sequence[str], task_id: str, *, timeout_s: float | None = None
) -> AsyncGenerator[TaskUpdate, None]:
    """Yield the updates of a task from its begin on, the last with its result; `keys` are where its stream may be.

    Errors: those of Redis; ResultUnreadable; ResultTimeout where the result is not there after `timeout_s`.
    """
    clock = asyncio.get_running_loop().time
    until_s = None if timeout_s is None else clock() + timeout_s
    places = dict.fromkeys(keys, b"0-0")
    is_ended = False
    while True:
        # Before the entries: where there is a result, all entries are there too.
        result = await results.get(task_id)
        if result is None and is_ended:
            await asyncio.sleep(_LOOK_AGAIN_MS / 1000)  # It is stored before the end, so this one is another task's.
        while entries := await _next_entries(redis, places, waits=result is None and not is_ended):
            for fields in entries:
                is_ended = is_ended or b"end" in fields
                update = read_entry(fields)
                if update is not None:
                    yield update
        if result is not None:
            yield TaskUpdate(kind="result", result=result)
            return
        if until_s is not None and timeout_s is not None and clock() >= until_s:
            raise ResultTimeout(task_id, timeout_s)


async def _next_entries(redis: Redis, places: dict[str, bytes], *, waits: bool) -> list[dict[bytes, bytes]]:
    """Return the entries that follow, and go on behind them; where there are none, wait a little."""
    block = {"block": _LOOK_AGAIN_MS} if waits else {}
    entries: list[dict[bytes, bytes]] = []
    for key, listed in await _read(redis, places, block):
        for entry_id, fields in listed:
            places[key.decode()] = entry_id
            entries.append(fields)
    return entries


async def _read(redis: Redis, places: dict[str, bytes], block: dict[str, int]) -> list[Any]:
    async def read(some: dict[str, bytes]) -> list[Any]:
        return list(await redis.xread(cast("Any", some), count=_MAX_ENTRIES, **block) or ())

    if len(places) == 1 or await cluster_of(redis) is None:
        return await read(places)
    # The streams are at several nodes, and the task is in one of them: the first that has entries is the one.
    reads = [asyncio.create_task(read({key: after})) for key, after in places.items()]
    try:
        for each in asyncio.as_completed(reads):
            if found := await each:
                return found
        return []
    finally:
        for each in reads:
            each.cancel()
        await asyncio.gather(*reads, return_exceptions=True)
