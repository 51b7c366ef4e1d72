"""Reading selected events of a ledger: archive first, then the stream, in order, without gap or overlap.

Needs no projection, and does not slow or change the running system. DuckDB reads the Parquet
segments with the selection pushed down; the stream is read in pages, of which only selected
events are kept. Missing events are always reported.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import duckdb
import pyarrow as pa

from tollbook.ledger.archive.history import LedgerSource
from tollbook.ledger.archive.manifests import ArchiveDamaged, parquet_name
from tollbook.ledger.archive.segments import Segment
from tollbook.ledger.errors import LedgerError, LedgerRefused
from tollbook.ledger.gate.requests import Position
from tollbook.ledger.projection.database import connect
from tollbook.ledger.stream import upcast_table
from tollbook.schemas.events import Event
from tollbook.schemas.identifiers import EntryId, partition_of
from tollbook.schemas.upcasters import UnreadableEvent, event_from_columns, payload_object

_LAST_IN_A_MILLISECOND: Final = 2**63 - 1
# Small, since a search reads the payloads into columns.
_ROWS: Final = 25_000
# A segment may be sealed and trimmed off the stream after the archive was read and before the stream is.
_MAX_READS: Final = 3


class NotOnLedger(LedgerError):
    """The ledger has no matching event."""


class EventsMissing(LedgerRefused):
    """Events are neither in the archive nor on the stream, so an answer would be incomplete."""

    def __init__(self, *, partition: int, first_seq: int, last_seq: int) -> None:
        span = f"event {first_seq} is" if first_seq == last_seq else f"events {first_seq} to {last_seq} are"
        super().__init__(
            f"partition {partition}: {span} neither in the archive nor on the stream; copy the missing segments "
            "into the archive, or set TOLLBOOK_ARCHIVE_DIR or TOLLBOOK_ARCHIVE_URL to where they are"
        )
        self.partition = partition
        self.first_seq = first_seq
        self.last_seq = last_seq


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which events to read; None or empty does not filter. Amounts in nano-dollars, bounds inclusive."""

    user_id: str | None = None
    partition: int | None = None
    call_ids: frozenset[str] | None = None
    types: tuple[str, ...] = ()
    since_ms: int | None = None
    until: EntryId | None = None
    min_nanousd: int | None = None
    max_nanousd: int | None = None
    payload_contains: tuple[str, ...] = ()

    def condition(self) -> tuple[str, list[Any]]:
        """Return the selection as SQL on the envelope's columns, and its parameters."""
        parts: list[tuple[str, list[Any]]] = []
        if self.user_id is not None:
            parts.append(("user_id = ?", [self.user_id]))
        if self.call_ids is not None:
            parts.append(("call_id IN (SELECT unnest(?::VARCHAR[]))", [sorted(self.call_ids)]))
            if len(self.call_ids) == 1:  # DuckDB compares `=` with the statistics of each row group, and skips most.
                parts[-1] = ("call_id = ?", [*self.call_ids])
        if self.types:
            parts.append((f"type IN ({', '.join('?' * len(self.types))})", list(self.types)))
        if self.since_ms is not None:
            parts.append(("ms >= ?", [self.since_ms]))
        if self.until is not None:
            ms, n = self.until.ms, self.until.seq
            parts.append(("ms <= ? AND (ms < ? OR n <= ?)", [ms, ms, n]))
        if self.min_nanousd is not None:
            parts.append(("amount >= ?", [self.min_nanousd]))
        if self.max_nanousd is not None:
            parts.append(("amount <= ?", [self.max_nanousd]))
        if self.payload_contains:
            tests = " OR ".join(["contains(payload, ?)"] * len(self.payload_contains))
            parts.append((f"({tests})", list(self.payload_contains)))
        return " AND ".join(text for text, _ in parts) or "true", [value for _, values in parts for value in values]

    def may_hold(self, first: EntryId, last: EntryId) -> bool:
        """Whether the selection's time range reaches between two entries."""
        is_after = self.since_ms is None or last.ms >= self.since_ms
        return is_after and (self.until is None or first <= self.until)


