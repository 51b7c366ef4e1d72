"""What waits on a task stream, and what was dropped from it before anybody read it.

A publisher that adds with MAXLEN drops the oldest entries, read or not. Redis tells of it only until the group reads
on: then it counts what was dropped as read. So one process of a ledger, its projector's, looks again and again and
keeps the count.
"""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

import structlog
from redis.exceptions import ResponseError

from tollbook.ledger.errors import LedgerUnavailable
from tollbook.ledger.keys import GROUP, dropped_tasks
from tollbook.ledger.server.connection import as_map
from tollbook.ledger.server.pipeline import CommandPipeline

_EVERY_S: Final = 0.5
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Backlog:
    """One task stream. `read` is how far the group is, counted in entries; `dropped`, what it can no longer read."""

    unread: int
    read: int
    dropped: int


async def read_backlog(pipeline: CommandPipeline, stream: str) -> Backlog:
    """Return what waits on a stream. Errors: LedgerUnavailable."""
    try:
        info, groups = await asyncio.gather(
            pipeline.execute("XINFO", "STREAM", stream), pipeline.execute("XINFO", "GROUPS", stream)
        )
    except ResponseError:
        return Backlog(0, 0, 0)  # There is no such stream (yet).
    entries = as_map(info)
    added, length = int(entries[b"entries-added"]), int(entries[b"length"])
    group = next((each for each in map(as_map, groups) if each[b"name"] == GROUP.encode()), None)
    if group is None:
        return Backlog(length, 0, 0)
    # A group that has read nothing yet has no count.
    read = int(group[b"entries-read"] or 0)
    is_at_start = group[b"last-delivered-id"] == b"0-0"
    if not is_at_start and group[b"entries-read"] is None:
        return Backlog(int(group.get(b"lag") or 0), 0, 0)
    # What was taken off the front and not read; an entry that a person deleted in the middle counts as well.
    dropped = max(0, added - length - read)
    return Backlog(max(0, added - read - dropped), read, dropped)


class DroppedTasks:
    """Counts the tasks that were dropped unread, for as long as it runs; one process of a ledger does."""

    def __init__(self, pipeline: CommandPipeline, namespace: str, streams: Callable[[], Iterable[str]]) -> None:
        """`streams` returns those of the policy in force; a later one may add some."""
        self._pipeline = pipeline
        self._key = dropped_tasks(namespace)
        self._streams = streams
        self._seen: dict[str, Backlog] = {}

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            try:
                await self.look()
            except (LedgerUnavailable, ResponseError) as exc:
                _log.debug("dropped_tasks.not_looked", problem=str(exc))
            await asyncio.sleep(_EVERY_S)

    async def look(self) -> None:
        """Add what was dropped since the last look."""
        for stream in self._streams():
            backlog, before = await read_backlog(self._pipeline, stream), self._seen.get(stream)
            # At the same place of the group, what was dropped before is dropped still.
            known = before.dropped if before is not None and before.read == backlog.read else 0
            self._seen[stream] = backlog
            if before is None and backlog.dropped and await self._is_counted(stream, backlog):
                continue
            if backlog.dropped > known:
                number = backlog.dropped - known
                await self._pipeline.execute("HSET", self._key, f"{stream} at", f"{backlog.read} {backlog.dropped}")
                total = await self._pipeline.execute("HINCRBY", self._key, stream, number)
                _log.error("tasks.dropped_unread", stream=stream, number=number, total=total)

    async def _is_counted(self, stream: str, backlog: Backlog) -> bool:
        """Whether an earlier process has counted the very same."""
        noted: bytes | None = await self._pipeline.execute("HGET", self._key, f"{stream} at")
        return noted == f"{backlog.read} {backlog.dropped}".encode()
