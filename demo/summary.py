"""The demo's final report, read from the projection with SQL: as text, and as JSON."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from tollbook.demo.proof import Check
from tollbook.inference.reconcile import Reconciliation
from tollbook.ledger.projection.store import Store
from tollbook.schemas.money import format_usd
from tollbook.views.rows import plain_text
from tollbook.views.tables import Printer, dollars, percent_used

_BY_PLAN: Final = """
SELECT plan, count(*) AS users, sum(calls)::BIGINT AS calls, sum(spent_usd)::DECIMAL(18, 9) AS spent_usd,
    sum(denied)::BIGINT AS denied, sum(fallbacks)::BIGINT AS fallbacks,
    count(*) FILTER (denied > 0) AS users_at_cap
FROM spend GROUP BY plan ORDER BY spent_usd DESC
"""
_TOP_USERS: Final = """
SELECT user_id, plan, spent_usd, cap_usd, calls, denied FROM spend ORDER BY spent_usd DESC, user_id LIMIT 10
"""
_FALLBACKS: Final = """
SELECT from_model, model AS to_model, reason, count(*) AS times
FROM events WHERE type = 'fallback-used' GROUP BY ALL ORDER BY times DESC, from_model, reason
"""
_LATENCIES: Final = """
SELECT model, count(*) AS attempts, count(*) FILTER (outcome <> 'ok') AS failed,
    quantile_disc(latency_ms, 0.5) AS p50_ms, quantile_disc(latency_ms, 0.95) AS p95_ms,
    quantile_disc(latency_ms, 0.99) AS p99_ms
FROM events WHERE type = 'model-called' GROUP BY model ORDER BY attempts DESC
"""
_GAUGE: Final = 8


@dataclass(frozen=True, slots=True)
class Report:
    """The demo's outcome. Latencies in milliseconds, money in dollars as Decimal."""

    tasks: int
    seconds: float
    statuses: dict[str, int]
    by_plan: list[dict[str, Any]]
    top_users: list[dict[str, Any]]
    fallbacks: list[dict[str, Any]]
    latencies: list[dict[str, Any]]
    reconciliation: Reconciliation
    proof: list[Check]

    @property
    def is_proven(self) -> bool:
        """Whether every claim of the proof holds."""
        return all(check.is_true for check in self.proof)


async def make_report(
    store: Store, *, seconds: float, statuses: dict[str, int], reconciliation: Reconciliation, proof: list[Check]
) -> Report:
    """Read the report's tables from the projection."""
    plans, users, fallbacks, latencies = [
        await asyncio.to_thread(store.query, sql) for sql in (_BY_PLAN, _TOP_USERS, _FALLBACKS, _LATENCIES)
    ]
    return Report(sum(statuses.values()), seconds, statuses, plans, users, fallbacks, latencies, reconciliation, proof)


def as_json(report: Report) -> str:
    """Return the report as JSON; dollars are decimal strings."""
    document = asdict(report) | {"is_proven": report.is_proven, "provider": "stand-in"}
    return json.dumps(document, default=plain_text, indent=2)


def print_report(report: Report, printer: Printer) -> None:
    """Print the report for people."""
    ended = ", ".join(f"{number:,} {status}" for status, number in sorted(report.statuses.items()))
    rate = report.tasks / report.seconds if report.seconds else 0
    printer.line()
    printer.text(f"{report.tasks:,} tasks in {report.seconds:.1f} s ({rate:,.0f}/s): {ended}", "bold")
    _print_plans(report, printer)
    _print_users(report, printer)
    if report.fallbacks:
        rows = [(row["from_model"], row["to_model"], row["reason"], f"{row['times']:,}") for row in report.fallbacks]
        printer.table(("from", "to", "reason", "times>"), rows, "Fallbacks")
    _print_attempts(report, printer)
    _print_proof(report, printer)


def _print_plans(report: Report, printer: Printer) -> None:
    rows = [
        (
            row["plan"],
            f"{row['users']:,}",
            f"{row['calls']:,}",
            dollars(row["spent_usd"]),
            *(f"{row[name]:,}" for name in ("denied", "users_at_cap", "fallbacks")),
        )
        for row in report.by_plan
    ]
    columns = ("plan", "users>", "calls>", "spent>", "denied>", "users denied>", "fallbacks>")
    printer.table(columns, rows, "Spend by plan")


def _print_users(report: Report, printer: Printer) -> None:
    rows: list[Sequence[str]] = []
    for row in report.top_users:
        spent, cap = row["spent_usd"], row["cap_usd"]
        filled = min(_GAUGE, int(spent / cap * _GAUGE)) if cap else _GAUGE
        gauge = "█" * filled + "░" * (_GAUGE - filled)
        counts = (f"{row['calls']:,}", f"{row['denied']:,}")
        used = percent_used(spent, cap, places=1)
        rows.append((row["user_id"], row["plan"], dollars(spent), dollars(cap, 2), gauge, used, *counts))
    columns = ("user", "plan", "spent>", "cap>", "", "used>", "calls>", "denied>")
    printer.table(columns, rows, "Users who spent most, against their caps")


def _print_attempts(report: Report, printer: Printer) -> None:
    names = ("attempts", "failed", "p50_ms", "p95_ms", "p99_ms")
    rows = [(row["model"], *(f"{row[name]:,}" for name in names)) for row in report.latencies]
    columns = ("model", "attempts>", "failed>", "p50 ms>", "p95 ms>", "p99 ms>")
    printer.table(columns, rows, "Attempts by model, answered by the stand-in")


def _print_proof(report: Report, printer: Printer) -> None:
    asked = report.reconciliation
    printer.line()
    printer.text("Proof", "bold")
    if asked.asked:
        printer.text(
            f"  {asked.asked} charges were uncertain (no usage, or an answer that cannot be read). The provider was "
            f"asked: {asked.adjusted} were corrected, by {format_usd(asked.difference_nanousd, places=6)} in all.",
            hang=2,
        )
    for check in report.proof:
        printer.text(f"{'✓' if check.is_true else '✗'} {check.claim} ({check.detail})", indent=3, hang=2)
