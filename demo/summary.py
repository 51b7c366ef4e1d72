"""What the demo shows at its end: read from the projection with SQL, printed for people or as JSON."""

import asyncio
import json
from dataclasses import asdict, dataclass
from decimal import Decimal
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tollbook.demo.proof import Check
from tollbook.inference.reconcile import Reconciliation
from tollbook.ledger.projection.store import Store
from tollbook.schemas.money import format_usd
from tollbook.views.tables import dollars, make_table

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
# Characters; the tables fit a terminal of 80 columns.
_BAR: Final = 10


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
    return json.dumps(document, default=_plain, indent=2)


def print_report(report: Report, console: Console) -> None:
    """Print the report for people."""
    ended = ", ".join(f"{number:,} {status}" for status, number in sorted(report.statuses.items()))
    rate = report.tasks / report.seconds if report.seconds else 0
    console.print(f"\n[bold]{report.tasks:,} tasks[/] in {report.seconds:.1f} s ({rate:,.0f}/s): {ended}\n")
    console.print(_plans(report))
    console.print(_users(report))
    if report.fallbacks:
        console.print(_fallbacks(report))
    console.print(_latencies(report))
    _print_proof(report, console)


def _plans(report: Report) -> Table:
    table = make_table(
        ("plan", "users>", "calls>", "spent>", "denied>", "users at cap>", "fallbacks>"), "Spend by plan"
    )
    for row in report.by_plan:
        numbers = (row["users"], row["calls"])
        table.add_row(
            row["plan"],
            *(f"{number:,}" for number in numbers),
            dollars(row["spent_usd"]),
            *(f"{row[name]:,}" for name in ("denied", "users_at_cap", "fallbacks")),
        )
    return table


def _users(report: Report) -> Table:
    table = make_table(
        ("user", "plan", "spent>", "cap>", "", "used>", "calls>", "denied>"), "Top users against their caps"
    )
    for row in report.top_users:
        share = row["spent_usd"] / row["cap_usd"]
        full = round(share * _BAR)
        bar = Text("█" * full, style="red" if row["denied"] else "green").append("░" * (_BAR - full), style="dim")
        table.add_row(
            row["user_id"],
            row["plan"],
            dollars(row["spent_usd"]),
            f"${row['cap_usd']:,.2f}",
            bar,
            f"{share:.1%}",
            f"{row['calls']:,}",
            f"{row['denied']:,}",
        )
    return table


def _fallbacks(report: Report) -> Table:
    table = make_table(("from", "to", "reason", "times>"), "Fallbacks")
    for row in report.fallbacks:
        table.add_row(row["from_model"], row["to_model"], row["reason"], f"{row['times']:,}")
    return table


def _latencies(report: Report) -> Table:
    table = make_table(
        ("model", "attempts>", "failed>", "p50 ms>", "p95 ms>", "p99 ms>"), "Attempts by model (stand-in)"
    )
    for row in report.latencies:
        numbers = ("attempts", "failed", "p50_ms", "p95_ms", "p99_ms")
        table.add_row(row["model"], *(f"{row[name]:,}" for name in numbers))
    return table


def _print_proof(report: Report, console: Console) -> None:
    asked = report.reconciliation
    console.print("[bold]Proof[/]")
    if asked.asked:
        console.print(
            f"  {asked.asked} charges were uncertain (no usage or no readable answer); the provider was asked, "
            f"{asked.adjusted} corrected by {format_usd(asked.difference_nanousd, places=6)}",
            highlight=False,
        )
    for check in report.proof:
        mark = "[green]✓[/]" if check.is_true else "[bold red]✗[/]"
        console.print(f"  {mark} {check.claim} [dim]({check.detail})[/]", highlight=False)


def _plain(value: object) -> object:
    return f"{value:f}" if isinstance(value, Decimal) else str(value)
