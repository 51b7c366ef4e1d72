"""Verification of what the events mean: they are folded anew, and held against the rules of the gate.

The fold is the projector's own, into a temporary DuckDB; beside it, what the rules need is kept.
They are checked at the end, by SQL over the whole ledger (ledger/sql/verify_*.sql), which DuckDB
does within its memory limit and on disk beyond.
"""

import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Self, cast

import duckdb
import pyarrow as pa

from tollbook.audit.verification.chain import Events
from tollbook.audit.verification.findings import SHOWN_OF_A_RULE, Findings, Kind
from tollbook.ledger.archive.segments import Manifest
from tollbook.ledger.packaged import packaged_text
from tollbook.ledger.projection.fold import LedgerGap, fold_incoming
from tollbook.ledger.projection.store import Store
from tollbook.ledger.stream import lifted
from tollbook.schemas.identifiers import partition_of
from tollbook.schemas.upcasters import UnreadableEvent

# The shortest time for which the gate remembers a call that is over (TOLLBOOK_IDEMPOTENCY_TTL_S is no less).
FORGOTTEN_MS: Final = 31 * 86_400_000
_RULES: Final[tuple[tuple[Kind, str], ...]] = (
    ("balance", "verify_stamps"),
    ("cap", "verify_cap"),
    ("call", "verify_lives"),
    ("call", "verify_budgets"),
    ("call", "verify_denied"),
)


