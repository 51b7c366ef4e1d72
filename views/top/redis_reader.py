"""Reads the figures of Redis at one moment, with commands of constant cost.

The ledger's stream is read from its newest entry back to the last one read before, in short pages and up to a limit.
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from tollbook.app.connect import find_redis_url
from tollbook.consumers.alerts.queue import receiver_states
from tollbook.inference.current_policy import CurrentPolicy
from tollbook.inference.settings import Settings
from tollbook.inference.user_ids import read_plain
from tollbook.ledger.errors import LedgerError, LedgerUnavailable
from tollbook.ledger.gate.requests import Position
from tollbook.ledger.gate.stops import read_stop
from tollbook.ledger.keys import GROUP, Keys, dead_letters, projector_lease, worker_key
from tollbook.ledger.server.address import hide_password
from tollbook.ledger.server.connection import connect
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.ledger.server.policy import WATCH_INTERVAL_S, ServerPolicy, missing_replicas, read_policy
from tollbook.ledger.stream import RawEntry
from tollbook.schemas.identifiers import EntryId
from tollbook.schemas.windows import Calendar
from tollbook.views.top.figures import HISTORY_S, RateFigures, RedisFigures, StreamFigures
from tollbook.views.top.tail import Move, Tail, rates

_ANSWER_S: Final = 3.0
_PAGE: Final = 500
_MAX_PAGES: Final = 20
# Names of ended workers stay in a group. If there are more names than this, they are not checked.
_MAX_NAMES: Final = 1_000


@dataclass(frozen=True, slots=True)
class Seen:
    """What Redis said, and when. `seqs`: the number of events ever appended to each partition."""

    at_s: float
    now_ms: int
    redis: RedisFigures
    rates: RateFigures
    seqs: dict[int, int]


class RedisReader:
    """Reads from Redis, and finds it again if its address changes."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._policies: CurrentPolicy | None = None
        self._redis: Redis | None = None
        self._pipeline: CommandPipeline | None = None
        self._url = ""
        self._ledger_id = ""
        self._tails: dict[int, Tail] = {}
        self._policy = ServerPolicy()
        self._policy_ends_s = -math.inf

    async def look(self) -> Seen:
        """Read everything once. Errors: LedgerUnavailable, also if there is no ledger."""
        url = find_redis_url(self._settings)
        if self._pipeline is None or url != self._url:
            await self.aclose()
            self._redis, self._url = connect(url), url
            self._pipeline = CommandPipeline(self._redis, timeout_s=_ANSWER_S)
            self._policy_ends_s = -math.inf
        try:
            return await self._ask(self._pipeline)
        except ResponseError as exc:
            raise LedgerUnavailable(f"Redis at {hide_password(url)} refuses: {exc}") from exc

    async def aclose(self) -> None:
        """Close the connection."""
        if self._pipeline is not None and self._redis is not None:
            await self._pipeline.aclose()
            await self._redis.aclose()
        self._pipeline = self._redis = self._policies = None

    def moves_after(self, seqs: dict[int, int]) -> list[Move] | None:
        """Return the movements after these events; None if they were not all read."""
        moves: list[Move] = []
        for partition, tail in self._tails.items():
            later = tail.moves_after(seqs.get(partition, 0))
            if later is None:
                return None
            moves += later
        return moves

    async def plain_ids(self, user_ids: Iterable[str]) -> dict[str, str]:
        """Return the plain ids of users' hashes, as far as they are known and Redis answers."""
        if self._pipeline is None:
            return {}
        try:
            return await read_plain(self._pipeline, Keys(self._settings.namespace), user_ids)
        except (LedgerUnavailable, RedisError):
            return {}

    async def oldest_after(self, positions: dict[int, Position]) -> int | None:
        """Return when the oldest event after these positions was appended; None if Redis does not answer."""
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
        names = await self._stream_names(pipeline, keys)
        parts, streams, letters, lease, stopped, receivers = await asyncio.gather(
            asyncio.gather(*(_partition(pipeline, key) for key in keys)),
            asyncio.gather(*(_stream(pipeline, stream, now_ms) for stream in names)),
            pipeline.execute("XLEN", dead_letters(namespace)),
            pipeline.execute("GET", projector_lease(namespace)),
            read_stop(pipeline, keys),
            receiver_states(pipeline.execute, namespace),
        )
        workers = await _workers(pipeline, namespace, names, sum(consumers for _, consumers in streams))
        policy = await self._read_policy()
        missing = missing_replicas(policy, self._settings.min_replicas)
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
            projector=None if lease is None else " at ".join(lease.decode().split("\n")[:2]),
            stopped=stopped,
            # The processes decide whether they accept an unsynced server; those that do not, say so.
            refusal=policy.refusal(allow_unsynced=True) or (None if missing is None else str(missing)),
            unsynced=None if policy.is_synced else policy.unsynced_reason(),
            failing_receivers=tuple(f"{each.name}, {each.problem}" for each in receivers if each.problem),
        )
        return Seen(time.monotonic(), now_ms, redis, rates(list(self._tails.values()), now_ms), seqs)

    async def _read_policy(self) -> ServerPolicy:
        """Return the server's persistence settings, cached for a few seconds."""
        if self._redis is not None and time.monotonic() >= self._policy_ends_s:
            try:
                self._policy = await read_policy(self._redis)
            except (RedisError, OSError, TimeoutError) as exc:
                raise LedgerUnavailable(f"Redis did not answer when asked how it keeps its data ({exc})") from exc
            self._policy_ends_s = time.monotonic() + WATCH_INTERVAL_S
        return self._policy

    async def _find_ledger(self, pipeline: CommandPipeline) -> tuple[int, list[Keys]]:
        """Return the server's clock and the keys of the ledger's partitions."""
        namespace = self._settings.namespace
        meta = Keys(namespace).meta
        now_ms, (ledger_id, partitions) = await asyncio.gather(
            pipeline.now_ms(meta), pipeline.execute("HMGET", meta, "ledger_id", "partitions")
        )
        if ledger_id is None:
            raise LedgerUnavailable(
                f"Redis at {hide_password(self._url)} has no ledger {namespace!r}: `tollbook up` or "
                "`tollbook projector` creates it"
            )
        if ledger_id.decode() != self._ledger_id:
            self._ledger_id, self._tails, self._policies = ledger_id.decode(), {}, None
        return now_ms, [Keys(namespace, n) for n in range(int(partitions))]

    @property
    def calendar(self) -> Calendar:
        """The calendar of the policy in force; until it is known, the default calendar (UTC)."""
        return Calendar() if self._policies is None else self._policies.newest.budgets.calendar

    async def _stream_names(self, pipeline: CommandPipeline, keys: list[Keys]) -> tuple[str, ...]:
        """Return the task streams of the policy in force."""
        if self._policies is None:
            self._policies = await CurrentPolicy.of_ledger(pipeline, keys)
        else:
            await self._policies.refresh()
        return tuple(self._policies.newest.policy.streams)

    async def _read_tail(self, pipeline: CommandPipeline, keys: Keys, *, now_ms: int, seq: int) -> None:
        """Read from the newest entry back to the last known one, to the start of the window, or to the page limit."""
        tail = self._tails.get(keys.partition)
        after = b"-" if tail is None or not tail.last else b"(" + tail.last
        newest_first: list[RawEntry] = []
        end, is_all = b"+", False
        for _ in range(_MAX_PAGES):
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


