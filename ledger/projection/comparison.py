"""Comparing two projections row by row (G5): two files, or a replayed one with the live one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import duckdb
import pyarrow as pa

from tollbook.ledger.gate.requests import Position
from tollbook.ledger.projection.database import connect


class Tables(Protocol):
    """A projection that can be queried: a store of this process, or a copy of the live one."""

    def table(self, sql: str, /) -> pa.Table:
        """Run a SELECT."""
        ...


@dataclass(frozen=True, slots=True)
class _Shape:
    """The columns that identify a table's rows, and the column of the last event that changed a row."""

    keys: str
    last: str | None = "last_seq"
    has_partition: bool = True


_SHAPES: Final[Mapping[str, _Shape]] = {
    "events": _Shape("partition, seq", "seq"),
    "budgets": _Shape("budget"),
    "counters": _Shape("budget", has_partition=False),
    "calls": _Shape("partition, call_id, user_id, period"),
    "spend": _Shape("user_id, period", has_partition=False),
    "api_keys": _Shape("key_id"),
    "discrepancies": _Shape("partition, seq, budget", "seq"),
    "position": _Shape("partition", None),
}
TABLES: Final = tuple(_SHAPES)
_SHOWN: Final = 5


@dataclass(frozen=True, slots=True)
class Difference:
    """Rows of one table that only one of the two projections has; `examples` are some of them, as text."""

    table: str
    only_first: int
    only_second: int
    examples: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result of comparing with a live projection: `rows` were compared, `moved_on` were changed by later events."""

    differences: list[Difference]
    rows: int
    moved_on: int


def compare(first: Tables, second: Tables) -> list[Difference]:
    """Compare every table and view of two projections row by row; an empty list means that they are equal.

    Both are copied into memory a table at a time. Blocks; call it through asyncio.to_thread.
    """
    with connect() as connection:
        found = [
            _difference(connection, name, first.table(f"FROM {name}"), second.table(f"FROM {name}")) for name in TABLES
        ]
    return [difference for difference in found if difference is not None]


def compare_with_live(replayed: Tables, live: Tables, positions: Mapping[int, Position]) -> Comparison:
    """Compare a projection replayed up to `positions` with a live one, which continues to fold.

    Rows that a later event has changed are left out on both sides, and counted. Blocks.
    """
    differences, rows, moved_on = list[Difference](), 0, 0
    with connect() as connection:
        for name, shape in _SHAPES.items():
            if shape.last is None:
                continue
            is_folded = _condition(shape, positions)
            theirs = live.table(f"FROM {name} WHERE {is_folded}")
            connection.register("moved", live.table(f"SELECT {shape.keys} FROM {name} WHERE NOT ({is_folded})"))  # noqa: S608
            connection.register("replayed", replayed.table(f"FROM {name} WHERE {is_folded}"))
            mine = connection.execute(f"FROM replayed ANTI JOIN moved USING ({shape.keys})").to_arrow_table()
            rows += theirs.num_rows
            moved_on += connection.execute("SELECT count(*) FROM moved").fetchall()[0][0] if name != "events" else 0
            difference = _difference(connection, name, mine, theirs)
            if difference is not None:
                differences.append(difference)
    return Comparison(differences, rows, moved_on)


def _condition(shape: _Shape, positions: Mapping[int, Position]) -> str:
    """Return the SQL condition for rows that no event after the positions has changed."""
    if not shape.has_partition:
        return f"{shape.last} <= {min(position.seq for position in positions.values())}"
    return " OR ".join(
        f"(partition = {partition} AND {shape.last} <= {position.seq})" for partition, position in positions.items()
    )


def _difference(
    connection: duckdb.DuckDBPyConnection, name: str, first: pa.Table, second: pa.Table
) -> Difference | None:
    connection.register("first", first)
    connection.register("second", second)
    only_first = connection.execute("FROM first EXCEPT ALL FROM second").to_arrow_table()
    only_second = connection.execute("FROM second EXCEPT ALL FROM first").to_arrow_table()
    if not only_first.num_rows and not only_second.num_rows:  # audits G5
        return None
    examples = [*only_first.slice(0, _SHOWN).to_pylist(), *only_second.slice(0, _SHOWN).to_pylist()]
    return Difference(name, only_first.num_rows, only_second.num_rows, tuple(str(row) for row in examples))
