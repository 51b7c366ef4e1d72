"""Reads the facts for one page of metrics: Redis, the projection, the lag. Each read has a timeout.

If a part does not answer, its metrics are left out, which Prometheus sees as absent. An unknown number is never shown
as zero.
"""

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

import duckdb
import structlog
from redis.exceptions import RedisError, ResponseError

from tollbook.consumers.alerts.queue import ReceiverState, receiver_states
from tollbook.consumers.dead_letters import DeadLetters
from tollbook.consumers.projection import ProjectionService
from tollbook.inference.runtime import LedgerHandle
from tollbook.ledger.errors import LedgerError
from tollbook.ledger.gate.stops import read_stop
from tollbook.ledger.keys import GROUP, dead_letters
from tollbook.ledger.projection.follower import Lag
from tollbook.ledger.projection.totals import Totals
from tollbook.ledger.server.connection import as_map
from tollbook.observability.single_flight import SingleFlight

T = TypeVar("T")
LIMIT_S: Final = 2.0
# If a process starts far behind (its DuckDB file was lost), its counters would rise from zero, and Prometheus would
# count the whole ledger as spent in these minutes. So counters are shown only after the fold has caught up.
_NEAR_S: Final = 60.0
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Backlog:
    """One task stream: entries on it, delivered and not acknowledged, and not yet delivered (None: unknown)."""

    entries: int
    pending: int
    unread: int | None


@dataclass(frozen=True, slots=True)
class Facts:
    """The facts that could be read; None for the others."""

    backlogs: dict[str, Backlog] | None
    dead_letters: int | None
    dead_letters_dropped: int | None
    lag: Lag | None
    discrepancies: int | None
    totals: Totals | None
    are_calls_stopped: bool | None
    receivers: list[ReceiverState] | None = None
    """The state of alert deliveries, by receiver."""


class Process(Protocol):
    """The process whose facts are read."""

    @property
    def handle(self) -> LedgerHandle | None:
        """Its ledger."""
        ...

    @property
    def projection(self) -> ProjectionService | None:
        """The projection that it folds into, if it does."""
        ...


class FactReader:
    """Reads the facts of one process. Facts of the whole ledger, except stops, are read only by the folding process.

    A process has one reader (`ProcessState.facts`), so that totals are computed once for metrics and alerts.
    """

    def __init__(self, state: Process) -> None:
        self._state = state
        self._totals: Totals | None = None
        self._advancing = SingleFlight(self._advance, keep_s=0.0)
        self._was_near = False

    async def read(self) -> Facts:
        """Read everything at once, within `LIMIT_S`."""
        handle, projection = self._state.handle, self._state.projection
        if handle is None:
            return Facts(None, None, None, None, None, None, None)
        if projection is None:
            stopped = await _within("stop", _are_calls_stopped(handle))
            return Facts(None, None, None, None, None, None, stopped)
        namespace = handle.keys[0].namespace
        stopped, streams, letters, dropped, lag, folded = await asyncio.gather(
            _within("stop", _are_calls_stopped(handle)),
            _within("streams", _backlogs(handle)),
            _within("dead letters", _length(handle, dead_letters(namespace))),
            _within("dropped dead letters", DeadLetters(handle.pipeline, namespace).dropped()),
            _within("lag", self._lag()),
            _within("projection", self._advancing.get()),
        )
        receivers = await _within("receivers", receiver_states(handle.pipeline.execute, namespace))
        discrepancies, totals = folded or (None, None)
        self._was_near = self._was_near or (lag is not None and lag.seconds < _NEAR_S)
        return Facts(
            streams, letters, dropped, lag, discrepancies, totals if self._was_near else None, stopped, receivers
        )

    async def _lag(self) -> Lag:
        assert self._state.projection is not None
        return await self._state.projection.projector.lag()

    async def _advance(self) -> tuple[int, Totals]:
        projection, handle = self._state.projection, self._state.handle
        assert projection is not None
        assert handle is not None
        if self._totals is None:
            self._totals = Totals(keys.partition for keys in handle.keys)
        totals, store = self._totals, projection.store

        def advance() -> int:
            totals.advance(store)
            return int(store.query("SELECT count(*) AS number FROM discrepancies")[0]["number"])

        return await asyncio.to_thread(advance), totals


async def _within(what: str, reading: Awaitable[T]) -> T | None:
    try:
        async with asyncio.timeout(LIMIT_S):
            return await reading
    except (LedgerError, RedisError, OSError, TimeoutError, duckdb.Error) as exc:
        # The next scrape comes in seconds; the part that failed logs why.
        _log.debug("metrics.not_read", what=what, problem=str(exc) or type(exc).__name__)
        return None


async def _are_calls_stopped(handle: LedgerHandle) -> bool:
    return await read_stop(handle.pipeline, handle.keys) is not None


async def _backlogs(handle: LedgerHandle) -> dict[str, Backlog]:
    streams = tuple(handle.policy.streams)
    found = await asyncio.gather(*(_backlog(handle, stream) for stream in streams))
    return dict(zip(streams, found, strict=True))


async def _backlog(handle: LedgerHandle, stream: str) -> Backlog:
    entries, groups = await asyncio.gather(_length(handle, stream), _groups(handle, stream))
    for reply in groups:
        group = as_map(reply)
        if group[b"name"] == GROUP.encode():
            return Backlog(entries, int(group[b"pending"]), group.get(b"lag"))
    # The group has not read this stream yet, so all entries are unread.
    return Backlog(entries, 0, entries)


async def _groups(handle: LedgerHandle, stream: str) -> list[Any]:
    try:
        return await handle.pipeline.execute("XINFO", "GROUPS", stream)
    except ResponseError:
        return []  # There is no such stream (yet).


async def _length(handle: LedgerHandle, stream: str) -> int:
    return int(await handle.pipeline.execute("XLEN", stream))