async def _workers(pipeline: CommandPipeline, namespace: str, streams: Sequence[str], known: int) -> int | None:
    """Count the workers that show a sign of life, among the names that the streams' groups know."""
    if known > _MAX_NAMES:
        return None
    found = await asyncio.gather(*(_if_there(pipeline.execute("XINFO", "CONSUMERS", name, GROUP)) for name in streams))
    names = {_pairs(consumer)[b"name"].decode() for consumers in found for consumer in consumers or ()}
    # One command per key, because each key has a hash slot of its own.
    return sum(await asyncio.gather(*(pipeline.execute("EXISTS", worker_key(namespace, name)) for name in names)))


async def _if_there(reply: Awaitable[Any]) -> Any:
    """Return the reply, or None if there is no such stream or group yet."""
    try:
        return await reply
    except ResponseError as exc:
        # redis-py removes the error code from the text of errors that it has a class for.
        if "no such key" in str(exc).lower() or "consumer group" in str(exc).lower():
            return None
        raise


def _pairs(reply: Any) -> dict[bytes, Any]:
    """Return a map reply as a dict; in RESP2 it is a flat list."""
    if isinstance(reply, dict):
        return cast("dict[bytes, Any]", reply)
    return dict(zip(reply[0::2], reply[1::2], strict=True))


def _ms(entry: RawEntry) -> int:
    return EntryId.parse(entry[0].decode()).ms
