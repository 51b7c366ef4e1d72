"""`tollbook report`: the spend report, as an app in the browser or as one file that stands alone."""

import asyncio
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from consumers.cli.spend import check_period

if TYPE_CHECKING:
    from consumers.report.queries import Selection
    from consumers.report.source import Source

_EXTRA: Final = ("altair", "marimo", "vl_convert")
_ALL: Final = "all"


def report(
    html: Annotated[
        Path | None, typer.Option(help="Write the report to this file instead, which needs nothing else.")
    ] = None,
    period: Annotated[
        str | None, typer.Option(help="Billing period, YYYY-MM, or `all`; the newest by default.")
    ] = None,
    plan: Annotated[str | None, typer.Option(help="Only this plan.")] = None,
    user: Annotated[str | None, typer.Option(help="Only this user.")] = None,
    campaign: Annotated[str | None, typer.Option(help="Only this campaign.")] = None,
    archive: Annotated[
        Path | None, typer.Option(help="An archive alone, copied from anywhere, without Redis and DuckDB.")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Port on the loopback interface; 0: a free one.")] = 0,
    browser: Annotated[bool, typer.Option(help="Open a browser, where there is one.")] = True,
) -> int:
    """Show the spend report: over time, caps, models, fallbacks, latency, denials; live, at rest, or of an archive.

    Example: tollbook report --html spend.html --period 2026-11
    """
    if period not in (None, _ALL):
        check_period(period)
    missing = [name for name in _EXTRA if find_spec(name) is None]
    if missing:
        typer.echo(
            "tollbook: the report needs packages that are not installed: pip install 'tollbook[report]'", err=True
        )
        return 1
    if html is not None and not html.parent.is_dir():
        raise typer.BadParameter(f"there is no directory {html.parent}", param_hint="--html")
    named = {"period": period, "plan": plan, "user": user, "campaign": campaign}
    chosen = {name: value for name, value in named.items() if value is not None}
    source = asyncio.run(_find(archive))
    # Before a browser is opened or anything written.
    selection = asyncio.run(_selection(source, chosen))
    if html is not None:
        asyncio.run(_write(source, selection, html))
    else:
        _serve(source, chosen, port, opens_browser=browser)
    return 0


async def _find(archive: Path | None) -> "Source":
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from consumers.report.source import find_source
    from consumers.tables import make_console

    columns = (TextColumn("folding the archive"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = make_console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        line = bar.add_task("", total=None, visible=False)
        return await find_source(
            archive, progress=lambda done, total: bar.update(line, completed=done, total=total, visible=True)
        )


async def _selection(source: "Source", chosen: dict[str, str]) -> "Selection":
    """Return what was chosen, or the newest period. Errors: NothingToReport; typer.BadParameter."""
    from consumers.report.queries import Selection
    from consumers.report.source import NothingToReport

    choices = await source.choices()
    if choices.newest_period is None:
        raise NothingToReport(f"there is nothing in {source.place} to report on yet: no call was made")
    fields: dict[str, str | None] = {"period": choices.newest_period, **chosen}
    if fields["period"] == _ALL:
        fields["period"] = None
    selection = Selection(**fields)
    try:
        choices.check(selection)
    except ValueError as exc:
        raise typer.BadParameter(str(exc)) from None
    return selection


async def _write(source: "Source", selection: "Selection", path: Path) -> None:
    from consumers.files import replacing
    from consumers.report.page import render_page
    from consumers.report.queries import ask

    reading = await source.read()
    try:
        document = render_page(ask(reading.connection, selection), reading.freshness)
    finally:
        reading.close()
    with replacing(path) as part:
        part.write_text(document, encoding="utf-8")
    typer.echo(f"{path}: {selection.sentence}. {reading.freshness.sentence}")


def _serve(source: "Source", chosen: dict[str, str], port: int, *, opens_browser: bool) -> None:
    from consumers.report.app import leave, open_browser, serve

    def announce(url: str) -> None:
        typer.echo(f"The spend report is at {url}\nCtrl-C ends it.")
        if opens_browser:
            open_browser(url)

    serve(source, chosen, port=port, announce=announce)
    leave(source)
