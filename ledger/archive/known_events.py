"""The copies of a ledger's events in the projection and the archive, from which lost events are restored.

Only reads. The archive keeps events as they were written. DuckDB keeps payloads upcast, so an event is taken from there
only if no upcaster changes it.
"""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import duckdb
import pyarrow as pa

from tollbook.ledger.archive.manifests import ArchiveDamaged
from tollbook.ledger.archive.segments import Archive, Segment, check_segment
from tollbook.ledger.errors import LedgerRefused
from tollbook.ledger.gate.requests import Position
from tollbook.ledger.projection.fold import LedgerMismatch
from tollbook.ledger.projection.snapshot import open_snapshot
from tollbook.ledger.projection.store_errors import StoreFailed
from tollbook.schemas.identifiers import EntryId
from tollbook.schemas.upcasters import needs_upcast

_ROWS: Final = 20_000
_COLUMNS: Final = (
    "id",
    "seq",
    "type",
    "v",
    "user_id",
    "period",
    "call_id",
    "attempt",
    "amount",
    "committed",
    "payload",
)
_EVENTS: Final = """
SELECT id, seq, type, v, user_id, period, call_id, attempt, nanousd(amount_usd) AS amount,
    nanousd(committed_usd) AS committed, payload::VARCHAR AS payload
FROM events WHERE partition = ? AND seq > ? ORDER BY seq
"""
_NOTHING: Final = Position()

Row = dict[str, Any]
"""An event by its columns: the envelope and its id."""


class CopiesDiffer(LedgerRefused):
    """DuckDB and the archive have different histories of the ledger, so neither is used."""

    def __init__(self, partition: int, seq: int) -> None:
        super().__init__(
            f"partition {partition}: DuckDB and the archive have different events at position {seq}: one of them is of "
            "another history of this ledger. Move away the one that does not belong here, and run the command again"
        )


@dataclass(frozen=True, slots=True)
class KnownEvents:
    """The events of one ledger in its archive and in a copy of its DuckDB file (None: there is no file)."""

    ledger_id: str
    archive: Archive
    projection: duckdb.DuckDBPyConnection | None

    @classmethod
    @contextmanager
    def open(cls, ledger_id: str, archive: Archive, projection: Path) -> Generator["KnownEvents"]:
        """Errors: LedgerMismatch for a file of another ledger; LedgerUnavailable if it cannot be read. Blocks."""
        if not projection.exists():
            yield cls(ledger_id, archive, None)
            return
        with open_snapshot(projection, memory_limit="2GB") as connection:
            known = cls(ledger_id, archive, connection)
            for (stored,) in known._query("SELECT DISTINCT ledger_id FROM position", []).fetchall():
                if stored != ledger_id:
                    raise LedgerMismatch(stored=stored, given=ledger_id)  # G8
            yield known

    def newest(self, partition: int) -> Position:
        """Return the newest event in either copy. Errors: CopiesDiffer; ArchiveDamaged; StoreFailed. Blocks."""
        segments = self.segments(partition)
        archived = _end_of(segments[-1]) if segments else _NOTHING
        folded = self._folded(partition)
        older, newer = sorted((archived, folded), key=lambda position: position.seq)
        if older.seq and self.id_at(partition, older.seq, is_archived=archived is newer) != str(older.entry):
            raise CopiesDiffer(partition, older.seq)  # G8
        return newer

    def ids_after(self, partition: int, after_seq: int) -> dict[int, str]:
        """Return the ids of the events after a position, by sequence number. Blocks."""
        found = dict[int, str]()
        for segment in self.segments(partition):
            if segment.manifest.last_seq > after_seq:
                columns = segment.read(["seq", "id"]).to_pydict()
                found |= zip(columns["seq"], columns["id"], strict=True)
        if self.projection is not None:
            newest = max(found, default=after_seq)
            sql = "SELECT seq, id FROM events WHERE partition = ? AND seq > ?"
            found |= dict(self._query(sql, [partition, newest]).fetchall())
        return {seq: entry_id for seq, entry_id in found.items() if seq > after_seq}

    def id_at(self, partition: int, seq: int, *, is_archived: bool) -> str | None:
        """Return the id of one event, in the archive or in DuckDB; None if it is not there. Blocks."""
        if is_archived:
            holder = next((each for each in self.segments(partition) if each.manifest.last_seq >= seq), None)
            if holder is None or holder.manifest.first_seq > seq:
                return None
            return cast("str", holder.read(["id"])["id"][seq - holder.manifest.first_seq].as_py())
        sql = "SELECT id FROM events WHERE partition = ? AND seq = ?"
        row = self._query(sql, [partition, seq]).fetchone()
        return row[0] if row else None

    def events_after(self, partition: int, after_seq: int) -> Generator[list[Row]]:
        """Yield the events after a position as they were written, in pages: those of the archive, then DuckDB's.

        Errors: ArchiveDamaged; StoreFailed; LedgerRefused if no copy has an event as it was written. Blocks.
        """
        for segment in self.segments(partition):
            if segment.manifest.last_seq > after_seq:
                check_segment(segment)  # G7
                for events in segment.batches(_ROWS, after_seq=after_seq):
                    yield events.to_pylist()
                after_seq = segment.manifest.last_seq
        if self.projection is None:
            return
        for batch in self._query(_EVENTS, [partition, after_seq]).to_arrow_reader(_ROWS):
            rows: list[Row] = pa.Table.from_batches([batch]).to_pylist()
            for row in rows:
                if needs_upcast(row["type"], row["v"]):
                    raise LedgerRefused(
                        f"event {row['id']} is of version {row['v']} and is not in the archive: DuckDB does not have "
                        "it as it was written"
                    )
            yield rows

    def segments(self, partition: int) -> list[Segment]:
        """Return the archive's segments of a partition. Errors: ArchiveDamaged. Blocks."""
        segments = self.archive.segments(partition)
        for segment in segments:
            if segment.manifest.ledger_id != self.ledger_id:
                raise ArchiveDamaged(segment.place, f"belongs to ledger {segment.manifest.ledger_id}")
        return segments

    def _folded(self, partition: int) -> Position:
        if self.projection is None:
            return _NOTHING
        row = self._query("SELECT id, seq FROM position WHERE partition = ?", [partition]).fetchone()
        return Position(EntryId.parse(row[0]), row[1]) if row else _NOTHING

    def _query(self, sql: str, parameters: list[Any]) -> duckdb.DuckDBPyConnection:
        assert self.projection is not None
        try:
            return self.projection.cursor().execute(sql, parameters)
        except duckdb.Error as exc:
            raise StoreFailed(f"the projection cannot be read: {exc}") from exc


def _end_of(segment: Segment) -> Position:
    return Position(EntryId.parse(segment.manifest.last_id), segment.manifest.last_seq)
