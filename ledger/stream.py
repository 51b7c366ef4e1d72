"""Reading a ledger partition's stream: raw entries in batches, and batches as Arrow tables.

Nothing is skipped: an entry that lacks a field, is not UTF-8, or has a newer version stops
the reading, and the error names it. Columns are built and checked as a whole, since reading
must keep up with folding; only a batch that fails is checked entry by entry.
"""

import asyncio
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import pyarrow as pa
import pyarrow.compute as pc
from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.exceptions import MovedError, RedisError

from tollbook.ledger.errors import LedgerUnavailable
from tollbook.ledger.keys import Keys
from tollbook.ledger.server.connection import time_ms
from tollbook.ledger.server.servers import note_problem, server_of
from tollbook.schemas.events import ENVELOPE_FIELDS, EVENT_VERSION
from tollbook.schemas.identifiers import ZERO_ENTRY, EntryId
from tollbook.schemas.money import MAX_NANOUSD
from tollbook.schemas.upcasters import UnreadableEvent, event_from_entry, needs_upcast, upcast

RawEntry = list[Any]  # [id, [name, value, name, value, ...]], all bytes

_NAMES: Final = [name.encode() for name in ENVELOPE_FIELDS]
_CURRENT: Final = str(EVENT_VERSION).encode()
_NUMBERS: Final = ("v", "seq", "attempt", "amount", "committed")
_TIMEOUT_S: Final = 30.0
_PROBLEMS: Final = (ValueError, TypeError, IndexError, OverflowError, pa.ArrowException)


@dataclass(frozen=True, slots=True)
class Batch:
    """Entries of one partition in the order of the ledger, as Redis sent them."""

    partition: int
    entries: list[RawEntry]

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def last_id(self) -> EntryId:
        """The id of the last entry. Errors: IndexError when the batch is empty."""
        return EntryId.parse(self.entries[-1][0].decode())

    def to_table(self, *, is_upcast: bool = True) -> pa.Table:
        """Convert to a table of envelope columns, by default with payloads upcast to the current version.

        The archive keeps them as written (`is_upcast=False`). Units: `amount` and `committed` in nano-dollars, `ms`
        since the epoch. Errors: UnreadableEvent, which names the first entry that cannot be read.
        """
        try:
            return _table(self.partition, self.entries, is_upcast=is_upcast)
        except _PROBLEMS as exc:
            raise _first_unreadable(self.partition, self.entries, exc) from exc

    def first_not_plain(self, table: pa.Table) -> tuple[int, str] | None:
        """Return (row, field) of the first number that is not written as the gate writes it; None if there is none."""
        columns = list(zip(*(fields for _, fields in self.entries), strict=True))[1::2]
        for name, values in zip(ENVELOPE_FIELDS, columns, strict=True):
            if name in _NUMBERS:
                numbers = cast("list[int | None]", table[name].unique().to_pylist())
                plain = {b"" if number is None else b"%d" % number for number in numbers}
                if not set(values) <= plain:
                    return next(at for at, value in enumerate(values) if value not in plain), name
        return None


class StreamReader:
    """Reads one partition's ledger over a connection of its own.

    Errors of `read_after`: LedgerUnavailable; reading again is always safe.
    """

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis = redis
        self._keys = keys
        self._pool: ConnectionPool = redis.connection_pool
        self._connection: AbstractConnection | None = None

    @property
    def partition(self) -> int:
        """The partition that is read."""
        return self._keys.partition

    async def read_after(
        self, after: EntryId = ZERO_ENTRY, *, count: int, block_ms: int | None = None, until: EntryId | None = None
    ) -> Batch:
        """Read up to `count` entries after `after`; with `block_ms`, wait that long for the first one.

        `until` is the last entry wanted; it has no effect with `block_ms`.
        """
        ledger = self._keys.ledger
        if block_ms is None:
            entries: Any = await self._ask(0, "XRANGE", ledger, f"({after}", str(until or "+"), "COUNT", count)
        else:
            reply: Any = await self._ask(
                block_ms, "XREAD", "COUNT", count, "BLOCK", block_ms, "STREAMS", ledger, str(after)
            )
            entries = _streams(reply)
        return Batch(self._keys.partition, cast("list[RawEntry]", entries or []))

    async def now_ms(self) -> int:
        """Return the Redis clock, which is the ledger's."""
        return time_ms(await self._ask(0, "TIME"))

    async def aclose(self) -> None:
        """Close the connection and return it to its pool."""
        connection, self._connection = self._connection, None
        if connection is not None:
            # Closed, since the reply to a cancelled command may still come.
            await connection.disconnect(nowait=True)
            await self._pool.release(connection)

    async def _ask(self, block_ms: int, *command: str | int) -> Any:
        try:
            return await self._ask_once(block_ms, *command)
        except MovedError:
            # The partition has moved to another node, which the client knows by now (`note_problem`).
            return await self._ask_once(block_ms, *command)

    async def _ask_once(self, block_ms: int, *command: str | int) -> Any:
        try:
            if self._connection is None:
                self._pool = (await server_of(self._redis, self._keys.ledger)).connection_pool
                self._connection = await self._pool.get_connection()
            await self._connection.send_command(*command)
            # The timeout is here and not in redis-py (8.1), which would return None and keep the connection: the next
            # command would get the late reply of this one.
            async with asyncio.timeout(_TIMEOUT_S + block_ms / 1000):
                # `Redis.execute_command` is not used, since it builds a dict for every entry.
                return cast("Any", await self._connection.read_response(disable_decoding=True, timeout=math.inf))
        except MovedError as exc:
            await self.aclose()
            note_problem(self._redis, exc)
            raise
        except (RedisError, OSError) as exc:
            await self.aclose()
            note_problem(self._redis, exc)
            raise LedgerUnavailable(f"the ledger cannot be read ({type(exc).__name__}: {exc})") from exc
        except BaseException:
            await self.aclose()
            raise


