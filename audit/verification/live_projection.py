"""Verification of the projection: the live one is compared with the ledger folded again, at the same position (G5).

Budgets, counters, position and discrepancies of one moment are read whole. Events are many and
only appended, so they are compared by a hash for each block of rows; the rows of blocks that
differ are read. Views are compared by their text.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from tollbook.audit.verification.findings import MAX_SHOWN_PER_RULE, Findings
from tollbook.ledger.projection.comparison import Tables
from tollbook.ledger.projection.store import Store

_TABLES: Final = ("budgets", "counters", "position", "discrepancies", "checksums")
_MOMENT: Final = " UNION ALL BY NAME ".join(f"SELECT '{name}' AS relation, * FROM {name}" for name in _TABLES)  # noqa: S608
_VIEWS: Final = "SELECT view_name, sql FROM duckdb_views() WHERE NOT internal ORDER BY view_name"
_BLOCK: Final = 4_096


@dataclass(frozen=True, slots=True)
class LiveProjection:
    """The projection to compare: how it is read, and its small tables as they were at one moment."""

    tables: Tables
    moment: pa.Table

    @classmethod
    def look(cls, tables: Tables) -> "LiveProjection":
        """Read the small tables, all at one moment. Blocks. Errors: those of `tables`."""
        return cls(tables, tables.table(_MOMENT))

    def positions(self) -> dict[int, int]:
        """Return how many events of each partition were folded at that moment."""
        return {row["partition"]: row["seq"] for row in self._position()}

    def ledger_id(self) -> str:
        """Return the id of the ledger that it says it was folded from."""
        return next((row["ledger_id"] for row in self._position()), "")

    def _position(self) -> list[dict[str, Any]]:
        # Filtered as columns: the moment has a row for each budget, too many to make each a dictionary.
        return self.moment.filter(pc.field("relation") == "position").to_pylist()

    def compare(self, folded: Store, findings: Findings) -> int:
        """Compare with a fold up to the same position; return how many rows were compared.

        If the fold had to stop earlier, the events up to there are compared, which shows where the two differ.
        """
        compared, ends = 0, dict[int, int]()
        for partition, seq in self.positions().items():
            reached = folded.position(partition).seq if partition < folded.partitions else 0
            ends[partition] = min(seq, reached)
            if reached < seq:
                problem = f"has folded {seq} events; the ledger, as far as it could be folded, has {reached}"
                findings.add("projection", problem, partition=partition, seq=reached + 1)
        with folded.reading() as cursor:
            compared += self._compare_events(cursor, ends, findings)
            if ends == self.positions():
                compared += self._compare_moment(cursor, findings)
            if self.tables.table(_VIEWS).to_pylist() not in _known_views(folded):
                findings.add("projection", "its views are not those of this program")
        return compared

    def _compare_moment(self, cursor: duckdb.DuckDBPyConnection, findings: Findings) -> int:
        live, folded = self.moment, cursor.execute(_MOMENT).to_arrow_table()
        columns = ", ".join(f'"{name}"' for name in self.moment.schema.names)
        for first, second, says in (
            (live, folded, "has a row that the ledger does not give"),
            (folded, live, "lacks a row that the ledger gives"),
        ):
            cursor.register("first", first)
            cursor.register("second", second)
            rows = cursor.execute(
                f"SELECT {columns} FROM first EXCEPT ALL SELECT {columns} FROM second ORDER BY ALL"  # noqa: S608
            ).to_arrow_table()
            for row in rows.slice(0, MAX_SHOWN_PER_RULE).to_pylist():  # audits G5
                relation = row.pop("relation")
                shown = ", ".join(f"{name} {value}" for name, value in row.items() if value is not None)
                findings.add("projection", f"{relation} {says}: {shown}")
        cursor.unregister("first")
        cursor.unregister("second")
        return live.num_rows

    def _compare_events(self, cursor: duckdb.DuckDBPyConnection, ends: Mapping[int, int], findings: Findings) -> int:
        bounds = " OR ".join(f"(e.partition = {partition} AND e.seq <= {seq})" for partition, seq in ends.items())
        sums = (
            f"SELECT e.partition, (e.seq - 1) // {_BLOCK} AS block, count(*) AS rows, bit_xor(hash(e)) AS mix, "  # noqa: S608
            f"sum(hash(e)::HUGEINT) AS total FROM events AS e WHERE {bounds} GROUP BY ALL ORDER BY ALL"
        )
        ours, theirs = cursor.execute(sums).to_arrow_table().to_pylist(), self.tables.table(sums).to_pylist()
        known = {(row["partition"], row["block"]): row for row in ours}
        others = {(row["partition"], row["block"]): row for row in theirs}
        differing = sorted(key for key in known.keys() | others.keys() if known.get(key) != others.get(key))
        for partition, block in differing[:MAX_SHOWN_PER_RULE]:  # audits G5
            first, last = block * _BLOCK + 1, min((block + 1) * _BLOCK, ends[partition])
            sql = (
                f"SELECT e.*, hash(e)::VARCHAR AS mix FROM events AS e WHERE e.partition = {partition} "  # noqa: S608
                f"AND e.seq BETWEEN {first} AND {last} ORDER BY e.seq"
            )
            rows = cursor.execute(sql).to_arrow_table().to_pylist()
            _note_rows(rows, self.tables.table(sql).to_pylist(), partition, findings)
        if len(differing) > MAX_SHOWN_PER_RULE:
            findings.add("projection", f"and {len(differing) - MAX_SHOWN_PER_RULE} more blocks of events differ")
        return sum(row["rows"] for row in ours)


def _known_views(folded: Store) -> list[list[dict[str, Any]]]:
    """Return the views' texts in a new file, and in a file that was reopened.

    DuckDB (1.5, November 2026) prints a view's statement differently once it was read back from a file.
    """
    path, forms = folded.path.with_name("views.duckdb"), list[list[dict[str, Any]]]()
    for _ in range(2):
        scratch = Store.open(path, folded.ledger_id)
        forms.append(scratch.table(_VIEWS).to_pylist())
        scratch.close()
    path.unlink()
    return forms


def _note_rows(folded: list[dict[str, Any]], live: list[dict[str, Any]], partition: int, findings: Findings) -> None:
    ours = {row["seq"]: row for row in folded}
    seen: set[int] = set()
    noted = 0
    for row in live:
        given = ours.get(row["seq"])
        if given == row and row["seq"] not in seen:
            seen.add(row["seq"])
            continue
        again = row["seq"] in seen
        seen.add(row["seq"])
        if given is None or again:
            problem = "events has a row that the ledger does not give"
        else:
            names = [name for name in row if name != "mix" and row[name] != given.get(name)]
            problem = f"events differs from the ledger in {', '.join(names)}"
        if noted < MAX_SHOWN_PER_RULE:
            findings.add("projection", problem, partition=partition, seq=row["seq"], event_id=row["id"])
        noted += 1
    for seq in sorted(ours.keys() - seen)[:MAX_SHOWN_PER_RULE]:
        findings.add("projection", "events lacks this one", partition=partition, seq=seq, event_id=ours[seq]["id"])
