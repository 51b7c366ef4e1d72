"""Reading everything the live view shows: the only module of it that speaks to Redis, to files and to clocks.

Made not to be felt. To Redis go commands of constant cost, and the ledger's stream is read from its newest entry back
to where it was read before, in short pages and not without end. Spend comes from a copy of the projection, which is
read in this process; it is made a few seconds after the last at the earliest, later where copying takes long, and not
at all while the file stays as it is. Nothing here raises because a part is away: what is wrong is told with the
figures, beside what was seen last.
"""

import asyncio
import time
from collections.abc import Awaitable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, cast

import duckdb
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from tollbook.app.connect import find_redis_url
from tollbook.inference.settings import Settings
from tollbook.ledger.errors import LedgerError, LedgerUnavailable
from tollbook.ledger.gate.requests import Position
from tollbook.ledger.keys import GROUP, Keys, dead_letters, projector_lease, worker_key
from tollbook.ledger.projection.snapshot import open_snapshot
from tollbook.ledger.server.connection import connect, hide_password
from tollbook.ledger.server.endpoint import read_endpoint
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.ledger.stream import RawEntry
from tollbook.schemas.identifiers import EntryId, month_at
from tollbook.schemas.tasks import TaskStream
from tollbook.views.top.figures import (
    HISTORY_S,
    Figures,
    Problem,
    RateFigures,
    RedisFigures,
    SpendFigures,
    StreamFigures,
    UserFigures,
)
from tollbook.views.top.problems import find_problems
from tollbook.views.top.spend import brought_up_to_date
from tollbook.views.top.tail import Move, Tail, rates

_ANSWER_S: Final = 3.0
_PAGE: Final = 500
_MOST_PAGES: Final = 20
_COPY_EVERY_S: Final = 5.0
# A copy of a large projection takes long; it may take one part in twenty of the time at most.
_COPY_SHARE: Final = 20
_FIRST_COPY_S: Final = 1.0
_USERS: Final = 50
# Names of workers that are gone stay in a group; beyond so many, it is not asked which are alive.
_MOST_NAMES: Final = 1_000

_TOTALS: Final = """
SELECT count(*), coalesce(sum(nanousd(spent_usd)), 0), coalesce(sum(nanousd(reserved_usd)), 0),
    coalesce(sum(calls), 0), coalesce(sum(denied), 0), coalesce(sum(fallbacks), 0)
FROM spend WHERE period = $period
"""
_TOP: Final = """
SELECT user_id, plan, nanousd(spent_usd), nanousd(reserved_usd), nanousd(cap_usd), calls, denied, fallbacks
FROM spend WHERE period = $period
"""
_BY_SPEND: Final = f"{_TOP} ORDER BY spent_usd DESC, user_id LIMIT {_USERS}"
# Parts of a cap are compared as estimates; no decision reads them.
_BY_USE: Final = (
    f"{_TOP} ORDER BY spent_usd::DOUBLE / nullif(cap_usd, 0)::DOUBLE DESC NULLS LAST, user_id LIMIT {_USERS}"
)

_Signature = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Copy:
    """A copy of the projection, read. While the file is as `signature` says, the copy is as of now."""

    at_s: float
    took_s: float
    signature: _Signature
    spend: SpendFigures
    positions: dict[int, Position]
    seen: "Seen | None"
    """What Redis had said right before."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What Redis said, and when. `seqs` are the events ever appended to each partition."""

    at_s: float
    now_ms: int
    redis: RedisFigures
    rates: RateFigures
    seqs: dict[int, int]


@dataclass(frozen=True, slots=True)
class _Lag:
    """How far the fold was behind when a copy was made; None where that is not known."""

    at_s: float
    events: int | None
    seconds: float | None


