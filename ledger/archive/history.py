"""The whole ledger as tables of events: the archive first, then the stream, without gap or overlap.

Only reads. The system may run meanwhile; without Redis, only the archive is read.
"""

import asyncio
import bisect
import contextlib
from collections import Counter
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Final, cast

import pyarrow as pa
from redis.asyncio import Redis

from tollbook.ledger.archive.manifests import ArchiveDamaged, read_manifest
from tollbook.ledger.archive.segments import Archive, Segment
from tollbook.ledger.errors import LedgerRefused
from tollbook.ledger.keys import Keys
from tollbook.ledger.stream import StreamReader, upcast_table
from tollbook.schemas.identifiers import ZERO_ENTRY, EntryId

# Whole row groups of DuckDB (122,880 rows) are compressed straight into its file; the rest goes through the write-ahead
# log. Two row groups fit into a store's memory limit.
ROW_GROUP: Final = 122_880
ROWS: Final = 2 * ROW_GROUP
_PAGE: Final = 25_000


class Regrouping:
    """Joins the small tables of segments and pages into tables of `ROWS` rows."""

    def __init__(self) -> None:
        self._waiting: list[pa.Table] = []
        self._rows = 0

    def add(self, events: pa.Table) -> list[pa.Table]:
        """Add the next events, and return the tables that are full."""
        # Segments have the column `head` of the chain; pages of the stream do not.
        self._waiting.append(events.drop_columns(["head"]) if "head" in events.column_names else events)
        self._rows += events.num_rows
        if self._rows < ROWS:
            return []
        joined = pa.concat_tables(self._waiting)
        full = [joined.slice(start, ROWS) for start in range(0, joined.num_rows - ROWS + 1, ROWS)]
        self._waiting = [joined.slice(len(full) * ROWS)]
        self._rows = self._waiting[0].num_rows
        return full

    def rest(self) -> list[pa.Table]:
        """Return the last table, which is not full."""
        return [pa.concat_tables(self._waiting)] if self._rows else []


class NoLedger(LedgerRefused):
    """There is neither an archive nor a stream to read."""


