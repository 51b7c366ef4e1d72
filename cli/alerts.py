"""`tollbook alerts`: try the receivers that the policy file names."""

import asyncio
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from tollbook.inference.settings import Settings

app = typer.Typer(help="Alerts, and who receives them.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keep `test` a command of its own while it is the only one."""


@app.command("test")
def test_receivers() -> int:
    """Send a test alert to every receiver of the policy file, once, and say what came of it.

    Exit code 1 if one of them did not take it, or none is named.

    Example: tollbook alerts test
    """
    from tollbook.cli.options import data_settings

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
    from tollbook.inference.settings import read_variable
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
