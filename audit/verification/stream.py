"""Verification of a partition's stream: its entries, its copy of archived events, and the gate's own balances.

Reads while the gate, the projector and the sealer work. Events appended after the end was
looked up are left for the next verification.
"""

from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Final, cast

import pyarrow as pa
from redis.asyncio import Redis

from tollbook.audit.verification.chain import Chain, Events, check_order
from tollbook.audit.verification.findings import Findings
from tollbook.ledger.errors import LedgerReplaced
from tollbook.ledger.keys import Keys
from tollbook.ledger.server.servers import read_together
from tollbook.ledger.stream import Batch, StreamReader
from tollbook.schemas.identifiers import EntryId
from tollbook.schemas.upcasters import UnreadableEvent

_PAGE: Final = 10_000


@dataclass(frozen=True, slots=True)
class StreamEnd:
    """What Redis holds of a partition at one moment: `seq` events in all, `removed` of them trimmed off the stream.

    `removed_to` is the last of those, as `meta` says; `first_id` the first that is left.
    """

    seq: int
    last_id: str
    generated_id: str
    removed: int
    removed_to: str
    first_id: str
    sealed_seq: int
    sealed_chain: str
    open_calls: frozenset[str]


async def stream_end(redis: Redis, keys: Keys, ledger_id: str) -> StreamEnd:
    """Look up the end of a partition's stream. Errors: LedgerReplaced; RedisError."""
    ledger = keys.ledger
    commands: list[tuple[str | int, ...]] = [
        ("HMGET", keys.meta, "ledger_id", "removed", "sealed_seq", "sealed_chain", "removed_to"),
        ("XLEN", ledger),
        ("XRANGE", ledger, "-", "+", "COUNT", 1),
        ("XREVRANGE", ledger, "+", "-", "COUNT", 1),
        ("XINFO", "STREAM", ledger),
        ("ZRANGE", keys.holds, 0, -1),
    ]
    meta, length, first, newest, about, holds = await read_together(redis, ledger, commands, is_one_moment=True)
    found, removed, sealed_seq, sealed_chain, removed_to = (_decoded(value) for value in meta)
    if found != ledger_id:
        raise LedgerReplaced(expected=ledger_id, found=found)
    last_id = _decoded(newest[0][0]) if newest else "0-0"
    generated = last_id if isinstance(about, Exception) else _decoded(_member(about, "last-generated-id"))
    return StreamEnd(
        seq=int(removed or 0) + int(length),
        last_id=last_id,
        generated_id=generated,
        removed=int(removed or 0),
        removed_to=removed_to or "0-0",
        first_id=_decoded(first[0][0]) if first else "",
        sealed_seq=int(sealed_seq or 0),
        sealed_chain=sealed_chain,
        open_calls=frozenset(_decoded(call) for call in holds),
    )


