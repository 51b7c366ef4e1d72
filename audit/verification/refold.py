"""Verification of what the events mean: they are folded again, and checked by the rules of the gate.

The fold is the projector's own, into a temporary DuckDB file; what the rules need is kept beside
it. The rules are SQL over the whole ledger (audit/sql/verify_*.sql), run at the end; DuckDB stays
within its memory limit and uses the disk beyond that.
"""

import json
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Self, cast

import duckdb
import pyarrow as pa

from tollbook.audit.verification.chain import Events
from tollbook.audit.verification.findings import MAX_SHOWN_PER_RULE, Findings, Kind
from tollbook.audit.verification.policies import check_openings, check_policies, policy_caps, read_policies
from tollbook.audit.verification.recoveries import check_recoveries
from tollbook.audit.verification.windows import fill_windows
from tollbook.ledger.archive.manifests import Manifest
from tollbook.ledger.gate.call_record import RECORD_KEPT_MS
from tollbook.ledger.packaged import packaged_text
from tollbook.ledger.projection.fold import LedgerGap, fold_incoming
from tollbook.ledger.projection.store import Store
from tollbook.ledger.stream import upcast_table
from tollbook.schemas.identifiers import describe_budget, partition_of
from tollbook.schemas.upcasters import UnreadableEvent

_RULES: Final[tuple[tuple[Kind, str], ...]] = (
    ("balance", "verify_stamps"),
    ("cap", "verify_cap"),
    ("cap", "verify_held_against"),
    ("policy", "verify_windows"),
    ("call", "verify_lives"),
    ("call", "verify_budgets"),
    ("call", "verify_denied"),
)


