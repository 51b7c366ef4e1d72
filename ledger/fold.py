"""The fold: one batch of events into the projection, in one transaction, by SQL.

Invariant (G5): the projection after a fold depends on the events folded so far and on
nothing else, wherever batches end; rows and position change together. The statements are
in ledger/sql; the input is any relation `incoming` with the envelope columns.
"""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Final

import duckdb

from ledger.errors import LedgerRefused
from ledger.requests import Position
from schemas.identifiers import EntryId
from schemas.upcasters import UnreadableEvent

LAYOUT_VERSION: Final = 1
_STEPS: Final = ("fold_events", "fold_moves", "fold_discrepancies", "fold_budgets", "fold_counters")


class LedgerGap(LedgerRefused):
    """The next event does not continue the ledger where the fold stands: events are missing, or come again."""

    def __init__(self, *, partition: int, folded_seq: int, next_seq: int) -> None:
        problem = "is missing" if next_seq > folded_seq else "comes again"
        super().__init__(
            f"partition {partition}: event {min(folded_seq + 1, next_seq)} {problem} (folded up to {folded_seq}, the "
            f"next one read is {next_seq}): Redis was trimmed, restored or replaced. Restore its data, or set the "
            "DuckDB file aside so that it is rebuilt from the archive and the ledger"
        )
        self.partition = partition
        self.folded_seq = folded_seq
        self.next_seq = next_seq


class LedgerMismatch(LedgerRefused):
    """The DuckDB file is the projection of another ledger than the one given."""

    def __init__(self, *, stored: str, given: str) -> None:
        super().__init__(
            f"the DuckDB file holds ledger {stored}, Redis holds {given}: one of them was replaced. Restore the one "
            "that belongs here, or set the DuckDB file aside so that it is built anew"
        )
        self.stored = stored
        self.given = given


@dataclass(frozen=True, slots=True)
class Folded:
    """What one fold did: the position now reached, and the budgets whose balance moved."""

    position: Position
    events: int
    budgets: frozenset[str]
    discrepancies: int


@cache
def statement(name: str) -> str:
    """Return the text of ledger/sql/<name>.sql."""
    return files("ledger").joinpath("sql", f"{name}.sql").read_text(encoding="utf-8")


def fold_incoming(
    cursor: duckdb.DuckDBPyConnection,
    *,
    partition: int,
    ledger_id: str,
    only_user_id: str | None = None,
    appends_events: bool = True,
) -> Folded | None:
    """Fold the relation `incoming`; None when it is empty. `only_user_id` leaves out what is not that user's own.

    The caller has begun a transaction, and commits it or rolls it back. Without `appends_events`, it calls
    `append_incoming` as well, in a transaction of another cursor.
    Errors: LedgerGap; LedgerMismatch; UnreadableEvent; duckdb.Error.
    """
    before = read_position(cursor, partition, ledger_id)
    try:
        cursor.execute(statement("fold_read"))
    except (duckdb.InvalidInputException, duckdb.ConversionException) as exc:
        raise _unreadable(cursor, exc) from exc
    checked = cursor.execute(statement("fold_check")).fetchone()
    assert checked is not None
    events, first_seq, last_seq, distinct_seqs, last_id, unreadable = checked
    if events == 0:
        return None
    if first_seq != before.seq + 1 or last_seq != before.seq + events or distinct_seqs != events:
        raise LedgerGap(partition=partition, folded_seq=before.seq, next_seq=_first_wrong(cursor, before.seq))
    if unreadable is not None:
        raise UnreadableEvent(unreadable, "its type is unknown, or its payload lacks a member")
    if only_user_id is not None:
        # Every event is checked and counted, so that the position is the ledger's.
        cursor.execute(statement("fold_user"), {"user_id": only_user_id})
    for step in _STEPS if appends_events else _STEPS[1:]:
        text = statement(step)
        cursor.execute(text, {"partition": partition} if "$partition" in text else None)
    cursor.execute(
        "UPDATE position SET id = ?, seq = ?, events = events + ? WHERE partition = ?",
        [last_id, last_seq, events, partition],
    )
    moved = cursor.execute("SELECT DISTINCT budget FROM moves WHERE is_move").fetchall()
    found = cursor.execute(
        "SELECT count(*) FROM discrepancies WHERE partition = ? AND seq > ?", [partition, before.seq]
    ).fetchone()
    assert found is not None
    return Folded(
        position=Position(EntryId.parse(last_id), last_seq),
        events=events,
        budgets=frozenset(row[0] for row in moved),
        discrepancies=found[0],
    )


def append_incoming(cursor: duckdb.DuckDBPyConnection) -> None:
    """Append the relation `incoming` to the events and do nothing else. Errors: duckdb.Error."""
    # Read once, so not kept in a table.
    cursor.execute(statement("fold_read").replace(" TEMP TABLE batch ", " TEMP VIEW batch ", 1))
    cursor.execute(statement("fold_events"))


def read_position(cursor: duckdb.DuckDBPyConnection, partition: int, ledger_id: str) -> Position:
    """Return where a partition's fold stands. Errors: LedgerMismatch; LookupError for a partition not there."""
    row = cursor.execute("SELECT ledger_id, id, seq FROM position WHERE partition = ?", [partition]).fetchone()
    if row is None:
        raise LookupError(f"the DuckDB file has no partition {partition}")
    if row[0] != ledger_id:
        raise LedgerMismatch(stored=row[0], given=ledger_id)
    return Position(EntryId.parse(row[1]), row[2])


def _first_wrong(cursor: duckdb.DuckDBPyConnection, folded_seq: int) -> int:
    rows = cursor.execute("SELECT seq FROM batch ORDER BY seq").fetchall()
    for expected, (seq,) in enumerate(rows, start=folded_seq + 1):
        if seq != expected:
            return seq
    raise AssertionError("the batch continues the ledger after all")


def _unreadable(cursor: duckdb.DuckDBPyConnection, problem: duckdb.Error) -> UnreadableEvent:
    # The failed statement has aborted the transaction; the search needs one of its own.
    cursor.rollback()
    cursor.begin()
    row = cursor.execute("SELECT id FROM incoming WHERE NOT json_valid(payload) ORDER BY seq LIMIT 1").fetchone()
    return UnreadableEvent(row[0] if row else "?", "its payload is not JSON" if row else str(problem))