class Gatherer:
    """Gathers the figures of one system, again and again, until `aclose`.

    It finds a server that was started anew at another address by the settings and the data directory.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._redis = _RedisReader(settings)
        self._projection = _ProjectionReader(settings.data_dir / "tollbook.duckdb")
        self._seen: Seen | None = None
        self._lag = _Lag(-1.0, None, None)

    async def check(self) -> None:
        """See that there is something to look at, or will be.

        Errors: LedgerUnavailable where nothing runs here, and there is neither a ledger nor a projection.
        """
        if self._projection.path.exists() or read_endpoint(self._settings.data_dir) is not None:
            return
        self._seen = await self._redis.look()

    async def gather(self, *, must_copy: bool = False) -> Figures:
        """Read everything once; `must_copy` waits for the copy of the projection, however long it takes."""
        problem: Problem | None = None
        try:
            self._seen = await self._redis.look()
        except LedgerError as exc:
            problem = Problem("person", str(exc))
        seen = self._seen
        copy = await self._projection.read(seen, must_copy=must_copy)
        now_s = time.monotonic()
        figures = Figures(
            at_ms=_clock_ms() if problem or seen is None else seen.now_ms,
            namespace=self._settings.namespace,
            data_dir=str(self._settings.data_dir.resolve()),
            problems=(),
            redis=None if seen is None else replace(seen.redis, age_s=now_s - seen.at_s),
            rates=None if seen is None else replace(seen.rates, age_s=now_s - seen.at_s),
            spend=None if copy is None else await self._spend(copy, seen, now_s),
        )
        told = () if problem is None else (problem,)
        if self._projection.problem is not None:
            told = (*told, Problem("person", self._projection.problem))
        return replace(figures, problems=(*told, *find_problems(figures, is_answered=problem is None)))

    async def aclose(self) -> None:
        """Let go of Redis; a copy that is being made is waited for, since its folder is removed with it."""
        await self._projection.aclose()
        await self._redis.aclose()

    async def _spend(self, copy: Copy, seen: Seen | None, now_s: float) -> SpendFigures:
        if self._lag.at_s != copy.at_s:
            self._lag = await self._measure_lag(copy)
        lag = self._lag
        spend = replace(copy.spend, age_s=now_s - copy.at_s, lag_events=lag.events, lag_s=lag.seconds)
        if seen is None or seen.redis.ledger_id != spend.ledger_id:
            return spend
        moves = self._redis.moves_after({partition: position.seq for partition, position in copy.positions.items()})
        return spend if moves is None else brought_up_to_date(spend, moves, events=max(0, seen.redis.seq - spend.seq))

    async def _measure_lag(self, copy: Copy) -> "_Lag":
        """Say how far the fold was behind what Redis said right before the copy was made."""
        seen, positions = copy.seen, copy.positions
        if seen is None or seen.redis.ledger_id != copy.spend.ledger_id:
            return _Lag(copy.at_s, None, None)
        behind = {number: seq - positions[number].seq for number, seq in seen.seqs.items() if number in positions}
        events = sum(max(0, number) for number in behind.values())
        if not events:
            return _Lag(copy.at_s, 0, 0.0)
        waiting = {number: positions[number] for number, by in behind.items() if by > 0}
        oldest_ms = await self._redis.oldest_after(waiting)
        seconds = None if oldest_ms is None else max(0.0, (seen.now_ms - oldest_ms) / 1000)
        return _Lag(copy.at_s, events, seconds)


class _RedisReader:
    """Asks Redis, wherever it is now. Errors of `look`: LedgerUnavailable, where no ledger can be seen."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._redis: Redis | None = None
        self._pipeline: CommandPipeline | None = None
        self._url = ""
        self._ledger_id = ""
        self._tails: dict[int, Tail] = {}

    async def look(self) -> Seen:
        url = find_redis_url(self._settings)
        if self._pipeline is None or url != self._url:
            await self.aclose()
            self._redis, self._url = connect(url), url
            self._pipeline = CommandPipeline(self._redis, timeout_s=_ANSWER_S)
        try:
            return await self._ask(self._pipeline)
        except ResponseError as exc:
            raise LedgerUnavailable(f"Redis at {hide_password(url)} refuses: {exc}") from exc

    async def aclose(self) -> None:
        if self._pipeline is not None and self._redis is not None:
            await self._pipeline.aclose()
            await self._redis.aclose()
        self._pipeline = self._redis = None

    def moves_after(self, seqs: dict[int, int]) -> list[Move] | None:
        """Return what moved after these events; None where that goes further back than was read."""
        moves: list[Move] = []
        for partition, tail in self._tails.items():
            later = tail.moves_after(seqs.get(partition, 0))
            if later is None:
                return None
            moves += later
        return moves

    async def oldest_after(self, positions: dict[int, Position]) -> int | None:
        """Return when the oldest of the events after these was appended; None where Redis does not say."""
        if self._pipeline is None:
            return None
        ledgers = [(Keys(self._settings.namespace, number).ledger, at.entry) for number, at in positions.items()]
        try:
            pages = await asyncio.gather(
                *(self._pipeline.execute("XRANGE", ledger, f"({entry}", "+", "COUNT", 1) for ledger, entry in ledgers)
            )
        except (LedgerError, ResponseError):
            return None
        return min((_ms(page[0]) for page in pages if page), default=None)

    async def _ask(self, pipeline: CommandPipeline) -> Seen:
        namespace, now_ms, keys = self._settings.namespace, *await self._find_ledger(pipeline)
        parts, streams, letters, lease = await asyncio.gather(
            asyncio.gather(*(_partition(pipeline, key) for key in keys)),
            asyncio.gather(*(_stream(pipeline, stream.value, now_ms) for stream in TaskStream)),
            pipeline.execute("XLEN", dead_letters(namespace)),
            pipeline.execute("GET", projector_lease(namespace)),
        )
        workers = await _workers(pipeline, namespace, sum(consumers for _, consumers in streams))
        seqs = {key.partition: seq for key, (seq, _, _) in zip(keys, parts, strict=True)}
        for key in keys:
            await self._read_tail(pipeline, key, now_ms=now_ms, seq=seqs[key.partition])
        redis = RedisFigures(
            url=hide_password(self._url),
            age_s=0.0,
            ledger_id=self._ledger_id,
            seq=sum(seqs.values()),
            streams=tuple(stream for stream, _ in streams),
            open_holds=sum(holds for _, holds, _ in parts),
            budgets_waited_for=sum(waiters for _, _, waiters in parts),
            dead_letters=int(letters),
            workers=workers,
            projector=None if lease is None else lease.decode().replace("\n", " at "),
        )
        return Seen(time.monotonic(), now_ms, redis, rates(list(self._tails.values()), now_ms), seqs)

    async def _find_ledger(self, pipeline: CommandPipeline) -> tuple[int, list[Keys]]:
        """Return the server's clock and the keys of the ledger's partitions."""
        namespace = self._settings.namespace
        (seconds, micros), (ledger_id, partitions) = await asyncio.gather(
            pipeline.execute("TIME"), pipeline.execute("HMGET", Keys(namespace).meta, "ledger_id", "partitions")
        )
        if ledger_id is None:
            raise LedgerUnavailable(
                f"Redis at {hide_password(self._url)} holds no ledger {namespace!r}: `tollbook up` or "
                "`tollbook projector` makes it"
            )
        if ledger_id.decode() != self._ledger_id:
            self._ledger_id, self._tails = ledger_id.decode(), {}
        return int(seconds) * 1000 + int(micros) // 1000, [Keys(namespace, n) for n in range(int(partitions))]

    async def _read_tail(self, pipeline: CommandPipeline, keys: Keys, *, now_ms: int, seq: int) -> None:
        """Read from the newest entry back to the last one known, to the window's end, or as far as is read at all."""
        tail = self._tails.get(keys.partition)
        after = b"-" if tail is None or not tail.last else b"(" + tail.last
        newest_first: list[RawEntry] = []
        end, is_all = b"+", False
        for _ in range(_MOST_PAGES):
            page: list[RawEntry] = await pipeline.execute("XREVRANGE", keys.ledger, end, after, "COUNT", _PAGE)
            newest_first += page
            is_all = len(page) < _PAGE
            if is_all or (tail is None and _ms(page[-1]) < now_ms - 1000 * (HISTORY_S + 1)):
                break
            end = b"(" + page[-1][0]
        entries = newest_first[::-1]
        if tail is not None and is_all:
            tail.extend(entries)
        else:
            self._tails[keys.partition] = Tail(entries, is_all=is_all, seq=seq)


