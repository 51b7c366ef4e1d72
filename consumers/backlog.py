"""The backlog of a task stream, and how many of its tasks were dropped unread.

A publisher that adds with MAXLEN drops the oldest entries, read or not. Redis shows this only until the group reads
the next entry: then it counts the dropped entries as read. So the projector of a ledger polls the streams and keeps the
count.
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
    """One task stream, in entries: unread, read by the group, and dropped before the group read them."""

    unread: int
    read: int
    dropped: int


async def read_backlog(pipeline: CommandPipeline, stream: str) -> Backlog:
    """Return the backlog of a stream. Errors: LedgerUnavailable."""
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
    # Entries taken off the front unread. An entry that a person deleted in the middle counts as well.
    dropped = max(0, added - length - read)
    return Backlog(max(0, added - read - dropped), read, dropped)


class DroppedTasks:
    """Counts the tasks that were dropped unread. Only one process per ledger runs this."""

    def __init__(self, pipeline: CommandPipeline, namespace: str, streams: Callable[[], Iterable[str]]) -> None:
        """`streams` returns the task streams of the policy in force; a later policy may add streams."""
        self._pipeline = pipeline
        self._key = dropped_tasks(namespace)
        self._streams = streams
        self._seen: dict[str, Backlog] = {}

    async def run(self) -> None:
        """Count until cancelled."""
        while True:
            try:
                await self.look()
            except (LedgerUnavailable, ResponseError) as exc:
                _log.debug("dropped_tasks.not_looked", problem=str(exc))
            await asyncio.sleep(_EVERY_S)

    async def look(self) -> None:
        """Add the tasks that were dropped since the last look."""
        for stream in self._streams():
            backlog, before = await read_backlog(self._pipeline, stream), self._seen.get(stream)
            # While the group has read nothing more, Redis still reports what was counted before.
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
        """Whether an earlier process has counted this state."""
        noted: bytes | None = await self._pipeline.execute("HGET", self._key, f"{stream} at")
        return noted == f"{backlog.read} {backlog.dropped}".encode()
