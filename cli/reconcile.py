"""`tollbook reconcile`: ask the provider for the real cost of uncertain charges."""

import asyncio
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from tollbook.cli.options import JsonOption
from tollbook.cli.user_ids import plain_ids

if TYPE_CHECKING:
    from tollbook.inference.reconcile import Reconciliation
    from tollbook.inference.settings import Settings


_ASSUMED: Final = """
SELECT call_id, user_id, cost_usd, assumed_usd, reason FROM calls
WHERE assumed_usd > 0 ORDER BY assumed_usd DESC, call_id
"""


def reconcile(
    author: Annotated[str, typer.Option(help="Who asks; recorded on the ledger with each correction.")] = "tollbook",
    as_json: JsonOption = False,
) -> int:
    """Ask the provider for the real cost of charges that were assumed or computed from prices, and correct the ledger.

    Charges that the provider does not know stay assumed and are listed. So are unbooked charges, which wait beside
    the ledger. Repeating is harmless.

    Example: tollbook reconcile
    Example: tollbook reconcile --author ann --json
    """
    from tollbook.app.connect import with_running_provider
    from tollbook.cli.unbooked import describe_unbooked
    from tollbook.inference.settings import load_settings

    settings = with_running_provider(load_settings())
    outcome, assumed, unbooked = asyncio.run(_reconcile(settings, author))
    plain = plain_ids(settings, (row["user_id"] for row in (*assumed, *unbooked)))
    assumed, unbooked = ([row | {"user_id": plain(row["user_id"])} for row in rows] for rows in (assumed, unbooked))
    if as_json:
        typer.echo(json.dumps(asdict(outcome) | {"still_assumed": assumed, "unbooked": unbooked}, default=str))
    else:
        _print(outcome, assumed)
        for line in describe_unbooked(unbooked):
            typer.echo(line)
    return 0


async def _reconcile(
    settings: "Settings", author: str
) -> "tuple[Reconciliation, list[dict[str, Any]], list[dict[str, Any]]]":
    from tollbook.app.connect import query_projection
    from tollbook.cli.unbooked import unbooked_charges
    from tollbook.inference.cost_lookup import CostLookup
    from tollbook.inference.current_runtime import connect_runtime, using_runtime
    from tollbook.inference.provider_access import check_providers
    from tollbook.inference.providers.clients import ProviderClients
    from tollbook.inference.reconcile import reconcile
    from tollbook.schemas.routes import DEFAULT_PROVIDER

    async def query(sql: str) -> list[dict[str, Any]]:
        return await asyncio.to_thread(query_projection, settings, sql)

    async with (
        connect_runtime(settings),
        using_runtime() as runtime,
        ProviderClients.from_settings(settings) as providers,
    ):
        if DEFAULT_PROVIDER in runtime.rules.called_providers:
            check_providers(runtime.rules, settings, [DEFAULT_PROVIDER])
        outcome = await reconcile(query, runtime.ledger, CostLookup(providers, runtime.rules), author=author)
        handle = runtime.handle
        unbooked = await unbooked_charges(handle.pipeline, handle.keys, handle.ledger_id, settings.data_dir)
    unknown = set(outcome.unknown)
    return outcome, [row for row in await query(_ASSUMED) if row["call_id"] in unknown], unbooked


def _print(outcome: "Reconciliation", assumed: list[dict[str, Any]]) -> None:
    from tollbook.schemas.money import format_usd
    from tollbook.views.tables import Printer, Row, dollars, printable

    difference = format_usd(outcome.difference_nanousd, places=6)
    typer.echo(f"{outcome.asked} charges asked about, {outcome.adjusted} calls corrected by {difference} in all")
    if not assumed:
        return
    rows = [
        Row(
            [row["call_id"], row["user_id"], dollars(row["assumed_usd"])],
            [printable(row["reason"])] if row["reason"] else (),
        )
        for row in assumed
    ]
    Printer().table(("call", "user", "assumed>"), rows, "Still assumed: the provider does not know")
