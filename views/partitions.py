"""The figures of `tollbook partitions`: where each partition of the ledger is, its rate, lag and size.

It only reads, with a few commands of constant cost per partition.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from tollbook.ledger.keys import Keys
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.ledger.server.servers import place_of, server_of
from tollbook.ledger.server.slots import slot_of
from tollbook.schemas.identifiers import EntryId


@dataclass(frozen=True, slots=True)
class Folded:
    """The projection's position in a partition."""

    seq: int
    entry: str


@dataclass(frozen=True, slots=True)
class PartitionFigures:
    """One partition. `lag_*` are None without a projection; `stream_bytes` is None without the permission to ask."""

    partition: int
    node: str
    slot: int
    events: int
    events_per_s: float
    on_stream: int
    stream_bytes: int | None
    open_holds: int
    lag_events: int | None
    lag_s: float | None


async def read_partitions(
    redis: Redis, pipeline: CommandPipeline, keys: Sequence[Keys], folded: dict[int, Folded], *, watch_s: float
) -> list[PartitionFigures]:
    """Read all partitions twice, `watch_s` seconds apart. Errors: LedgerUnavailable; ResponseError; RedisError."""
    clock = asyncio.get_running_loop().time
    before, began_s = await asyncio.gather(*(_events(pipeline, key) for key in keys)), clock()
    await asyncio.sleep(watch_s)
    after, took_s = await asyncio.gather(*(_events(pipeline, key) for key in keys)), clock() - began_s
    return list(
        await asyncio.gather(
            *(
                _figures(redis, pipeline, key, folded.get(key.partition), (now - then) / took_s, now)
                for key, then, now in zip(keys, before, after, strict=True)
            )
        )
    )


async def _events(pipeline: CommandPipeline, keys: Keys) -> int:
    """Return how many events were ever written."""
    removed, length = await asyncio.gather(
        pipeline.execute("HGET", keys.meta, "removed"), pipeline.execute("XLEN", keys.ledger)
    )
    return int(removed or 0) + int(length)


async def _figures(
    redis: Redis, pipeline: CommandPipeline, keys: Keys, folded: Folded | None, rate: float, events: int
) -> PartitionFigures:
    server, length, holds, size, lag_s = await asyncio.gather(
        server_of(redis, keys.meta),
        pipeline.execute("XLEN", keys.ledger),
        pipeline.execute("ZCARD", keys.holds),
        _bytes(pipeline, keys.ledger),
        _lag_s(pipeline, keys, folded),
    )
    return PartitionFigures(
        partition=keys.partition,
        node=place_of(server),
        slot=slot_of(keys.meta),
        events=events,
        events_per_s=rate,
        on_stream=int(length),
        stream_bytes=size,
        open_holds=int(holds),
        lag_events=None if folded is None else max(0, events - folded.seq),
        lag_s=lag_s,
    )


async def _bytes(pipeline: CommandPipeline, key: str) -> int | None:
    try:
        return int(await pipeline.execute("MEMORY", "USAGE", key) or 0)
    except ResponseError:  # This user has no permission.
        return None


async def _lag_s(pipeline: CommandPipeline, keys: Keys, folded: Folded | None) -> float | None:
    """Return the age of the oldest event that is not folded; 0 if all are folded."""
    if folded is None:
        return None
    now_ms = await pipeline.now_ms(keys.meta)
    newer: list[Any] = await pipeline.execute("XRANGE", keys.ledger, f"({folded.entry}", "+", "COUNT", 1)
    return max(0, now_ms - EntryId.parse(newer[0][0].decode()).ms) / 1000 if newer else 0.0
