"""Folding a whole ledger into a new file, on two cores.

Most of the work is appending events, which is done in parallel; they are added up in order, while
the next ones are appended. Segments are read by DuckDB itself. Rows and position agree only at the
end: until then the file is marked as unfinished, and `Store.open` sets an unfinished file aside.
"""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Final, Self

import duckdb
import pyarrow as pa

from tollbook.ledger.archive.history import ROW_GROUP
from tollbook.ledger.archive.manifests import ArchiveDamaged
from tollbook.ledger.archive.segments import Segment, check_segment
from tollbook.ledger.projection.fold import (
    LAYOUT_VERSION,
    Counted,
    LedgerGap,
    add_up,
    advance,
    append_incoming,
    check_order,
    count_incoming,
    read_position,
)
from tollbook.ledger.projection.sql_text import quoted
from tollbook.ledger.projection.store import Store
from tollbook.ledger.projection.store_errors import StoreFailed
from tollbook.schemas.events import EVENT_VERSION
from tollbook.schemas.identifiers import EntryId
from tollbook.schemas.upcasters import UnreadableEvent

_UNFINISHED: Final = 0
_LANES: Final = 2
# The rows appended in one transaction: whole row groups, which are compressed straight into the file. A segment that
# reaches past the end is read twice, so larger transactions read less.
_ROWS: Final = 3 * ROW_GROUP

_Prepare = Callable[[duckdb.DuckDBPyConnection], AbstractContextManager[object]]
"""Makes the relation `incoming`, for the time of the block."""


