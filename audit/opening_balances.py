"""Reads earlier spend from archive and stream for the budgets that a policy opens."""

import asyncio
from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from tollbook.audit.reader import AuditReader, Selection
from tollbook.inference.opening_balances import EVENT_TYPES, OpeningTally, ReadSpent, SpentRow
from tollbook.ledger.archive.history import LedgerSource
from tollbook.ledger.gate.requests import Position
from tollbook.schemas.identifiers import EntryId


def spent_reader(source: LedgerSource) -> ReadSpent:
    """Return a function that adds a ledger's events to a tally: first those of its windows, then newer ones."""

    async def read(partition: int, tally: OpeningTally, after: Position | None) -> Position:
        if after is None:
            return await _read_windows(source, partition, tally)
        async for events in source.events(partition, after_seq=after.seq, after=after.entry):
            await asyncio.to_thread(tally.add, _rows(events))
            after = Position(EntryId.parse(events["id"][-1].as_py()), events["seq"][-1].as_py())
        return after

    return read


async def _read_windows(source: LedgerSource, partition: int, tally: OpeningTally) -> Position:
    reader = AuditReader(source)
    try:
        selection = Selection(partition=partition, since_ms=tally.since_ms, types=EVENT_TYPES)
        async for events in reader.tables(selection):
            await asyncio.to_thread(tally.add, _rows(events))
        return reader.positions[partition]
    finally:
        reader.close()


def _rows(events: pa.Table) -> Iterable[SpentRow]:
    columns: list[list[Any]] = [events[name].to_pylist() for name in SpentRow._fields]
    return (SpentRow(*row) for row in zip(*columns, strict=True))