async def _partition(pipeline: CommandPipeline, keys: Keys) -> tuple[int, int, int]:
    """Return how many events were ever appended, how many holds are open, and how many budgets are waited for."""
    removed, length, holds, waiters = await asyncio.gather(
        pipeline.execute("HGET", keys.meta, "removed"),
        pipeline.execute("XLEN", keys.ledger),
        pipeline.execute("ZCARD", keys.holds),
        pipeline.execute("HLEN", keys.waiters),
    )
    return int(removed or 0) + int(length), int(holds), int(waiters)


async def _stream(pipeline: CommandPipeline, name: str, now_ms: int) -> tuple[StreamFigures, int]:
    """Return a stream's figures, and how many names of workers its group knows."""
    length, groups, pending = await asyncio.gather(
        pipeline.execute("XLEN", name),
        _if_there(pipeline.execute("XINFO", "GROUPS", name)),
        _if_there(pipeline.execute("XPENDING", name, GROUP)),
    )
    group = next((found for found in map(_pairs, groups or ()) if found[b"name"] == GROUP.encode()), None)
    count, oldest = (0, None) if pending is None else pending[:2]
    stream = StreamFigures(
        name=name,
        length=int(length),
        waiting=int(length) if group is None else group[b"lag"],
        pending=int(count),
        oldest_pending_s=None if oldest is None else max(0.0, (now_ms - EntryId.parse(oldest.decode()).ms) / 1000),
    )
    return stream, 0 if group is None else int(group[b"consumers"])


async def _workers(pipeline: CommandPipeline, namespace: str, known: int) -> int | None:
    """Count the workers that show a sign of life, among the names that the streams' groups know."""
    if known > _MOST_NAMES:
        return None
    found = await asyncio.gather(
        *(_if_there(pipeline.execute("XINFO", "CONSUMERS", name.value, GROUP)) for name in TaskStream)
    )
    names = {_pairs(consumer)[b"name"].decode() for consumers in found for consumer in consumers or ()}
    return int(await pipeline.execute("EXISTS", *(worker_key(namespace, name) for name in names))) if names else 0


