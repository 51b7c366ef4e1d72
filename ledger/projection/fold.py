"""The fold: one batch of events into the projection, in one transaction, by SQL.

Invariant (G5): the projection after a fold depends only on the events folded so far, not on
where batches end; rows and position change together. The statements are in sql/; the input is
any relation `incoming` with the envelope columns.
"""

from dataclasses import dataclass
from string import Template
from typing import Final

import duckdb

from tollbook.ledger.errors import LedgerRefused
from tollbook.ledger.gate.requests import Position
from tollbook.ledger.packaged import packaged_text
from tollbook.schemas.identifiers import EntryId
from tollbook.schemas.upcasters import UnreadableEvent

LAYOUT_VERSION: Final = 6
_STEPS: Final = (
    "fold_blocks",
    "fold_checksums",
    "fold_moves",
    "fold_discrepancies",
    "fold_balances",
    "fold_budgets",
    "fold_counts",
    "fold_counters",
)


class LedgerGap(LedgerRefused):
    """The next event does not follow the event before it: events are missing or repeated."""

    def __init__(self, *, partition: int, folded_seq: int, next_seq: int) -> None:
        problem = "is missing" if next_seq > folded_seq else "is repeated"
        super().__init__(
            f"partition {partition}: event {min(folded_seq + 1, next_seq)} {problem} (read up to {folded_seq}, the "
            f"next one is {next_seq}): Redis was trimmed, restored or replaced. Restore its data, or set the "
            "DuckDB file aside so that it is rebuilt from the archive and the ledger"
        )
        self.partition = partition
        self.folded_seq = folded_seq
        self.next_seq = next_seq


class LedgerMismatch(LedgerRefused):
    """The DuckDB file is the projection of another ledger."""

    def __init__(self, *, stored: str, given: str) -> None:
        super().__init__(
            f"this DuckDB file belongs to ledger {stored}, Redis holds ledger {given}: name the file or the Redis that "
            "belongs here (TOLLBOOK_DATA_DIR, REDIS_URL, TOLLBOOK_NAMESPACE), or set the file aside; it is then rebuilt"
        )
        self.stored = stored
        self.given = given


@dataclass(frozen=True, slots=True)
class Folded:
    """The result of one fold: the position reached, and the budgets whose balance changed."""

    position: Position
    events: int
    budgets: frozenset[str]
    discrepancies: int


@dataclass(frozen=True, slots=True)
class Counted:
    """How many events are to be folded, and which."""

    events: int
    first_seq: int
    last_seq: int
    distinct_seqs: int
    last_id: str


def statement(name: str) -> str:
    """Return the text of ledger/projection/sql/<name>.sql."""
    return packaged_text("tollbook.ledger.projection", f"sql/{name}.sql")


def counts_statement(*, counts: str = "counts", before: str = "counters") -> str:
    """Return the statement that counts events into the table `counts`, given the counters before them."""
    return Template(statement("fold_counts")).safe_substitute(counts=counts, before=before)


def moves_statement(*, only_own: bool) -> str:
    """Return the statement that lists moves; with `only_own`, of further budgets only those in `own_budgets`."""
    # A fold of one user's events has all moves of a budget only if the budget is certainly the user's own.
    where = "WHERE further.budget IN (FROM own_budgets)" if only_own else ""
    return Template(statement("fold_moves")).safe_substitute(only_own=where)


def fold_incoming(
    cursor: duckdb.DuckDBPyConnection, *, partition: int, ledger_id: str, only_user_id: str | None = None
) -> Folded | None:
    """Fold the relation `incoming`; return None if it is empty. With `only_user_id`, fold only that user's events.

    The caller begins the transaction, and commits it or rolls it back.
    Errors: LedgerGap; LedgerMismatch; UnreadableEvent; duckdb.Error.
    """
    before = read_position(cursor, partition, ledger_id)
    counted = count_incoming(cursor)
    if counted is None:
        return None
    check_order(cursor, counted, partition=partition, folded_seq=before.seq)
    append_incoming(cursor, only_user_id=only_user_id)
    add_up(
        cursor,
        partition=partition,
        first_seq=counted.first_seq,
        last_seq=counted.last_seq,
        only_user_id=only_user_id,
    )
    advance(cursor, partition, counted)
    moved = cursor.execute("SELECT budget FROM balances").fetchall()
    found = cursor.execute(
        "SELECT count(*) FROM discrepancies WHERE partition = ? AND seq > ?", [partition, before.seq]
    ).fetchone()
    assert found is not None
    return Folded(
        position=Position(EntryId.parse(counted.last_id), counted.last_seq),
        events=counted.events,
        budgets=frozenset(row[0] for row in moved),
        discrepancies=found[0],
    )


