"""Lost events of a ledger that went back in time: its stream is compared with the copies in DuckDB and the archive.

Only reads. Events are compared by id and sequence number. The histories differ after the last event that both have.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from redis.asyncio import Redis

from tollbook.ledger.archive.known_events import KnownEvents, Row
from tollbook.ledger.errors import LedgerRefused, LedgerReplaced
from tollbook.ledger.gate.requests import Position
from tollbook.ledger.keys import Keys
from tollbook.ledger.server.servers import all_good, read_together
from tollbook.schemas.events import WITHOUT_CALL
from tollbook.schemas.identifiers import EntryId
from tollbook.schemas.upcasters import payload_object


class HistoryTrimmed(LedgerRefused):
    """The ledger and the copies differ already before the oldest event on the stream."""

    def __init__(self, partition: int, removed: int) -> None:
        super().__init__(
            f"partition {partition}: DuckDB or the archive has another history than the ledger before event {removed}, "
            "which is no longer on the stream. Nothing can be compared: restore the archive and the Redis that belong "
            "together"
        )


@dataclass(frozen=True, slots=True)
class Loss:
    """The events that one partition has lost: those after `common`, up to `known`.

    `common` is the last event that both the ledger and the copies have; `known` is the newest event of the copies;
    `head` is the newest event on the ledger. `unfinished` is the note of a recovery that was interrupted.
    """

    keys: Keys
    common: Position
    known: Position
    head: Position
    unfinished: str | None = None

    @property
    def events(self) -> int:
        """How many known events are lost."""
        return self.known.seq - self.common.seq

    @property
    def newer(self) -> int:
        """How many events on the ledger the copies do not have; 0 if nothing is lost."""
        return self.head.seq - self.common.seq if self.events else 0

    @property
    def is_whole(self) -> bool:
        """Whether nothing is lost, and no recovery is unfinished."""
        return not self.events and self.unfinished is None


@dataclass(slots=True)
class LossSummary:
    """What lost events were about. Amounts are nano-dollars, holds those that were open at the end."""

    kinds: dict[str, int] = field(default_factory=dict[str, int])
    calls: set[str] = field(default_factory=set[str])
    users: set[str] = field(default_factory=set[str])
    settled_nanousd: int = 0
    holds: dict[tuple[str, int], int] = field(default_factory=dict[tuple[str, int], int])

    def add(self, row: Row, payload: dict[str, Any]) -> None:
        """Add one lost event."""
        kind, key = row["type"], (row["call_id"], payload.get("hold", 0))
        self.kinds[kind] = self.kinds.get(kind, 0) + 1
        if row["user_id"]:
            self.users.add(row["user_id"])
        match kind:
            case "budget-reserved":
                # The extension of a hold that is not lost does not count as a lost hold.
                if payload.get("kind", "hold") == "hold" or key in self.holds:
                    self.holds[key] = self.holds.get(key, 0) + row["amount"]
            case "cost-recorded":
                self.settled_nanousd += row["amount"]
                self.holds.pop(key, None)
            case "cost-adjusted":
                self.settled_nanousd += row["amount"]
            case _:
                pass
        if kind not in WITHOUT_CALL:
            self.calls.add(row["call_id"])

    @property
    def held_nanousd(self) -> int:
        """What the lost open holds held."""
        return sum(self.holds.values())


async def find_loss(redis: Redis, keys: Keys, known: KnownEvents) -> Loss:
    """Compare one partition. Errors: LedgerReplaced; HistoryTrimmed; CopiesDiffer; ArchiveDamaged; RedisError."""
    commands = (
        ("HMGET", keys.meta, "ledger_id", "removed", "removed_to", "recovering"),
        ("XLEN", keys.ledger),
        ("XREVRANGE", keys.ledger, "+", "-", "COUNT", 1),
    )
    replies = await read_together(redis, keys.meta, commands, is_one_moment=True)
    (stored, removed, removed_to, unfinished), length, last = all_good(replies)
    if _text(stored) != known.ledger_id:
        raise LedgerReplaced(expected=known.ledger_id, found=_text(stored))
    first, trimmed_to = int(removed or 0), EntryId.parse(_text(removed_to) or "0-0")
    head = Position(EntryId.parse(_text(last[0][0])) if last else trimmed_to, first + length)
    newest = await asyncio.to_thread(known.newest, keys.partition)
    note = _text(unfinished) or None
    if newest.seq <= first or await _has(redis, keys, newest.seq, str(newest.entry)):
        return Loss(keys, newest, newest, head, note)
    ids = await asyncio.to_thread(known.ids_after, keys.partition, max(0, first - 1))
    if first and ids.get(first) != str(trimmed_to):
        raise HistoryTrimmed(keys.partition, first)  # G8
    low, high = first, newest.seq
    while high - low > 1:
        middle = (low + high) // 2
        if await _has(redis, keys, middle, ids[middle]):
            low = middle
        else:
            high = middle
    common = Position(EntryId.parse(ids[low]) if low else EntryId(0, 0), low)
    return Loss(keys, common, newest, head, note)


def summarise(loss: Loss, known: KnownEvents) -> LossSummary:
    """Return what the lost events were about. Blocks."""
    summary = LossSummary()
    for row in lost_rows(loss, known):
        summary.add(row, payload_object(row["payload"]))
    return summary


def lost_rows(loss: Loss, known: KnownEvents) -> Iterable[Row]:
    """Yield the lost events in order. Blocks."""
    if loss.events:
        for page in known.events_after(loss.keys.partition, loss.common.seq):
            yield from page


async def _has(redis: Redis, keys: Keys, seq: int, entry_id: str) -> bool:
    entries: Any = await redis.xrange(keys.ledger, min=entry_id, max=entry_id, count=1)
    return bool(entries) and int(entries[0][1][b"seq"]) == seq


def _text(value: bytes | str | None) -> str:
    return value.decode() if isinstance(value, bytes) else value or ""
