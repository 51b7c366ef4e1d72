"""`tollbook alerts`: what budgets have raised."""

import json
from typing import Annotated

import typer

from tollbook.cli.options import JsonOption, data_settings, quoted, utc_column

app = typer.Typer(help="Alerts of budgets.", no_args_is_help=True)


@app.command("list")
def list_alerts(
    budget: Annotated[str | None, typer.Option(help="Only of this budget of the policy.")] = None,
    last: Annotated[int, typer.Option(min=1, max=10_000, help="How many, the newest first.")] = 20,
    as_json: JsonOption = False,
) -> int:
    """List the alerts that were raised: which budget, which fraction of its cap, when, by which call.

    Example: tollbook alerts list --budget team-week
    """
    from tollbook.app.connect import query_projection
    from tollbook.schemas.identifiers import describe_budget
    from tollbook.views.rows import plain_text
    from tollbook.views.tables import Printer, Row, dollars, printable

    where = "" if budget is None else f"WHERE name = {quoted(budget)} OR starts_with(name, {quoted(budget + '~')})"
    rows = query_projection(
        data_settings(),
        f'SELECT {utc_column("raised_at")}, budget, name, value, "window", fraction, cap_usd, settled_usd, call_id, id '  # noqa: S608 - quoted.
        f"FROM alerts {where} ORDER BY alerts.raised_at DESC, id DESC LIMIT {last}",
    )
    if as_json:
        typer.echo(json.dumps(rows, default=plain_text))
    elif not rows:
        typer.echo("no alert was raised")
    else:
        cells = [
            Row(
                [
                    row["raised_at"],
                    printable(describe_budget(row["budget"])),
                    f"{100 * row['fraction']:.4g} %",
                    dollars(row["settled_usd"], 4),
                    dollars(row["cap_usd"], None),
                ],
                [f"by call {printable(row['call_id'])}"],
            )
            for row in rows
        ]
        Printer().table(("at", "budget", "reached>", "spent>", "cap>"), cells, "Alerts")
    return 0
