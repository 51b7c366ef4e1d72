"""`tollbook alerts`: what budgets have raised, and who is told."""

import asyncio
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tollbook.cli.options import JsonOption, data_settings

if TYPE_CHECKING:
    from tollbook.inference.settings import Settings

app = typer.Typer(help="Alerts, and who receives them.", no_args_is_help=True)


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
    from tollbook.views.queries import alerts_sql
    from tollbook.views.rows import plain_text
    from tollbook.views.tables import Printer, Row, dollars, printable

    rows = query_projection(data_settings(), alerts_sql(budget, last))
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
                    f"{100 * float(row['fraction']):.4g} %",
                    dollars(row["settled_usd"], 4),
                    dollars(row["cap_usd"], None),
                ],
                [f"{_cause(row)} {printable(row['call_id'])}"],
            )
            for row in rows
        ]
        Printer().table(("at", "budget", "reached>", "spent>", "cap>"), cells, "Alerts")
    return 0


def _cause(row: dict[str, Any]) -> str:
    """Say whether spend has reached the fraction, or a call was refused before it had."""
    is_reached = row["cap_usd"] and row["settled_usd"] >= row["cap_usd"] * row["fraction"]
    return "by call" if is_reached else "it did not fit, and was refused: call"


@app.command("test")
def test_receivers() -> int:
    """Send a test alert to every receiver of the policy file, once, and say what came of it.

    Exit code 1 if one of them did not take it, or none is named.

    Example: tollbook alerts test
    """
    outcomes = asyncio.run(_deliver(data_settings()))
    for name, problem in outcomes.items():
        typer.echo(f"{name}: {'it has taken the alert' if problem is None else problem}", err=problem is not None)
    if not outcomes:
        typer.echo("tollbook: the policy file names no receiver: set webhook_env or apprise_env in [alerts]", err=True)
    return 0 if outcomes and not any(outcomes.values()) else 1


async def _deliver(settings: "Settings") -> dict[str, str | None]:
    """Return by receiver why it did not take the alert; None where it did. Errors: SettingsError."""
    import uuid

    import httpx

    from tollbook.consumers.alerts.receivers import NotDelivered, receivers_of
    from tollbook.inference.environment import read_variable
    from tollbook.inference.stated_policy import policy_of
    from tollbook.ledger.clock import now_ms
    from tollbook.schemas.alerts import Alert

    alert = Alert(id=str(uuid.uuid4()), kind="test", text="This is a test: nothing has happened.", at_ms=now_ms())
    async with httpx.AsyncClient() as http:
        receivers, unusable = receivers_of(policy_of(settings).alerts, settings.webhook_secret, read_variable, http)
        outcomes: dict[str, str | None] = dict(unusable)
        for receiver in receivers:
            try:
                await receiver.deliver(alert)
            except NotDelivered as exc:
                outcomes[receiver.name] = f"it did not take the alert: {exc}"
            else:
                outcomes[receiver.name] = None
    return outcomes
