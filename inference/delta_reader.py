"""Reading the streamed answer of a task: the deltas that a worker has appended, in order, then the result."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Final, cast

from redis.asyncio import Redis

from tollbook.inference.errors import ResultTimeout
from tollbook.inference.task_deltas import TaskUpdate, read_entry
from tollbook.ledger.results import Results
from tollbook.ledger.server.servers import cluster_of

_LOOK_AGAIN_MS: Final = 1_000
"""How often the result is looked for: a task may have no stream, or a stream without an end entry."""
_MAX_ENTRIES: Final = 500


async def read_along(
    redis: Redis, results: Results, keys: Sequence[str], task_id: str, *, timeout_s: float | None = None
) -> AsyncGenerator[TaskUpdate, None]:
    """Yield the updates of a task from its beginning, the last with its result; its stream is at one of `keys`.

    Errors: those of Redis; ResultUnreadable; ResultTimeout if there is no result after `timeout_s` seconds.
    """
    clock = asyncio.get_running_loop().time
    until_s = None if timeout_s is None else clock() + timeout_s
    places = dict.fromkeys(keys, b"0-0")
    is_ended = False
    while True:
        # Read before the entries: once there is a result, all entries are there too.
        result = await results.get(task_id)
        if result is None and is_ended:
            await asyncio.sleep(_LOOK_AGAIN_MS / 1000)  # A result is stored before the end: this end is another task's.
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
    """Return the next entries and advance `places` behind them; with `waits`, wait a moment if there are none."""
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
    # The streams may be on several nodes, but only one has the task: the first stream with entries.
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
