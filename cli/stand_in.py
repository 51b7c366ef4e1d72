"""`tollbook stand-in`: a local server that answers like OpenRouter."""

import asyncio
from typing import Annotated

import typer

from tollbook.cli.serve import run_until_signal
from tollbook.schemas.problems import unknown_name
from tollbook.standin import SCENARIOS, FaultPlan, StandIn, StandInConfig

_SCENARIOS = "Answer every request with this recorded reply of a real provider: " + ", ".join(SCENARIOS) + "."


def stand_in(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0: any free port.")] = 8787,
    latency_ms: Annotated[int, typer.Option(min=0, help="Milliseconds until it answers.")] = 200,
    scenario: Annotated[str | None, typer.Option(metavar="NAME", help=_SCENARIOS)] = None,
) -> None:
    """Run a local server that answers and bills like OpenRouter.

    It is free; its answers are placeholders. The documentation says how Tollbook treats each scenario, under "What a
    reply means".

    Example: tollbook stand-in --port 8787 --scenario tool_calls
    """
    if scenario is not None and scenario not in SCENARIOS:
        raise typer.BadParameter(unknown_name("scenario", scenario, SCENARIOS), param_hint="--scenario")
    faults = FaultPlan(rates={scenario: 1.0} if scenario else {})
    config = StandInConfig(port=port, latency_ms=latency_ms, faults=faults, lists_prices=True)

    async def run(stop: asyncio.Event) -> None:
        async with StandIn(config) as server:
            typer.echo(f"stand-in for OpenRouter (not OpenRouter) at {server.base_url}")
            typer.echo(f"use it with: OPENROUTER_BASE_URL={server.base_url} TOLLBOOK_DIALECT=openrouter tollbook up")
            typer.echo(f"in place of every provider in a policy: TOLLBOOK_STAND_IN_URL={server.root_url}")
            await stop.wait()

    run_until_signal(run)