def _streams(reply: Any) -> list[RawEntry]:
    """Return the entries of the only stream: a mapping in RESP3, pairs in RESP2, None after the timeout."""
    streams = cast("dict[bytes, list[RawEntry]]", dict(reply or ()))
    return next(iter(streams.values()), list[RawEntry]())


def _table(partition: int, entries: list[RawEntry], *, is_upcast: bool = True) -> pa.Table:
    ids, fields = zip(*entries, strict=True) if entries else ((), ())
    columns = list(zip(*fields, strict=True)) if entries else [()] * (2 * len(ENVELOPE_FIELDS))
    # `count` compares, which takes a third of the time of a set.
    if len(columns) != 2 * len(_NAMES) or any(
        found.count(name) != len(entries) for found, name in zip(columns[0::2], _NAMES, strict=True)
    ):
        raise ValueError("the fields are not those of an event")
    kind, v, seq, user_id, period, call_id, attempt, amount, committed, payload = columns[1::2]
    if is_upcast and v.count(_CURRENT) != len(entries):
        payload = _upcast(kind, v, payload)
    entry_id = _text(ids)
    parts = pc.split_pattern(entry_id, "-")
    amounts = _integers(amount)
    _check_bounds(amounts)
    return pa.table(  # pyright: ignore[reportUnknownMemberType]
        {
            "partition": pa.repeat(pa.scalar(partition, pa.int32()), len(entries)),
            "id": entry_id,
            "ms": pc.list_element(parts, 0).cast(pa.int64()),
            "n": pc.list_element(parts, 1).cast(pa.int64()),
            "seq": _integers(seq),
            "type": _text(kind),
            "v": _integers(v).cast(pa.int32()),
            "user_id": _text(user_id),
            "period": _text(period),
            "call_id": _text(call_id),
            "attempt": _integers(attempt).cast(pa.int32()),
            "amount": amounts,
            "committed": _integers([value or None for value in committed]),
            "payload": _text(payload),
        }
    )


def _text(values: Sequence[bytes | None]) -> pa.StringArray:
    # Arrow checks that the bytes are UTF-8.
    return pa.array(values, pa.string())


def _integers(values: Sequence[bytes | None]) -> pa.Int64Array:
    return cast("pa.Int64Array", _text(values).cast(pa.int64()))


def upcast_table(events: pa.Table) -> pa.Table:
    """Return archived events with their payloads upcast to the current version."""
    if set(events["v"].unique().to_pylist()) <= {EVENT_VERSION}:
        return events
    kind, v, payload = (
        [str(value).encode() for value in cast("list[Any]", events[name].to_pylist())]
        for name in ("type", "v", "payload")
    )
    return events.set_column(events.schema.get_field_index("payload"), "payload", _text(_upcast(kind, v, payload)))


def _check_bounds(amounts: pa.Int64Array) -> None:
    bounds = cast("dict[str, int | None]", pc.min_max(amounts).as_py())
    if max(abs(bounds["min"] or 0), abs(bounds["max"] or 0)) > MAX_NANOUSD:
        raise ValueError("an amount is out of bounds")


def _upcast(kinds: Sequence[bytes], versions: Sequence[bytes], payloads: Sequence[bytes]) -> Sequence[bytes]:
    """Upcast payloads where that changes them; the others are not parsed."""
    old = {(kind, v) for kind, v in set(zip(kinds, versions, strict=True)) if needs_upcast(kind.decode(), int(v))}
    if not old:
        return payloads
    rows = zip(kinds, versions, payloads, strict=True)
    return [_upcast_payload(kind, v, payload) if (kind, v) in old else payload for kind, v, payload in rows]


def _upcast_payload(kind: bytes, version: bytes, payload: bytes) -> bytes:
    written = json.loads(payload)
    current = upcast(kind.decode(), int(version), written)
    if current == written:
        return payload  # Byte for byte as it was written, so that a lost event can be restored from DuckDB.
    return json.dumps(current, separators=(",", ":"), ensure_ascii=False).encode()


def _first_unreadable(partition: int, entries: list[RawEntry], problem: Exception) -> UnreadableEvent:
    """Find the first entry that cannot be converted, and what is wrong with it."""
    for raw_id, raw in entries:
        entry_id = raw_id.decode("utf-8", "replace")
        try:
            _table(partition, [[raw_id, raw]])
        except _PROBLEMS as exc:
            try:
                texts = [part.decode() for part in raw]
                event_from_entry(entry_id, dict(zip(texts[0::2], texts[1::2], strict=True)))
            except UnreadableEvent as problem_of_entry:
                return problem_of_entry
            except ValueError as found:
                return UnreadableEvent(entry_id, str(found))
            return UnreadableEvent(entry_id, str(exc))
    raise problem