class AuditReader:
    """Reads selected events of one ledger.

    `positions` is how far each partition was read; `progress` is called with numbers of events that were read.
    """

    def __init__(self, source: LedgerSource) -> None:
        self.source = source
        self.positions: dict[int, Position] = {}
        self.archived: dict[int, int] = {}
        self.progress: Callable[[int], None] = lambda _: None
        self._duckdb = connect(config={"memory_limit": "1GB", "threads": 2})

    def close(self) -> None:
        """Close the connection to DuckDB."""
        self._duckdb.close()

    def partitions(self, user_id: str | None) -> Iterable[int]:
        """Return the partitions in which a user's events can be."""
        # An archive alone does not show how many partitions the ledger has: one may have no segment yet.
        if user_id is None or self.source.redis is None:
            return range(len(self.source.keys))
        return (partition_of(user_id, len(self.source.keys)),)

    async def events(self, selection: Selection) -> list[Event]:
        """Return the selected events, each partition's in order. Errors: as `tables`."""
        found: list[Event] = []
        async for events in self.tables(selection):
            found += await asyncio.to_thread(_read_events, events)
        return found

    async def tables(self, selection: Selection) -> AsyncGenerator[pa.Table]:
        """Yield the selected events in tables of envelope columns, payloads upcast to the current version.

        Errors: EventsMissing; ArchiveDamaged; LedgerUnavailable; UnreadableEvent.
        """
        chosen = selection.partition
        for partition in self.partitions(selection.user_id) if chosen is None else (chosen,):
            segments = await asyncio.to_thread(self._segments, partition)
            newest = segments[-1].manifest if segments else None
            self.archived[partition] = newest.last_seq if newest else 0
            read = Position(EntryId.parse(newest.last_id), newest.last_seq) if newest else Position()
            self.positions[partition] = read
            async for events in self._archived(segments, selection):
                yield upcast_table(events)
            self.progress(read.seq)
            async for events in self._streamed(partition, read, selection):
                yield events

    def _segments(self, partition: int) -> list[Segment]:
        segments = self.source.archive.segments(partition) if self.source.archive else []
        for segment in segments:
            if segment.manifest.ledger_id != self.source.ledger_id:
                raise ArchiveDamaged(segment.place, f"belongs to ledger {segment.manifest.ledger_id}")
        if segments and segments[0].manifest.first_seq != 1:
            raise EventsMissing(partition=partition, first_seq=1, last_seq=segments[0].manifest.first_seq - 1)
        return segments

    async def _archived(self, segments: list[Segment], selection: Selection) -> AsyncGenerator[pa.Table]:
        wanted = [
            parquet_name(segment.stem)
            for segment in segments
            if selection.may_hold(EntryId.parse(segment.manifest.first_id), EntryId.parse(segment.manifest.last_id))
        ]
        if not wanted:
            return
        archive = self.source.archive
        assert archive is not None
        condition, parameters = selection.condition()
        # The order of files and rows is the ledger's, and DuckDB keeps it by default.
        sql = f"SELECT * FROM read_parquet(?, hive_partitioning = false) WHERE {condition}"  # noqa: S608 - built above.
        files, names, opened = archive.storage.files(wanted), iter(wanted), dict[str, str]()
        try:
            while (paths := await asyncio.to_thread(next, files, None)) is not None:
                opened = {str(path): archive.storage.located(name) for path, name in zip(paths, names, strict=False)}
                found = await asyncio.to_thread(self._open, sql, [[str(path) for path in paths], *parameters])
                while (batch := await asyncio.to_thread(_next_batch, found)) is not None:
                    if batch.num_rows:
                        yield pa.Table.from_batches([batch])
        except (duckdb.Error, pa.ArrowException, OSError) as exc:
            raise _damage(exc, opened, archive.place) from exc
        finally:
            await asyncio.to_thread(files.close)

    def _open(self, sql: str, parameters: list[Any]) -> pa.RecordBatchReader:
        return self._duckdb.cursor().execute(sql, parameters).to_arrow_reader(_ROWS)

    async def _streamed(self, partition: int, read: Position, selection: Selection) -> AsyncGenerator[pa.Table]:
        """Yield the events after the archive; with a time range, from its beginning."""
        if self.source.redis is None or (selection.until is not None and read.entry > selection.until):
            return
        start, is_checked = read, True
        if selection.since_ms is not None and selection.since_ms > read.entry.ms:
            # The number of the first event in a time range is not known.
            start, is_checked = Position(EntryId(selection.since_ms - 1, _LAST_IN_A_MILLISECOND), read.seq), False
        for number in range(_MAX_READS):
            async for events in self.source.events(partition, after_seq=start.seq, after=start.entry):
                first_seq, last_seq = events["seq"][0].as_py(), events["seq"][-1].as_py()
                if is_checked and first_seq != start.seq + 1:
                    if number < _MAX_READS - 1:
                        break
                    raise EventsMissing(partition=partition, first_seq=start.seq + 1, last_seq=first_seq - 1)
                if last_seq - first_seq + 1 != events.num_rows:
                    raise EventsMissing(partition=partition, first_seq=first_seq, last_seq=last_seq)
                start, is_checked = Position(EntryId.parse(events["id"][-1].as_py()), last_seq), True
                self.positions[partition] = start
                self.progress(events.num_rows)
                found = await asyncio.to_thread(self._select, events, selection)
                if found.num_rows:
                    yield found
                if selection.until is not None and start.entry > selection.until:
                    return
            else:
                return

    def _select(self, events: pa.Table, selection: Selection) -> pa.Table:
        condition, parameters = selection.condition()
        cursor = self._duckdb.cursor()
        cursor.register("page", events)
        return cursor.execute(f"SELECT * FROM page WHERE {condition}", parameters).to_arrow_table()  # noqa: S608


def _damage(exc: Exception, opened: Mapping[str, str], archive: str) -> ArchiveDamaged:
    """Return the error for a damaged archive. `opened`: by local path, the file's place as users know it."""
    if isinstance(exc, OSError) and exc.filename:
        return ArchiveDamaged(opened.get(str(exc.filename), str(exc.filename)), f"cannot be read ({exc.strerror})")
    for path, name in opened.items():
        if path in str(exc):
            return ArchiveDamaged(name, f"cannot be read ({str(exc).replace(path, name)})")
    return ArchiveDamaged(archive, f"cannot be read ({exc})")


def _next_batch(batches: pa.RecordBatchReader) -> pa.RecordBatch | None:
    try:
        return batches.read_next_batch()
    except StopIteration:
        return None


def _read_events(events: pa.Table) -> list[Event]:
    return [_read_event(row) for row in events.to_pylist()]


def _read_event(row: dict[str, Any]) -> Event:
    try:
        payload = payload_object(row["payload"])
    except ValueError as exc:
        raise UnreadableEvent(row["id"], str(exc)) from exc
    return event_from_columns(row, payload)