class Books:
    """The ledger folded anew. Make it with `Books.open`; all methods block."""

    def __init__(self, store: Store, findings: Findings) -> None:
        self.store = store
        self.findings = findings
        self.is_complete = True
        """Whether every event could be added up; else what the rules say is left out."""
        self._cursor = store.connection.cursor()
        self._cursor.execute(_sql("verify_schema"))

    @classmethod
    @contextmanager
    def open(
        cls, directory: Path, ledger_id: str, partitions: int, findings: Findings, *, memory_limit: str
    ) -> Generator[Self]:
        """Begin with an empty file in `directory`."""
        store = Store.open(directory / "verify.duckdb", ledger_id, partitions, memory_limit=memory_limit)
        try:
            store.connection.execute("SET preserve_insertion_order = false")
            # Nobody will open the file again.
            store.connection.execute("PRAGMA disable_checkpoint_on_shutdown")
            yield cls(store, findings)
        finally:
            store.close()

    def add(self, gathered: Sequence[Events], partition: int) -> bool:
        """Fold further events, which follow each other; return whether that could be done."""
        # Together, since a fold takes nearly the same for fifty events as for a thousand; else each, to see which one.
        joined = pa.concat_tables([events.table for events in gathered])
        if len(gathered) > 1 and self._fold(joined, partition) is None:
            return True
        for events in gathered:
            problem = self._fold(events.table, partition)
            if problem is not None:
                return self._stop(problem, partition, events.segment)
        return True

    def _fold(self, events: pa.Table, partition: int) -> Exception | None:
        """Fold a table; return why that cannot be done."""
        cursor = self._cursor
        try:
            incoming = lifted(events)
        except (UnreadableEvent, ValueError) as exc:
            return exc
        cursor.register("incoming", incoming)
        cursor.begin()
        try:
            folded = fold_incoming(cursor, partition=partition, ledger_id=self.store.ledger_id)
            if folded is not None:
                last_seq = folded.position.seq
                bounds = {"partition": partition, "first": last_seq - folded.events + 1, "last": last_seq}
                self._run("verify_collect", bounds)
        except (LedgerGap, UnreadableEvent, duckdb.ConversionException, duckdb.OutOfRangeException) as exc:
            cursor.rollback()
            return exc
        else:
            cursor.commit()
        finally:
            cursor.unregister("incoming")
        return None

    def seq(self, partition: int) -> int:
        """Return how far a partition was folded."""
        return self.store.position(partition).seq

    def check(self, trusted: Mapping[int, int]) -> None:
        """Hold everything that was folded against the rules; what lies in the trusted part is not told."""
        # Only here, where much is sorted and little written.
        self._cursor.execute("SET threads = 2")
        self._cursor.execute(_sql("verify_caps"))
        self._cursor.execute(_sql("verify_calls"), {"forgotten_ms": FORGOTTEN_MS})
        for kind, rule in _RULES:
            rows = self._cursor.execute(_sql(rule)).fetchall()
            told = [row for row in rows if row[1] > trusted.get(row[0], 0)]
            for partition, seq, entry_id, problem in told[:SHOWN_OF_A_RULE]:
                self.findings.add(
                    kind, problem or "is not as the gate writes it", partition=partition, seq=seq, event_id=entry_id
                )
            if len(told) > SHOWN_OF_A_RULE:
                self.findings.add(kind, f"and {len(told) - SHOWN_OF_A_RULE} more of this rule")
        self._check_partitions()

    def check_seals(self, partition: int, manifests: Mapping[str, Manifest], sealed_seq: int | None) -> None:
        """Hold the news of sealing against the manifests; `sealed_seq` is up to where the ledger was told."""
        rows = self._cursor.execute(
            "SELECT seq, id, payload FROM events WHERE type = 'segment-sealed' AND partition = ? ORDER BY seq",
            [partition],
        ).fetchall()
        waiting = iter(sorted(manifests.values(), key=lambda manifest: manifest.first_seq))
        told_seq = 0
        for seq, entry_id, payload in rows:
            told = cast("dict[str, Any]", json.loads(payload))
            manifest = manifests.get(told.get("segment", ""))
            expected = next(waiting, None)
            problem = None
            if manifest is None:
                problem = f"tells of segment {told.get('segment')}, which is not in the archive"
            elif manifest != expected:
                problem = f"tells of segment {manifest.segment} out of turn"
            else:
                told_seq = manifest.last_seq
                facts = manifest.model_dump(include={"first_id", "last_id", "events", "chain_before", "chain_after"})
                names = [name for name, value in facts.items() if told.get(name, 0) != value]
                if names:
                    problem = f"tells of another {', '.join(names)} of {manifest.segment} than its manifest"
                elif manifest.last_seq >= seq:
                    problem = f"tells of {manifest.segment} before its last event"
            if problem:
                self.findings.add("seal", problem, partition=partition, seq=seq, event_id=entry_id)
        if sealed_seq is not None and told_seq < sealed_seq:
            problem = f"the ledger was sealed up to event {sealed_seq}, the news of it reaches to event {told_seq}"
            self.findings.add("seal", problem, partition=partition)

    def highest(self) -> list[dict[str, Any]]:
        """Return where each budget was committed highest; after `check`."""
        return self._rows("verify_highest")

    def open_holds(self) -> list[dict[str, Any]]:
        """Return the holds that are not settled; after `check`."""
        return self._rows("verify_open")

    def balances(self, partition: int, after_seq: int) -> dict[str, tuple[int, int, str]]:
        """Return settled, held and the last entry of budgets that moved after an event."""
        rows = self._cursor.execute(
            "SELECT budget, nanousd(settled_usd), nanousd(held_usd), last_id FROM budgets "
            "WHERE partition = ? AND last_seq > ?",
            [partition, after_seq],
        ).fetchall()
        return {row[0]: (row[1], row[2], row[3]) for row in rows}

    def _check_partitions(self) -> None:
        rows = self._cursor.execute(
            "SELECT partition, user_id, min(seq), arg_min(id, seq) FROM events WHERE user_id <> '' GROUP BY ALL"
        ).fetchall()
        for partition, user_id, seq, entry_id in rows:
            if partition_of(user_id, self.store.partitions) != partition:
                problem = f"user {user_id} belongs to another partition"
                self.findings.add("event", problem, partition=partition, seq=seq, event_id=entry_id)

    def _run(self, name: str, params: Mapping[str, Any]) -> None:
        for text in _sql(name).split(";\n"):
            if text.strip():
                self._cursor.execute(text, {key: value for key, value in params.items() if f"${key}" in text} or None)

    def _rows(self, name: str) -> list[dict[str, Any]]:
        return self._cursor.execute(_sql(name)).to_arrow_table().to_pylist()

    def _stop(self, problem: Exception, partition: int, segment: str | None) -> bool:
        self.is_complete = False
        entry_id = problem.entry_id if isinstance(problem, UnreadableEvent) else None
        seq = self.seq(partition) + 1 if entry_id is None else None
        text = f"from here on balances, caps and calls are not checked: {problem}"
        self.findings.add("event", text, partition=partition, segment=segment, seq=seq, event_id=entry_id)
        return False


def _sql(name: str) -> str:
    return packaged_text("tollbook.audit", f"sql/{name}.sql")