class Refold:
    """The ledger folded again. Created by `Refold.open`; all methods block."""

    def __init__(self, store: Store, findings: Findings) -> None:
        self.store = store
        self.findings = findings
        self._cursor = store.connection.cursor()
        self._cursor.execute(_sql("verify_schema"))

    @classmethod
    @contextmanager
    def open(
        cls, directory: Path, ledger_id: str, partitions: int, findings: Findings, *, memory_limit: str
    ) -> Generator[Self]:
        """Open an empty file in `directory`."""
        store = Store.open(directory / "verify.duckdb", ledger_id, partitions, memory_limit=memory_limit)
        try:
            store.connection.execute("SET preserve_insertion_order = false")
            # The file is never opened again.
            store.connection.execute("PRAGMA disable_checkpoint_on_shutdown")
            yield cls(store, findings)
        finally:
            store.close()

    def add(self, gathered: Sequence[Events], partition: int) -> bool:
        """Fold the next events; return False, and report it, if they cannot be folded."""
        # All at once, since a fold takes nearly as long for fifty events as for a thousand. If that fails, one by one.
        joined = pa.concat_tables([events.table for events in gathered])
        if len(gathered) > 1 and self._fold(joined, partition) is None:
            return True
        for events in gathered:
            problem = self._fold(events.table, partition)
            if problem is not None:
                return self._stop(problem, partition, events.segment)
        return True

    def _fold(self, events: pa.Table, partition: int) -> Exception | None:
        """Fold a table; return the problem if it cannot be folded."""
        cursor = self._cursor
        try:
            incoming = upcast_table(events)
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

    def check(self, trusted: Mapping[int, int], known_caps: Mapping[str, Collection[int]] | None = None) -> None:
        """Check everything that was folded by the rules; findings in the trusted part are left out.

        `known_caps` are those of the settings, as in `Options`; without them, caps on no event are taken as stamped.
        """
        # A second thread only here, where much is sorted and little written.
        self._cursor.execute("SET threads = 2")
        policies = read_policies(self._cursor)
        check_policies(policies, self.store.partitions, self.findings)
        check_openings(self._cursor, policies, trusted, self.findings)
        check_recoveries(self._cursor, trusted, self.findings)
        if caps := list(policy_caps(policies)):
            self._cursor.executemany("INSERT INTO verify_policy_caps VALUES (?, ?, ?, ?, ?)", caps)
        fill_windows(self._cursor, policies)
        self._cursor.execute(_sql("verify_caps"))
        self._cursor.execute(_sql("verify_calls"), {"forgotten_ms": RECORD_KEPT_MS})
        for kind, rule in _RULES:
            self._report(kind, self._cursor.execute(_sql(rule)).fetchall(), trusted)
        if known_caps:
            self._check_known(known_caps, trusted)
        self._check_partitions()

    def _check_known(self, known_caps: Mapping[str, Collection[int]], trusted: Mapping[int, int]) -> None:
        caps = [(subject, cap) for subject, known in known_caps.items() for cap in known]
        self._cursor.executemany("INSERT INTO verify_known_caps VALUES (?, ?)", caps)
        rows = self._cursor.execute(_sql("verify_known")).fetchall()
        self._report("cap", [row[:5] for row in rows if not row[5]], trusted)
        self.findings.notes += [f"{describe_budget(row[3])}: {row[4]}" for row in rows if row[5]]

    def _report(self, kind: Kind, rows: Sequence[tuple[Any, ...]], trusted: Mapping[int, int]) -> None:
        broken = [row for row in rows if row[1] > trusted.get(row[0], 0)]
        for partition, seq, entry_id, budget, problem in broken[:MAX_SHOWN_PER_RULE]:
            text = problem or "is not as the gate writes it"
            if budget is not None:
                text = f"{describe_budget(budget)}: {text}"
            self.findings.add(kind, text, partition=partition, seq=seq, event_id=entry_id)
        if len(broken) > MAX_SHOWN_PER_RULE:
            self.findings.add(kind, f"and {len(broken) - MAX_SHOWN_PER_RULE} more of this rule")

    def check_seals(self, partition: int, manifests: Mapping[str, Manifest], sealed_seq: int | None) -> None:
        """Compare `segment-sealed` events with the manifests; `sealed_seq` is the gate's own last sealed event."""
        rows = self._cursor.execute(
            "SELECT seq, id, payload FROM events WHERE type = 'segment-sealed' AND partition = ? ORDER BY seq",
            [partition],
        ).fetchall()
        waiting = iter(sorted(manifests.values(), key=lambda manifest: manifest.first_seq))
        announced_seq = 0
        for seq, entry_id, payload in rows:
            announced = cast("dict[str, Any]", json.loads(payload))
            manifest = manifests.get(announced.get("segment", ""))
            expected = next(waiting, None)
            problem = None
            if manifest is None:
                problem = f"names segment {announced.get('segment')}, which is not in the archive"
            elif manifest != expected:
                problem = f"names segment {manifest.segment} out of order"
            else:
                announced_seq = manifest.last_seq
                facts = manifest.model_dump(include={"first_id", "last_id", "events", "chain_before", "chain_after"})
                names = [name for name, value in facts.items() if announced.get(name, 0) != value]
                if names:
                    problem = f"states another {', '.join(names)} of {manifest.segment} than its manifest"
                elif manifest.last_seq >= seq:
                    problem = f"names {manifest.segment} before its last event"
            if problem:  # audits G7
                self.findings.add("seal", problem, partition=partition, seq=seq, event_id=entry_id)
        if sealed_seq is not None and announced_seq < sealed_seq:
            problem = f"the ledger was sealed up to event {sealed_seq}, `segment-sealed` events up to {announced_seq}"
            self.findings.add("seal", problem, partition=partition)

    def newest_policy(self, partition: int) -> tuple[int, str, str] | None:
        """Return version, digest and payload of a partition's last `policy-applied` event; None without one."""
        return self._cursor.execute(
            "SELECT p.version, p.digest, e.payload::VARCHAR FROM policies AS p "
            "JOIN events AS e ON e.partition = p.partition AND e.seq = p.seq "
            "WHERE p.partition = ? ORDER BY p.seq DESC LIMIT 1",
            [partition],
        ).fetchone()

    def highest(self) -> list[dict[str, Any]]:
        """Return the highest committed amount of each budget; after `check`."""
        return self._rows("verify_highest")

    def open_holds(self) -> list[dict[str, Any]]:
        """Return the holds that are not settled; after `check`."""
        return self._rows("verify_open")

    @contextmanager
    def registered(self, tables: Mapping[str, pa.Table]) -> Generator[None]:
        """Let the statements of `rows` read these tables meanwhile."""
        for name, table in tables.items():
            self._cursor.register(name, table)
        try:
            yield
        finally:
            for name in tables:
                self._cursor.unregister(name)

    def rows(self, name: str, params: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        """Run a statement of audit/sql."""
        return self._cursor.execute(_sql(name), params).fetchall()

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
        entry_id = problem.entry_id if isinstance(problem, UnreadableEvent) else None
        seq = self.seq(partition) + 1 if entry_id is None else None
        text = f"from here on balances, caps and calls are not checked: {problem}"
        self.findings.add("event", text, partition=partition, segment=segment, seq=seq, event_id=entry_id)
        return False


def _sql(name: str) -> str:
    return packaged_text("tollbook.audit", f"sql/{name}.sql")