class StreamWalk:
    """Reads a partition's stream up to its end."""

    def __init__(self, redis: Redis, keys: Keys, end: StreamEnd, chain: Chain) -> None:
        self._redis = redis
        self._keys = keys
        self._reader = StreamReader(redis, keys)
        self._chain = chain
        self._findings = chain.findings
        self.end = end
        self.compared = 0
        self.unsealed = 0
        self.is_broken = False

    async def aclose(self) -> None:
        """Give the connection back."""
        await self._reader.aclose()

    async def removed(self) -> int:
        """Return how many events have been trimmed off the stream by now."""
        return int(cast("bytes | None", await self._redis.hget(self._keys.meta, "removed")) or 0)

    async def next_events(self) -> Events | None:
        """Return the next events beyond the archive; None if the stream ends or breaks, or was trimmed past them."""
        left = self.end.seq - self._chain.seq
        if left <= 0:
            return None
        tables: list[pa.Table] = []
        after = EntryId.parse(self._chain.last_id)
        while left > 0 and sum(table.num_rows for table in tables) < 20 * _PAGE:
            batch = await self._reader.read_after(after, count=min(left, _PAGE))
            if not batch:
                break
            try:
                tables.append(self._table(batch))
            except UnreadableEvent as exc:
                self._findings.add("stream", str(exc), partition=self._chain.partition, event_id=exc.entry_id)
                self.is_broken = True
                return None
            after, left = batch.last_id, left - len(batch)
        if not tables:
            return None
        table = pa.concat_tables(tables)
        if table["seq"][0].as_py() > self._chain.seq + 1 and await self.removed() > self._chain.seq:
            return None
        if not check_order(table, self._chain, segment=None):
            self.is_broken = True
            return None
        self._chain.take(table, segment=None)
        self.unsealed += table.num_rows
        return Events(table, None)

    async def compare(self, events: Events, after: str) -> None:
        """Compare the stream's copy of archived events, those after the entry `after`, with the archive's."""
        removed = self.end.removed
        if removed >= events.last_seq:
            return
        archived = events.table.slice(max(0, removed + 1 - events.first_seq))
        entry, tables, last = EntryId.parse(after), list[pa.Table](), EntryId.parse(events.last_id)
        try:
            while batch := await self._reader.read_after(entry, count=_PAGE, until=last):
                tables.append(self._table(batch))
                entry = batch.last_id
        except UnreadableEvent as exc:
            self._findings.add("stream", str(exc), partition=self._chain.partition, event_id=exc.entry_id)
            return
        if await self.removed() > removed:
            return  # Trimmed meanwhile. The sealer trims only what it has read back and verified.
        streamed = pa.concat_tables(tables) if tables else archived.slice(0, 0)
        self.compared += archived.num_rows
        if not streamed.equals(archived):  # audits G7
            self._note_difference(streamed, archived, events.segment)

    def _note_difference(self, streamed: pa.Table, archived: pa.Table, segment: str | None) -> None:
        pairs = zip_longest(streamed.to_pylist(), archived.to_pylist(), fillvalue=dict[str, Any]())
        there, sealed = next((first, second) for first, second in pairs if first != second)
        if not sealed:
            problem = "is on the stream but not in the archive"
        elif not there:
            problem = "is archived, the stream ends before it"
        elif there["id"] != sealed["id"]:
            problem = f"is archived, the stream has {there['id']} in its place"
        else:
            names = [name for name in sealed if there[name] != sealed[name]]
            problem = f"differs between stream and archive in {', '.join(names)}"
        event = sealed or there
        self._findings.add(
            "stream",
            problem,
            partition=self._chain.partition,
            segment=segment,
            seq=event["seq"],
            event_id=event["id"],
        )

    def _table(self, batch: Batch) -> pa.Table:
        table = batch.to_table(is_upcast=False)
        found = batch.first_not_plain(table)
        if found is not None:
            row, name = found
            self._findings.add(
                "stream",
                f"{name} is not written in plain decimal",
                partition=self._chain.partition,
                seq=cast("int", table["seq"][row].as_py()),
                event_id=cast("str", table["id"][row].as_py()),
            )
        return table


def check_open(open_holds: list[dict[str, Any]], end: StreamEnd, partition: int, findings: Findings) -> None:
    """Compare the gate's list of open holds with those of the events (G2)."""
    recorded = {str(hold["call_id"]): hold for hold in open_holds if hold["partition"] == partition}
    for call_id, hold in recorded.items():
        if call_id not in end.open_calls:  # audits G3
            problem = f"hold {hold['hold']} of call {call_id} is open, and the gate does not know it"
            findings.add("hold", problem, partition=partition, seq=hold["seq"], event_id=hold["id"])
    for call_id in sorted(end.open_calls - set(recorded)):  # audits G2
        findings.add("hold", f"the gate has an open hold of call {call_id}, the events have none", partition=partition)


def _member(about: Any, name: str) -> Any:
    if isinstance(about, dict):
        members = cast("dict[Any, Any]", about)
        return members.get(name, members.get(name.encode()))
    flat = [_decoded(part) if isinstance(part, bytes) else part for part in cast("list[Any]", about)]
    return flat[flat.index(name) + 1]


def _decoded(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value or "")
