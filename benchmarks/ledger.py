"""Ledgers of millions of events, made in seconds: every type, every outcome, several periods, thousands of users.

Drawn from a seed by DuckDB (benchmarks/sql) and stamped as by the gate, so that `verify` finds
nothing. The gate itself would take hours to write them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self, cast

import duckdb
import pyarrow as pa

from tollbook.ledger.archive import chain
from tollbook.ledger.archive.manifests import Manifest
from tollbook.ledger.archive.segments import Archive
from tollbook.ledger.stream import Batch
from tollbook.schemas.events import ENVELOPE_FIELDS, SegmentSealed, payload_json

_SQL: Final = Path(__file__).parent / "sql"
_SCHEMA: Final = Batch(0, []).to_table().schema
_START_MS: Final = 1_785_542_400_000  # 2026-08-01
_SPAN_MS: Final = 92 * 86_400_000  # Three months.
# A call takes three events on average, and some of the last ones are cut off.
_EVENTS_A_CALL: Final = 2.7


@dataclass(frozen=True, slots=True)
class MadeLedger:
    """A drawn ledger, which can be written out. Without `segment`, nothing in it is sealed."""

    connection: duckdb.DuckDBPyConnection
    ledger_id: str
    events: int
    segment: int

    @classmethod
    def draw(cls, events: int, *, users: int = 5_000, seed: int = 1, segment: int = 0, ledger_id: str = "made") -> Self:
        """Draw a ledger of `events` events; `segment` is the number of events in each sealed segment."""
        connection = duckdb.connect()
        settings = {
            "seed": seed, "users": users, "events": events, "segment": segment, "start_ms": _START_MS,
            "span_ms": _SPAN_MS, "calls": max(50, int(events / _EVENTS_A_CALL)),
        }  # fmt: skip
        for name, value in settings.items():
            connection.execute(f"SET VARIABLE {name} = {value}")
        connection.execute((_SQL / "ledger_plan.sql").read_text(encoding="utf-8"))
        return cls(connection, ledger_id, events, segment)

    def tables(self, size: int) -> Iterator[pa.Table]:
        """Yield the events that were not sealed, in tables of `size` envelope columns."""
        sql = (_SQL / "ledger_events.sql").read_text(encoding="utf-8")
        for first in range(1, self.events + 1, size):
            given = {"first": first, "last": min(first + size - 1, self.events)}
            yield self.connection.execute(sql, given).to_arrow_table().cast(_SCHEMA)

    def open_holds(self) -> list[tuple[str, int]]:
        """Return the calls whose last hold is not settled, each with a deadline."""
        sql = """
            SELECT 'call-' || call, min(begun_ms) + 600000 FROM plan GROUP BY call
            HAVING count(*) FILTER (step IN ('hold', 'hold2'))
                > count(*) FILTER (step IN ('taken_over', 'done', 'over', 'failed', 'expired'))
        """
        return self.connection.execute(sql).fetchall()

    def write(self, archive: Archive) -> pa.Table:
        """Seal whole segments, and return the events that are left."""
        head, told = chain.genesis(self.ledger_id, 0), None
        rest = _SCHEMA.empty_table()
        for drawn in self.tables(self.segment):
            events = drawn if told is None else _with_news(drawn, told)
            if events.num_rows < self.segment:
                rest = events
                break
            told = archive.write(events, ledger_id=self.ledger_id, partition=0, head=head).manifest
            head = bytes.fromhex(told.chain_after)
        return rest


def _with_news(events: pa.Table, told: Manifest) -> pa.Table:
    """Return the events with the `segment-sealed` event of the previous segment in its place."""
    payload = SegmentSealed(
        segment=told.segment, first_id=told.first_id, last_id=told.last_id, events=told.events,
        chain_before=told.chain_before, chain_after=told.chain_after,
    )  # fmt: skip
    first = cast("dict[str, Any]", events.slice(0, 1).to_pylist()[0])
    ms, n = first["ms"], first["n"] + 1
    news = first | {
        "id": f"{ms}-{n}", "n": n, "seq": first["seq"] + 1, "type": "segment-sealed", "user_id": "", "period": "",
        "call_id": "", "attempt": 0, "amount": 0, "committed": None, "payload": payload_json(payload),
    }  # fmt: skip
    return pa.concat_tables([events.slice(0, 1), pa.Table.from_pylist([news], schema=_SCHEMA), events.slice(1)])


def as_entries(events: pa.Table) -> Iterator[tuple[str, list[str]]]:
    """Yield id and fields of each event, as for an append to a stream."""
    columns = [events[name].to_pylist() for name in ("id", *ENVELOPE_FIELDS)]
    for entry_id, *values in zip(*columns, strict=True):
        fields = ["" if value is None else str(value) for value in values]
        yield entry_id, [part for pair in zip(ENVELOPE_FIELDS, fields, strict=True) for part in pair]
