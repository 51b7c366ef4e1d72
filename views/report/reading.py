"""Reads the data of a report: a running system, the data directory of a stopped one, or an archive; and its age.

A report works on a copy of the projection, taken at one moment even while a projector writes
(ledger/projection/snapshot.py). An archive has no projection, so it is folded into a temporary file first.
"""

import asyncio
import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, cast

import duckdb
from redis.asyncio import Redis
from redis.exceptions import RedisError

from tollbook.app.connect import data_settings
from tollbook.inference.archive_place import archive_at
from tollbook.inference.settings import Settings, load_settings
from tollbook.ledger.archive.history import LedgerSource, NoLedger
from tollbook.ledger.archive.replay import replay
from tollbook.ledger.errors import LedgerError
from tollbook.ledger.keys import Keys
from tollbook.ledger.projection import PROJECTION_FILE
from tollbook.ledger.projection.snapshot import naming_memory_limit, open_snapshot
from tollbook.ledger.server.connection import connect
from tollbook.ledger.server.endpoint import read_endpoint
from tollbook.schemas.identifiers import EntryId
from tollbook.views.report.queries import Answers, Choices, Selection, ask, prepare, read_choices

_ANSWER_S: Final = 3.0
_MEMORY_SETTING: Final = "TOLLBOOK_REPORT_MEMORY"
_THREADS: Final = 2


class NothingToReport(LedgerError):
    """There is no projection and no archive, or nothing in it."""


class Kind(StrEnum):
    """Where the numbers come from."""

    LIVE = "live"
    AT_REST = "at rest"
    ARCHIVE = "archive"


@dataclass(frozen=True, slots=True)
class Freshness:
    """How fresh the numbers are. Times are UTC; `behind_events` is None if the ledger does not answer."""

    kind: Kind
    place: str
    events: int
    partitions: int
    newest_at: datetime | None
    read_at: datetime
    behind_events: int | None = None
    behind_s: float | None = None

    @property
    def sentence(self) -> str:
        """The source and its freshness, in words."""
        match self.kind:
            case Kind.LIVE:
                what = f"Live system on {self.place}{os.sep}"
            case Kind.AT_REST:
                what = f"Data directory {self.place}{os.sep} at rest: no system runs on it"
            case Kind.ARCHIVE:
                what = f"Archive {self.place}{os.sep} alone: sealed events only"
        return f"{what}. {self._newest}{self._lag} Read at {self.read_at:%Y-%m-%d %H:%M:%S} UTC."

    @property
    def _newest(self) -> str:
        if self.newest_at is None:
            return "No event yet."
        number = f"number {self.events:,}"
        if self.partitions > 1:
            number = f"{self.events:,} in all, {self.partitions} partitions"
        return f"Newest event: {self.newest_at:%Y-%m-%d %H:%M:%S} UTC, {number}."

    @property
    def _lag(self) -> str:
        if self.behind_events is None:
            return ""
        if self.behind_events == 0:
            return " Nothing is behind the ledger."
        return f" Behind the ledger: {self.behind_events:,} events, {self.behind_s or 0:,.1f} s."


@dataclass(slots=True)
class Reading:
    """A copy of the projection that is ready for queries (see queries.py). Close it after use."""

    connection: duckdb.DuckDBPyConnection
    freshness: Freshness
    choices: Choices
    memory: str
    _stack: ExitStack = field(repr=False)
    _answers: Answers | None = field(default=None, repr=False)

    def ask(self, selection: Selection) -> Answers:
        """Run all queries for a selection; the last results are cached. Blocks."""
        if self._answers is None or self._answers.selection != selection:
            with naming_memory_limit(self.memory, _MEMORY_SETTING):
                self._answers = ask(self.connection, selection)
        return self._answers

    def close(self) -> None:
        """Free the copy."""
        self._stack.close()