@dataclass(frozen=True, slots=True)
class LedgerSource:
    """Where a ledger's events are. Without `redis`, only the archive is read."""

    ledger_id: str
    keys: tuple[Keys, ...]
    archive: Archive | None = None
    redis: Redis | None = None

    @classmethod
    def of_archive(cls, archive: Archive, *, namespace: str = "tollbook") -> "LedgerSource":
        """Return the ledger that an archive holds. Errors: NoLedger; ArchiveDamaged."""
        partitions = archive.partitions()
        segments = [segment for number in partitions for segment in archive.segments(number)]
        if not segments:
            raise NoLedger(f"there are no segments in {archive.place}")
        found = {segment.manifest.ledger_id for segment in segments}
        if len(found) > 1:
            raise ArchiveDamaged(archive.place, f"holds segments of several ledgers ({', '.join(sorted(found))})")
        return cls(found.pop(), tuple(Keys(namespace, number) for number in range(max(partitions) + 1)), archive)

    @classmethod
    def of_damaged_archive(cls, archive: Archive, *, namespace: str = "tollbook") -> "LedgerSource":
        """As `of_archive`, if parts may be damaged: the ledger that most manifests name. Errors: NoLedger."""
        found, partitions = Counter[str](), set[int]()
        names = archive.manifests()
        archive.storage.prefetch(names)
        for name in names:
            with contextlib.suppress(ArchiveDamaged, ValueError):  # Reported when the segments are read.
                partitions.add(int(name.split("/")[0].removeprefix("partition-")))
                found[read_manifest(archive.storage, name).ledger_id] += 1
        if not found:
            raise NoLedger(f"there are no segments in {archive.place}")
        keys = tuple(Keys(namespace, number) for number in range(max(partitions) + 1))
        return cls(found.most_common(1)[0][0], keys, archive)

    def segments(self, partition: int) -> list[Segment]:
        """Return a partition's segments in order. Blocks. Errors: ArchiveDamaged."""
        segments = self.archive.segments(partition) if self.archive else []
        for segment in segments:
            if segment.manifest.ledger_id != self.ledger_id:
                raise ArchiveDamaged(segment.place, f"belongs to ledger {segment.manifest.ledger_id}")
        return segments

    async def events(
        self,
        partition: int,
        *,
        after_seq: int = 0,
        after: EntryId = ZERO_ENTRY,
        until: EntryId | None = None,
        is_upcast: bool = True,
    ) -> AsyncGenerator[pa.Table]:
        """Yield a partition's events after a position and up to an entry, in order, in tables of envelope columns.

        Errors: ArchiveDamaged; LedgerUnavailable; UnreadableEvent.
        """
        async with contextlib.aclosing(self._all(partition, after_seq, after, is_upcast=is_upcast)) as tables:
            async for events in tables:
                wanted = events if until is None else _up_to(events, until)
                if wanted.num_rows:
                    yield wanted
                if wanted.num_rows < events.num_rows:
                    break

    async def _all(
        self, partition: int, after_seq: int, after: EntryId, *, is_upcast: bool
    ) -> AsyncGenerator[pa.Table]:
        while True:
            async for events in self._archived(partition, after_seq):
                after, after_seq = _last(events)
                yield upcast_table(events) if is_upcast else events
            if self.redis is None:
                return
            pages = self._streamed(self.redis, partition, after, is_upcast=is_upcast)
            async with contextlib.aclosing(pages):
                async for events in pages:
                    if await self._is_archived_since(partition, after_seq, events):
                        break
                    after, after_seq = _last(events)
                    yield events
                else:
                    return

    async def _is_archived_since(self, partition: int, after_seq: int, page: pa.Table) -> bool:
        """Whether events before a page of the stream were sealed and trimmed after the archive was read."""
        if page["seq"][0].as_py() == after_seq + 1:
            return False
        segments = await asyncio.to_thread(self.segments, partition)
        return bool(segments) and segments[-1].manifest.last_seq > after_seq

    async def count(self) -> int:
        """Return how many events there are, for a progress bar."""
        total = 0
        for keys in self.keys:
            segments = await asyncio.to_thread(self.segments, keys.partition)
            archived = segments[-1].manifest.last_seq if segments else 0
            written = 0
            if self.redis is not None:
                removed = cast("bytes | None", await self.redis.hget(keys.meta, "removed"))
                written = int(removed or 0) + await self.redis.xlen(keys.ledger)
            total += max(archived, written)
        return total

    async def _archived(self, partition: int, after_seq: int) -> AsyncGenerator[pa.Table]:
        for segment in await asyncio.to_thread(self.segments, partition):
            if segment.manifest.last_seq <= after_seq:
                continue
            batches = segment.batches(ROWS, after_seq=after_seq)
            while (events := await asyncio.to_thread(next, batches, None)) is not None:
                yield events

    async def _streamed(
        self, redis: Redis, partition: int, after: EntryId, *, is_upcast: bool
    ) -> AsyncGenerator[pa.Table]:
        reader = StreamReader(redis, self.keys[partition])
        try:
            while batch := await reader.read_after(after, count=_PAGE):
                yield await asyncio.to_thread(batch.to_table, is_upcast=is_upcast)
                after = batch.last_id
        finally:
            await reader.aclose()


def _last(events: pa.Table) -> tuple[EntryId, int]:
    return EntryId.parse(cast("str", events["id"][-1].as_py())), cast("int", events["seq"][-1].as_py())


def _up_to(events: pa.Table, until: EntryId) -> pa.Table:
    times = cast("list[int]", events["ms"].to_pylist())
    count = bisect.bisect_left(times, until.ms)
    while count < events.num_rows and EntryId.parse(cast("str", events["id"][count].as_py())) <= until:
        count += 1
    return events.slice(0, count)
