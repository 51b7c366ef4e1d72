"""`tollbook spend`: what users have spent, from the projection."""

import json
from decimal import Decimal
from typing import Annotated, Any

import typer

from tollbook.cli.options import data_settings, read_id, read_period

_COLUMNS = "user_id, period, plan, cap_usd, spent_usd, reserved_usd, calls, denied, fallbacks, assumed_usd, overage_usd"


def spend(
    user: Annotated[str | None, typer.Argument(help="Only this user, every period.", callback=read_id)] = None,
    period: Annotated[
        str | None, typer.Option(help="Billing period, YYYY-MM; the latest by default.", callback=read_period)
    ] = None,
    top: Annotated[int, typer.Option(min=1, max=10_000, help="How many users, the highest spend first.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array of objects.")] = False,
) -> int:
    """Show spend against caps, per user and billing period.

    Example: tollbook spend u42
    """
    from tollbook.app.connect import query_projection
    from tollbook.views.rows import plain_text

    rows = query_projection(data_settings(), _sql(user, period, top))
    if as_json:
        typer.echo(json.dumps(rows, default=plain_text))
    elif not rows:
        typer.echo("no spend yet")
    else:
        _print(rows, user)
    return 0


def _sql(user: str | None, period: str | None, top: int) -> str:
    conditions: list[str] = []
    if user is not None:
        conditions.append("user_id = '" + user.replace("'", "''") + "'")
    if period is not None:
        conditions.append(f"period = '{period}'")  # It has no quotes: `read_period` has checked it.
    elif user is None:
        conditions.append("period = (SELECT max(period) FROM spend)")
    where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
    return f"SELECT {_COLUMNS} FROM spend {where} ORDER BY spent_usd DESC, user_id, period LIMIT {top}"  # noqa: S608


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