class Rebuild:
    """A store that is being filled. Make it with `Rebuild.of`; all methods block."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._cursor = store.connection.cursor()
        self._lanes = ThreadPoolExecutor(_LANES)
        self._cursors = deque(store.connection.cursor() for _ in range(_LANES))
        self._waiting: tuple[int, Counted] | None = None
        """Partition and events of a table that was appended but not added up yet."""

    @classmethod
    @contextmanager
    def of(cls, store: Store) -> Generator[Self]:
        """Fill an empty store; it stays marked as unfinished after an error. Errors: StoreFailed."""
        rebuild = cls(store)
        try:
            rebuild._mark(_UNFINISHED)
            yield rebuild
            rebuild.finish()
            rebuild._mark(LAYOUT_VERSION)
        finally:
            rebuild._lanes.shutdown(cancel_futures=True)
            for cursor in (rebuild._cursor, *rebuild._cursors):
                cursor.close()

    def fold(self, table: pa.Table, *, partition: int) -> None:
        """Append a table of envelope columns, while the one before is added up. Errors: as `Store.fold_table`."""
        appending = self._lanes.submit(
            self._append, partial(_registered, table), partition, self._end_of(partition), None
        )
        self.finish()
        counted = appending.result()
        self._waiting = None if counted is None else (partition, counted)

    def finish(self) -> None:
        """Add up what was appended last. Errors: StoreFailed."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            self._add_up(*waiting)

    def fold_segments(
        self,
        segments: Sequence[Segment],
        *,
        partition: int,
        until: EntryId | None = None,
        progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Fold the next segments, all of the current version; `until` is the last entry to fold.

        Errors: ArchiveDamaged; and as `Store.fold_table`.
        """
        self.finish()
        appending = deque[Future[Counted | None]]()
        try:
            for first_seq in range(self._end_of(partition) + 1, segments[-1].manifest.last_seq + 1, _ROWS):
                prepare = partial(_readable, _segments_with(segments, first_seq), first_seq, until)
                before = appending[-1] if appending else None
                appending.append(self._lanes.submit(self._append, prepare, partition, first_seq - 1, before))
                if len(appending) > _LANES and not self._finish(appending.popleft(), partition, progress):
                    return
            while appending and self._finish(appending.popleft(), partition, progress):
                pass
        except (StoreFailed, UnreadableEvent, LedgerGap):
            for segment in segments:
                # A damaged segment explains the error better.
                check_segment(segment)
            raise
        finally:
            wait(appending)

    def _append(
        self, prepare: _Prepare, partition: int, folded_seq: int, before: Future[Counted | None] | None
    ) -> Counted | None:
        """Append the relation that `prepare` makes, after what `before` appends."""
        cursor = self._cursors.popleft()
        try:
            with prepare(cursor), self._store.folding(cursor):
                counted = count_incoming(cursor)
                if counted is None:
                    return None
                check_order(cursor, counted, partition=partition, folded_seq=folded_seq)
                append_incoming(cursor)
                if before is not None:
                    # If the one before failed, nothing is appended: `result` raises its error here, too.
                    before.result()
                return counted
        except duckdb.Error as exc:
            raise StoreFailed(f"DuckDB cannot fold into {self._store.path}: {exc}") from exc
        finally:
            cursor.execute("DROP VIEW IF EXISTS incoming")
            self._cursors.append(cursor)

    def _finish(
        self, appending: Future[Counted | None], partition: int, progress: Callable[[int], None]
    ) -> Counted | None:
        counted = appending.result()
        if counted is not None:
            self._add_up(partition, counted)
            progress(counted.events)
        return counted

    def _add_up(self, partition: int, counted: Counted) -> None:
        with self._store.folding(self._cursor) as cursor:
            add_up(cursor, partition=partition, first_seq=counted.first_seq, last_seq=counted.last_seq)
            advance(cursor, partition, counted)

    def _end_of(self, partition: int) -> int:
        """Return the last event that was appended."""
        if self._waiting is not None and self._waiting[0] == partition:
            return self._waiting[1].last_seq
        return read_position(self._cursor, partition, self._store.ledger_id).seq

    def _mark(self, version: int) -> None:
        try:
            self._cursor.execute("UPDATE position SET schema_version = ?", [version])
        except duckdb.Error as exc:
            raise StoreFailed(f"DuckDB cannot write {self._store.path}: {exc}") from exc


def are_current(segment: Segment) -> bool:
    """Whether all events of a segment are of the current version, by its manifest."""
    return all(versions == [EVENT_VERSION] for versions in segment.manifest.schema_versions.values())


def _segments_with(segments: Sequence[Segment], first_seq: int) -> list[Segment]:
    """Return the segments that hold any of the events to be appended at once."""
    last_seq = first_seq + _ROWS - 1
    return [each for each in segments if each.manifest.first_seq <= last_seq and each.manifest.last_seq >= first_seq]


@contextmanager
def _registered(table: pa.Table, cursor: duckdb.DuckDBPyConnection) -> Generator[None]:
    cursor.register("incoming", table)
    yield


@contextmanager
def _readable(
    segments: Sequence[Segment], first_seq: int, until: EntryId | None, cursor: duckdb.DuckDBPyConnection
) -> Generator[None]:
    """Make `incoming` of the events of segments. Errors: ArchiveDamaged; duckdb.Error."""
    with ExitStack() as files:
        # Parquet has no checksum of its own: one changed bit may change an amount.
        paths = [files.enter_context(segment.checked_file()) for segment in segments]
        _make_incoming(paths, segments[0], first_seq, until, cursor)
        yield


def _make_incoming(
    paths: Sequence[Path], first: Segment, first_seq: int, until: EntryId | None, cursor: duckdb.DuckDBPyConnection
) -> None:
    end = "true" if until is None else f"(ms < {until.ms} OR (ms = {until.ms} AND n <= {until.seq}))"
    # Several files in one read_parquet are not always read in their order (DuckDB 1.5, November 2026); parts of a UNION
    # ALL are. Sorting would take longer. No columns are read from the paths.
    files = " UNION ALL ".join(
        f"(SELECT * EXCLUDE (head) FROM read_parquet({quoted(path)}, hive_partitioning = false) "  # noqa: S608
        f"WHERE seq BETWEEN {first_seq} AND {first_seq + _ROWS - 1} AND {end})"
        for path in paths
    )
    cursor.execute(f"CREATE OR REPLACE TEMP VIEW incoming AS {files}")
    row = cursor.execute(f"SELECT count(*) FROM incoming WHERE v <> {EVENT_VERSION}").fetchone()  # noqa: S608
    if row != (0,):
        raise ArchiveDamaged(first.place, "has events of other versions than its manifest says")