async def _if_there(reply: Awaitable[Any]) -> Any:
    """Return the reply, or None where there is no such stream or group yet."""
    try:
        return await reply
    except ResponseError as exc:
        # redis-py takes the code off the text of the errors it has a class for.
        if "no such key" in str(exc).lower() or "consumer group" in str(exc).lower():
            return None
        raise


def _pairs(reply: Any) -> dict[bytes, Any]:
    """Return a map, which is a flat list in RESP2."""
    if isinstance(reply, dict):
        return cast("dict[bytes, Any]", reply)
    return dict(zip(reply[0::2], reply[1::2], strict=True))


def _ms(entry: RawEntry) -> int:
    return EntryId.parse(entry[0].decode()).ms


class _ProjectionReader:
    """Reads a copy of the projection now and then; `problem` is why there is no newer one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problem: str | None = None
        self._copy: Copy | None = None
        self._copying: asyncio.Task[Copy] | None = None
        self._next_s = 0.0

    async def read(self, seen: Seen | None, *, must_copy: bool) -> Copy | None:
        """Return the latest copy. Only the first is waited for a little; later ones come when they are made."""
        copy, now_s = self._copy, time.monotonic()
        period = month_at(_clock_ms() if seen is None else seen.now_ms).name
        if copy is not None and copy.signature == _signature(self.path, period):
            # The file is what was copied, so that the copy is as of now.
            self._copy = copy = replace(copy, at_s=now_s, seen=seen)
        elif self._copying is None and (must_copy or now_s >= self._next_s):
            self._copying = asyncio.create_task(asyncio.to_thread(read_copy, self.path, period, seen))
        if self._copying is not None:
            is_first = copy is None and self.problem is None
            await asyncio.wait([self._copying], timeout=None if must_copy else _FIRST_COPY_S if is_first else 0)
            if self._copying.done():
                self._take(self._copying)
                self._copying = None
        return self._copy

    async def aclose(self) -> None:
        """Wait for the copy that is being made."""
        if self._copying is not None:
            await asyncio.wait([self._copying])
            self._take(self._copying)

    def _take(self, copying: asyncio.Task[Copy]) -> None:
        try:
            self._copy, self.problem = copying.result(), None
        except (LedgerError, duckdb.Error, OSError) as exc:
            self.problem, took_s = str(exc).partition("\n")[0], 0.0
        else:
            took_s = self._copy.took_s
        self._next_s = time.monotonic() + max(_COPY_EVERY_S, _COPY_SHARE * took_s)


def read_copy(path: Path, period: str, seen: Seen | None) -> Copy:
    """Copy the projection and read the copy. Blocks. Errors: LedgerUnavailable; duckdb.Error; OSError."""
    at_s, signature = time.monotonic(), _signature(path, period)
    with open_snapshot(path) as connection:
        rows = connection.execute("SELECT partition, id, seq, ledger_id FROM position").fetchall()
        positions = {partition: Position(EntryId.parse(entry), seq) for partition, entry, seq, _ in rows}
        discrepancies = connection.execute("SELECT count(*) FROM discrepancies").fetchall()[0][0]
        totals = connection.execute(_TOTALS, {"period": period}).fetchall()[0]
        by_spend, by_use = (connection.execute(sql, {"period": period}).fetchall() for sql in (_BY_SPEND, _BY_USE))
    users, spent, held, calls, denied, fallbacks = map(int, totals)
    spend = SpendFigures(
        age_s=0.0,
        period=period,
        ledger_id=rows[0][3] if rows else "",
        seq=sum(position.seq for position in positions.values()),
        is_current=False,
        newer_events=0,
        users=users,
        spent_nanousd=spent,
        held_nanousd=held,
        calls=calls,
        denied=denied,
        fallbacks=fallbacks,
        discrepancies=int(discrepancies),
        by_spend=tuple(UserFigures(*row) for row in by_spend),
        by_use=tuple(UserFigures(*row) for row in by_use),
        lag_events=None,
        lag_s=None,
    )
    return Copy(at_s, time.monotonic() - at_s, signature, spend, positions, seen)


def _signature(path: Path, period: str) -> _Signature:
    """Return what changes whenever the file, its log or the period does."""
    parts = [period]
    for file in (path, path.with_name(path.name + ".wal")):
        try:
            status = file.stat()
        except OSError:
            parts.append("")
        else:
            parts.append(f"{status.st_ino} {status.st_size} {status.st_mtime_ns}")
    return tuple(parts)


def _clock_ms() -> int:
    return time.time_ns() // 1_000_000
