"""Recomputes the projection from the events in its own file, and compares: DuckDB is checked, not trusted.

It finds changed, added or dropped events, balances, caps and counters that differ from the events, and a position that
is not their end. It does not find a consistent change, checksums included: `tollbook verify` compares the events with
archive and stream for that. Everything is read of one moment, while the fold goes on.
"""

import duckdb

from tollbook.ledger.projection.database import roll_back
from tollbook.ledger.projection.fold import counts_statement, statement
from tollbook.ledger.projection.store_errors import StoreChanged
from tollbook.schemas.identifiers import describe_budget
from tollbook.schemas.money import format_usd


def recompute(cursor: duckdb.DuckDBPyConnection) -> None:
    """Recompute everything that decisions and reports use. Blocks. Errors: StoreChanged; duckdb.Error."""
    cursor.begin()
    try:
        problems = [*_events(cursor), *_budgets(cursor), *_counters(cursor)]
    finally:
        roll_back(cursor)
    if problems:
        more = f"; and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise StoreChanged(f"{problems[0]}{more}")


def _events(cursor: duckdb.DuckDBPyConnection) -> list[str]:
    return [row[0] for row in cursor.execute(statement("check_events")).fetchall()]


def _budgets(cursor: duckdb.DuckDBPyConnection) -> list[str]:
    rows = cursor.execute(statement("check_budgets")).fetchall()
    problems = [
        f"{describe_budget(budget)}: {_usd(settled)} settled and {_usd(held)} held, "
        f"the events give {_usd(given_settled)} and {_usd(given_held)}"
        for budget, settled, held, given_settled, given_held in rows
    ]
    number, counted = _one(cursor, "SELECT count(*) FROM budgets"), _one(cursor, "SELECT sum(budgets) FROM position")
    if number != counted:
        problems.append(f"{number} rows of budgets, the positions count {counted}")
    return problems


def _counters(cursor: duckdb.DuckDBPyConnection) -> list[str]:
    text = counts_statement(counts="recomputed_counts", before="(FROM counters LIMIT 0)")
    problems, known = list[str](), 0
    for partition, last_seq in cursor.execute("SELECT partition, seq FROM position").fetchall():
        cursor.execute(text, {"partition": partition, "first": 1, "last": last_seq})
        differing = cursor.execute(
            "SELECT budget FROM (FROM recomputed_counts EXCEPT FROM counters) ORDER BY budget"
        ).fetchall()
        problems += [f"{describe_budget(budget)}: other counters than its events give" for (budget,) in differing]
        known += _one(cursor, "SELECT count(*) FROM recomputed_counts")
    extra = _one(cursor, "SELECT count(*) FROM counters") - known
    if extra > 0:
        problems.append(f"{extra} rows of counters have no events")
    return problems


def _one(cursor: duckdb.DuckDBPyConnection, sql: str) -> int:
    return cursor.execute(sql).fetchall()[0][0]


def _usd(nanousd: int) -> str:
    return format_usd(nanousd, places=None)