@dataclass(frozen=True, slots=True)
class Source:
    """A source that can be read repeatedly: a projection file, and its ledger if that answers."""

    place: str
    projection: Path
    namespace: str = "tollbook"
    redis_url: str | None = field(default=None, repr=False)
    memory: str = "2GB"
    # The temporary folder of a folded archive.
    folder: "tempfile.TemporaryDirectory[str] | None" = field(default=None, repr=False)

    async def read(self) -> Reading:
        """Copy the projection as it is now. Errors: LedgerUnavailable if it cannot be copied."""
        reading = await asyncio.to_thread(self._copy)
        if self.folder is None and (lag := await self._lag(reading.connection)) is not None:
            events, seconds = lag
            reading.freshness = replace(
                reading.freshness, kind=Kind.LIVE, behind_events=events, behind_s=seconds, read_at=datetime.now(UTC)
            )
        return reading

    def close(self) -> None:
        """Remove the temporary folder of a folded archive."""
        if self.folder is not None:
            self.folder.cleanup()

    def _copy(self) -> Reading:
        stack = ExitStack()
        try:
            with naming_memory_limit(self.memory, _MEMORY_SETTING):
                opened = open_snapshot(self.projection, memory_limit=self.memory, threads=_THREADS)
                connection = stack.enter_context(opened)
                prepare(connection)
                return Reading(connection, self._freshness(connection), read_choices(connection), self.memory, stack)
        except BaseException:
            stack.close()
            raise

    def _freshness(self, connection: duckdb.DuckDBPyConnection) -> Freshness:
        positions = _positions(connection)
        newest = max((at.entry for at in positions if at.seq), default=None)
        return Freshness(
            Kind.AT_REST if self.folder is None else Kind.ARCHIVE,
            self.place,
            sum(at.seq for at in positions),
            len(positions),
            None if newest is None else datetime.fromtimestamp(newest.ms / 1000, UTC),
            datetime.now(UTC),
        )

    async def _lag(self, connection: duckdb.DuckDBPyConnection) -> tuple[int, float] | None:
        """Return how many events the copy lacks, and the oldest one's age; None if its ledger does not answer."""
        url = self.redis_url
        if url is None:
            # Read each time, because the system may have started or stopped.
            endpoint = read_endpoint(Path(self.place))
            url = None if endpoint is None else endpoint.redis_url
        if url is None:
            return None
        positions = _positions(connection)
        try:
            async with asyncio.timeout(_ANSWER_S), connect(url) as redis:
                lags = [await _lag_of(redis, Keys(self.namespace, at.partition), at) for at in positions]
        except (RedisError, OSError, TimeoutError):
            return None
        known = [lag for lag in lags if lag is not None]
        if len(known) < len(lags) or not known:
            return None
        return sum(events for events, _ in known), max(seconds for _, seconds in known)


async def find_source(
    archive: str | Path | None = None,
    *,
    settings: Settings | None = None,
    progress: Callable[[int, int], None] = lambda _, __: None,
) -> Source:
    """Find the source: `archive` if given, otherwise the settings' data directory, of a running or stopped system.

    A data directory without a projection is read from its archive. If no data directory is set and the default one is
    empty, a kept demo in the current directory is read. `progress` gets the number of folded events and the total.
    Errors: NothingToReport; SettingsError; ArchiveDamaged; LedgerGap; UnreadableEvent.
    """
    settings = settings or load_settings()
    if archive is not None:
        return await _folded(archive, settings.namespace, progress)
    settings = data_settings(settings)
    data_dir = settings.data_dir
    if _is_projection(data_dir):
        return Source(
            str(data_dir), data_dir / PROJECTION_FILE, settings.namespace, settings.redis_url, settings.report_memory
        )
    try:
        return await _folded(settings.archive_place, settings.namespace, progress)
    except NothingToReport:
        raise NothingToReport(
            f"there is no data in {data_dir}{os.sep} to report: start `tollbook up`, try `tollbook demo --keep`, "
            "set TOLLBOOK_DATA_DIR, or give --archive"
        ) from None


def _is_projection(data_dir: Path) -> bool:
    return (data_dir / PROJECTION_FILE).exists()


async def _folded(archive: str | Path, namespace: str, progress: Callable[[int, int], None]) -> Source:
    """Fold an archive into a temporary file."""
    try:
        ledger = LedgerSource.of_archive(archive_at(archive), namespace=namespace)
    except NoLedger as exc:
        raise NothingToReport(str(exc)) from None
    total, done = await ledger.count(), 0

    def advance(events: int) -> None:
        nonlocal done
        done += events
        progress(done, total)

    folder = tempfile.TemporaryDirectory(prefix="tollbook-report-")
    path = Path(folder.name) / PROJECTION_FILE
    store = await replay(ledger, path, progress=advance)
    await asyncio.to_thread(store.close)
    return Source(str(archive), path, namespace, folder=folder)


@dataclass(frozen=True, slots=True)
class _Position:
    partition: int
    ledger_id: str
    entry: EntryId
    seq: int


def _positions(connection: duckdb.DuckDBPyConnection) -> list[_Position]:
    rows: list[tuple[int, str, str, int]] = connection.execute(
        "SELECT partition, ledger_id, id, seq FROM position ORDER BY partition"
    ).fetchall()
    return [_Position(number, ledger_id, EntryId.parse(entry), seq) for number, ledger_id, entry, seq in rows]


async def _lag_of(redis: Redis, keys: Keys, at: _Position) -> tuple[int, float] | None:
    found = cast("list[bytes | None]", await redis.hmget(keys.meta, ["ledger_id", "removed"]))
    ledger_id, removed = found
    if ledger_id is None or ledger_id.decode() != at.ledger_id:
        return None
    behind = int(removed or 0) + await redis.xlen(keys.ledger) - at.seq
    oldest: Any = await redis.xrange(keys.ledger, min=f"({at.entry}", count=1)
    seconds, micros = await redis.time()  # pyright: ignore[reportUnknownMemberType]
    if behind <= 0 or not oldest:
        return 0, 0.0
    return behind, max(0.0, seconds + micros / 1e6 - EntryId.parse(oldest[0][0].decode()).ms / 1000)
