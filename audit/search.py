"""Searching the ledger: events as in the public table `events`, by all filters at once."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace
from typing import Any, cast

import duckdb
import pyarrow as pa

from tollbook.audit.reader import AuditReader, Selection
from tollbook.ledger.packaged import packaged_text
from tollbook.ledger.projection.database import connect
from tollbook.ledger.projection.fold import statement


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """What is searched for; a field that is None or empty does not filter.

    `model` was asked for, was fallen back from, or answered. `reason` is a part of a reason, in any case.
    `campaign_id` finds every event of the campaign's calls.
    """

    selection: Selection = field(default_factory=Selection)
    campaign_id: str | None = None
    model: str | None = None
    outcome: str | None = None
    reason: str | None = None

    def condition(self) -> tuple[str, list[Any]]:
        """Return the filters beside the selection, as SQL on `events`, and their parameters."""
        parts: list[tuple[str, list[Any]]] = []
        if self.model is not None:
            parts.append(("? IN (model, model_used, from_model)", [self.model]))
        if self.outcome is not None:
            parts.append(("outcome = ?", [self.outcome]))
        if self.reason is not None:
            parts.append(("contains(lower(reason), lower(?))", [self.reason]))
        return " AND ".join(text for text, _ in parts) or "true", [value for _, values in parts for value in values]


async def search(reader: AuditReader, wanted: Search) -> AsyncGenerator[pa.Table]:
    """Yield the events found, each partition's in order, in tables with the columns of `events`.

    At least one table, which may be empty. Errors: as `AuditReader.tables`.
    """
    with connect(config={"memory_limit": "1GB", "threads": 2}) as connection:
        connection.execute("SET TimeZone = 'UTC'")
        connection.execute(statement("macros"))
        connection.execute(statement("schema"))
        yield connection.execute("FROM events").to_arrow_table()
        selection = wanted.selection
        if wanted.campaign_id is not None:
            calls = await _calls_of_campaign(reader, connection, wanted.campaign_id, selection)
            selection = replace(selection, call_ids=calls & (selection.call_ids or calls))
        async for events in reader.tables(selection):
            found = await asyncio.to_thread(_find, connection, events, wanted)
            if found.num_rows:
                yield found


async def _calls_of_campaign(
    reader: AuditReader, connection: duckdb.DuckDBPyConnection, campaign_id: str, selection: Selection
) -> frozenset[str]:
    """Return the calls that name a campaign or were booked to its budget, at any time."""
    types = ("budget-reserved", "budget-denied", "cost-recorded")
    calls: set[str] = set()
    async for events in reader.tables(Selection(user_id=selection.user_id, call_ids=selection.call_ids, types=types)):
        found = await asyncio.to_thread(
            _read,
            connection,
            events,
            packaged_text("tollbook.audit", "sql/audit_campaign.sql"),
            {"campaign_id": campaign_id},
        )
        calls.update(cast("list[str]", found["call_id"].to_pylist()))
    return frozenset(calls)


def _find(connection: duckdb.DuckDBPyConnection, events: pa.Table, wanted: Search) -> pa.Table:
    _read(connection, events, statement("fold_events"), {"user_id": None})
    condition, parameters = wanted.condition()
    found = connection.execute(f"FROM events WHERE {condition} ORDER BY partition, seq", parameters)
    table = found.to_arrow_table()
    connection.execute("TRUNCATE events")
    return table


def _read(
    connection: duckdb.DuckDBPyConnection, events: pa.Table, sql: str, parameters: dict[str, Any] | None = None
) -> pa.Table:
    """Read the payloads as the fold does, then run a statement on the result."""
    connection.register("incoming", events)
    connection.execute(statement("fold_read"))
    return connection.execute(sql, parameters).to_arrow_table()