def count_incoming(cursor: duckdb.DuckDBPyConnection) -> Counted | None:
    """Count the relation `incoming`; None if it is empty. Errors: duckdb.Error."""
    row = cursor.execute(statement("fold_count")).fetchone()
    assert row is not None
    return Counted(*row) if row[0] else None


def check_order(cursor: duckdb.DuckDBPyConnection, counted: Counted, *, partition: int, folded_seq: int) -> None:
    """Check that the relation `incoming` continues the ledger without gap or repeat. Errors: LedgerGap."""
    if (counted.first_seq, counted.last_seq) != (folded_seq + 1, folded_seq + counted.events) or (
        counted.distinct_seqs != counted.events
    ):
        before, found = _first_wrong(cursor, folded_seq)
        raise LedgerGap(partition=partition, folded_seq=before, next_seq=found)  # G5


def advance(cursor: duckdb.DuckDBPyConnection, partition: int, counted: Counted) -> None:
    """Move a partition's position past the events that were folded. Errors: duckdb.Error."""
    cursor.execute(
        "UPDATE position SET id = ?, seq = ?, events = events + ? WHERE partition = ?",
        [counted.last_id, counted.last_seq, counted.events, partition],
    )


def append_incoming(cursor: duckdb.DuckDBPyConnection, *, only_user_id: str | None = None) -> None:
    """Append the relation `incoming` to the events; balances stay. Errors: UnreadableEvent; duckdb.Error."""
    try:
        cursor.execute(statement("fold_read"))
        if only_user_id is not None:
            # Events that are left out are checked too, since the position counts them.
            _check_members(cursor)
        cursor.execute(statement("fold_events"), {"user_id": only_user_id})
    except (duckdb.InvalidInputException, duckdb.ConversionException) as exc:
        raise _unreadable(cursor, exc) from exc


def add_up(
    cursor: duckdb.DuckDBPyConnection,
    *,
    partition: int,
    first_seq: int,
    last_seq: int,
    only_user_id: str | None = None,
) -> None:
    """Add appended events to budgets and counters, and record discrepancies. Errors: duckdb.Error."""
    given = {"partition": partition, "first": first_seq, "last": last_seq}
    if only_user_id is not None:
        cursor.execute(statement("fold_own"), given | {"user": only_user_id})
    for step in _STEPS:
        match step:
            case "fold_counts":
                text = counts_statement()
            case "fold_moves":
                text = moves_statement(only_own=only_user_id is not None)
            case _:
                text = statement(step)
        cursor.execute(text, {name: value for name, value in given.items() if f"${name}" in text})


def read_position(cursor: duckdb.DuckDBPyConnection, partition: int, ledger_id: str) -> Position:
    """Return a partition's position. Errors: LedgerMismatch; LookupError for an unknown partition."""
    row = cursor.execute("SELECT ledger_id, id, seq FROM position WHERE partition = ?", [partition]).fetchone()
    if row is None:
        raise LookupError(f"the DuckDB file has no partition {partition}")
    if row[0] != ledger_id:
        raise LedgerMismatch(stored=row[0], given=ledger_id)  # G8
    return Position(EntryId.parse(row[1]), row[2])


def _first_wrong(cursor: duckdb.DuckDBPyConnection, folded_seq: int) -> tuple[int, int]:
    """Return the last number in order, and the wrong number that follows it."""
    rows = cursor.execute("SELECT seq FROM incoming ORDER BY seq").fetchall()
    for expected, (seq,) in enumerate(rows, start=folded_seq + 1):
        if seq != expected:
            return expected - 1, seq
    raise AssertionError("the batch continues the ledger after all")


def _check_members(cursor: duckdb.DuckDBPyConnection) -> None:
    """Errors: UnreadableEvent; duckdb.Error where a payload is not JSON."""
    row = cursor.execute(statement("fold_check")).fetchone()
    if row is not None and row[0] is not None:
        raise UnreadableEvent(row[0], "its type is unknown, its payload lacks a member, or a number is out of bounds")


def _unreadable(cursor: duckdb.DuckDBPyConnection, problem: duckdb.Error) -> UnreadableEvent:
    # The failed statement has aborted the transaction; the search needs a new one.
    cursor.rollback()
    cursor.begin()
    row = cursor.execute("SELECT id FROM incoming WHERE NOT json_valid(payload) ORDER BY seq LIMIT 1").fetchone()
    if row is not None:
        return UnreadableEvent(row[0], "its payload is not JSON")
    try:
        cursor.execute(statement("fold_read"))
        _check_members(cursor)
    except UnreadableEvent as found:
        return found
    except duckdb.Error as exc:
        return UnreadableEvent("?", str(exc))
    return UnreadableEvent("?", str(problem))
