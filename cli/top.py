"""`tollbook top`: show the running system live, or as one snapshot."""

import asyncio
import json
import os
import sys
from typing import TYPE_CHECKING, Annotated, Final

import typer

if TYPE_CHECKING:
    from tollbook.inference.settings import Settings
    from tollbook.views.top.figures import Figures

_NICE: Final = 5


def top(
    interval: Annotated[float, typer.Option(min=0.2, max=3600, help="Seconds between updates.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one snapshot as plain text, and exit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one snapshot as JSON, and exit.")] = False,
) -> int:
    """Watch the running system: calls, money, users against caps, streams, projector. Does not slow it.

    q or Ctrl-C ends it. docs/operators/top.md explains each figure. Example: tollbook top --interval 2
    """
    from tollbook.cli.options import data_settings
    from tollbook.observability.logs import configure_logging

    settings = data_settings()
    # The system that is watched has priority, but not so much that a key press is felt late.
    os.nice(_NICE)
    # A log line would break the screen, and the screen shows problems itself.
    configure_logging(form="console", level="CRITICAL")
    # Not uvloop: see `run_screen`.
    asyncio.run(_run(settings, interval_s=interval, once=once, as_json=as_json))
    return 0


async def _run(settings: "Settings", *, interval_s: float, once: bool, as_json: bool) -> None:
    """Errors: LedgerUnavailable if there is no system to watch."""
    from tollbook.views.top.gather import Gatherer
    from tollbook.views.top.loop import run_screen, terminal_console

    console = terminal_console()
    gatherer = Gatherer(settings)
    try:
        await gatherer.check()
        if once or as_json or not console.is_terminal or console.is_dumb_terminal:
            _print(await gatherer.gather(must_copy=True), as_json=as_json)
        else:
            await run_screen(gatherer, console, interval_s=interval_s)
    finally:
        await gatherer.aclose()


def _print(figures: "Figures", *, as_json: bool) -> None:
    from tollbook.views.tables import make_console
    from tollbook.views.top.figures import as_document
    from tollbook.views.top.screen import PLAIN_WIDTH, draw

    if as_json:
        typer.echo(json.dumps(as_document(figures), indent=2))
        return
    console = make_console()
    width = console.width if sys.stdout.isatty() else PLAIN_WIDTH
    for line in draw(figures, width=width, height=None):
        line.rstrip()
        console.print(line, soft_wrap=True)
