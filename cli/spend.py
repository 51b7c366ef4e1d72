"""`tollbook spend`: show what users and budgets have spent, from the projection."""

import json
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tollbook.cli.options import data_settings, load_redis_alone, read_id, read_period
from tollbook.cli.user_ids import on_ledger_or_none, plain_ids

if TYPE_CHECKING:
    from tollbook.inference.settings import Settings

_POSITIONS = "SELECT ledger_id, seq FROM position"
_ANSWER_S = 2.0


def spend(
    user: Annotated[
        str | None, typer.Argument(help="Only this user, in every billing period.", callback=read_id)
    ] = None,
    period: Annotated[
        str | None, typer.Option(help="Billing period, YYYY-MM; by default the latest.", callback=read_period)
    ] = None,
    top: Annotated[int, typer.Option(min=1, max=10_000, help="How many users, the highest spend first.")] = 20,
    budgets: Annotated[
        bool, typer.Option("--budgets", help="Show the policy's budgets instead, each in its latest window.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array of objects.")] = False,
) -> int:
    """Show spend against caps, per user and billing period, or per budget of the policy.

    If the figures are behind the ledger, a line on standard error says so.

    Example: tollbook spend u42
    Example: tollbook spend --budgets
    """
    from tollbook.app.connect import query_projection_at_once
    from tollbook.views.queries import budgets_sql, spend_sql
    from tollbook.views.rows import plain_text

    if budgets and (user is not None or period is not None):
        raise typer.BadParameter("cannot be combined with a user or --period", param_hint="--budgets")
    settings = data_settings()
    kept = on_ledger_or_none(settings, user)
    # Read before the projection is copied: events written meanwhile are not lag.
    written, problem = _written_events(settings)
    asked = budgets_sql(top) if budgets else spend_sql(kept, period, top)
    rows, positions = query_projection_at_once(settings, asked, _POSITIONS)
    name = "value" if budgets else "user_id"
    plain = plain_ids(settings, (row[name] for row in rows))
    rows = [row | {name: plain(row[name])} for row in rows]
    user = user and plain(kept or user)
    note = problem or _describe_lag(written, positions)
    if as_json:
        typer.echo(json.dumps(rows, default=plain_text))
    elif not rows:
        typer.echo("no spend yet")
    elif budgets:
        _print_budgets(rows)
    else:
        _print(rows, user)
    if note:
        typer.echo(f"tollbook: {note}", err=True)
    return 0


def _written_events(settings: "Settings") -> tuple[tuple[str, int] | None, str]:
    """Return the ledger's id and number of events, or the reason why Redis did not give them."""
    from tollbook.inference.address import find_redis_url
    from tollbook.ledger.errors import LedgerUnavailable

    try:
        find_redis_url(settings)
    except LedgerUnavailable:
        return None, ""  # Nothing runs here.
    # Imported here: loading them takes longer than a small query.
    load_redis_alone()
    import asyncio

    from tollbook.app.connect import written_events

    async def bounded() -> tuple[str, int]:
        async with asyncio.timeout(_ANSWER_S):
            return await written_events(settings)

    try:
        return asyncio.run(bounded()), ""
    except (LedgerUnavailable, TimeoutError) as exc:
        reason = str(exc) or "Redis did not answer"
        return None, f"unknown whether the projection is up to date: {reason}"


def _describe_lag(written: tuple[str, int] | None, positions: list[dict[str, Any]]) -> str:
    if written is None or not positions:
        return ""
    ledger_id, number = written
    if ledger_id != positions[0]["ledger_id"]:
        return "Redis has another ledger than the projection; `tollbook doctor` says more"
    behind = number - sum(row["seq"] for row in positions)
    if behind <= 0:
        return ""
    return f"the projection is {behind:,} event{'' if behind == 1 else 's'} behind the ledger"


def _print_budgets(rows: list[dict[str, Any]]) -> None:
    from tollbook.views.tables import Printer, dollars, percent_used, printable

    def cells(row: dict[str, Any]) -> list[str]:
        cap: Decimal | None = row["cap_usd"]
        return [
            printable(row["name"]),
            printable(row["value"]),
            row["window"],
            dollars(row["spent_usd"], 4),
            dollars(row["reserved_usd"], 4),
            "-" if cap is None else dollars(cap, None),
            "-" if cap is None else percent_used(row["spent_usd"], cap),
            dollars(row["credit_usd"], None) if row["credit_usd"] else "-",
        ]

    columns = ("budget", "value", "window", "spent>", "held>", "cap>", "used>", "credit>?")
    Printer().table(columns, [cells(row) for row in rows], "Budgets in their latest windows")


def _print(rows: list[dict[str, Any]], user: str | None) -> None:
    from tollbook.views.tables import Printer, dollars, percent_used

    def cells(row: dict[str, Any]) -> list[str]:
        cap: Decimal | None = row["cap_usd"]
        return [
            row["user_id" if user is None else "period"],
            row["plan"] or "-",
            dollars(row["spent_usd"], 4),
            dollars(row["reserved_usd"], 4),
            "-" if cap is None else dollars(cap, None),
            "-" if cap is None else percent_used(row["spent_usd"], cap),
            *(f"{row[name]:,}" for name in ("denied", "calls", "fallbacks")),
        ]

    first, title = ("user", f"Spend in {rows[0]['period']}") if user is None else ("period", f"Spend of {user}")
    columns = (first, "plan?", "spent>", "held>", "cap>", "used>", "denied>?", "calls>?", "fallbacks>?")
    Printer().table(columns, [cells(row) for row in rows], title)
