"""`tollbook report`: the spend report, as an app in the browser or as one self-contained file."""

import asyncio
import re
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from tollbook.cli.options import read_id, read_period

if TYPE_CHECKING:
    from tollbook.views.report.queries import Selection
    from tollbook.views.report.reading import Reading, Source

_EXTRA: Final = ("altair", "marimo", "vl_convert")
# Imported while the source is read, so that the browser does not wait for them.
_SHOWN_BY: Final = tuple(f"tollbook.views.report.{name}" for name in ("figures", "page", "tables"))


def _read_period(value: str | None) -> str | None:
    return value if value == "all" else read_period(value)


def report(
    html: Annotated[
        Path | None, typer.Option(help="Write the report to this file, which any browser can open.")
    ] = None,
    period: Annotated[
        str | None,
        typer.Option(help="Billing period, YYYY-MM, or `all`; the newest by default.", callback=_read_period),
    ] = None,
    plan: Annotated[str | None, typer.Option(help="Only this plan.")] = None,
    user: Annotated[str | None, typer.Option(help="Only this user.", callback=read_id)] = None,
    campaign: Annotated[str | None, typer.Option(help="Only this campaign.", callback=read_id)] = None,
    archive: Annotated[
        str | None,
        typer.Option(
            metavar="PLACE",
            help="Read only this archive: a directory or s3://bucket/prefix.",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; by default only this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Port to listen on; 0: any free port.")] = 0,
    base_path: Annotated[
        str, typer.Option(help="Path prefix under which a proxy forwards requests, for example /spend.")
    ] = "",
    browser: Annotated[bool, typer.Option(help="Open a browser if there is one.")] = True,
) -> int:
    """Show the spend report: spend over time, caps, models, fallbacks, latency and denials.

    It reads the running system, the data directory of a stopped one, or an archive.

    Example: tollbook report
    Example: tollbook report --html spend.html --period 2026-11
    """
    missing = [name for name in _EXTRA if find_spec(name) is None]
    if missing:
        typer.echo(
            "tollbook: the report needs packages that are not installed: pip install 'tollbook[report]'", err=True
        )
        return 1
    if html is not None and not html.parent.is_dir():
        raise typer.BadParameter(f"there is no directory {html.parent}", param_hint="--html")
    if not re.fullmatch(r"(/[\w.~-]+)*/?", base_path):
        raise typer.BadParameter("a base path is written like /spend", param_hint="--base-path")
    named = {"period": period, "plan": plan, "user": user, "campaign": campaign}
    chosen = {name: value for name, value in named.items() if value is not None}
    source = asyncio.run(_find(archive))
    if html is not None:
        _write(source, chosen, html)
    else:
        _serve(source, chosen, host, port, base_path.rstrip("/"), opens_browser=browser)
    return 0


async def _find(archive: str | None) -> "Source":
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from tollbook.views.report.reading import find_source
    from tollbook.views.tables import make_console

    columns = (TextColumn("folding the archive"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = make_console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        line = bar.add_task("", total=None, visible=False)
        return await find_source(
            archive, progress=lambda done, total: bar.update(line, completed=done, total=total, visible=True)
        )


def _read(source: "Source", chosen: dict[str, str], *modules: str) -> "tuple[Reading, Selection]":
    """Read a source and run the first queries; import the modules that show the results at the same time.

    Errors: LedgerUnavailable; NothingToReport; typer.BadParameter if the selection does not exist.
    """
    with ThreadPoolExecutor(1) as thread:
        soon = thread.submit(lambda: asyncio.run(source.read()))
        for name in modules:
            import_module(name)
    reading = soon.result()
    try:
        selection = _selection(source, reading, chosen)
        reading.ask(selection)
    except BaseException:
        reading.close()
        raise
    return reading, selection


def _selection(source: "Source", reading: "Reading", chosen: dict[str, str]) -> "Selection":
    from tollbook.views.report.reading import NothingToReport

    if reading.choices.newest_period is None:
        raise NothingToReport(f"there is nothing to report in {source.place} yet: no calls were made")
    try:
        return reading.choices.select(chosen)
    except ValueError as exc:
        raise typer.BadParameter(str(exc)) from None


def _write(source: "Source", chosen: dict[str, str], path: Path) -> None:
    reading, selection = _read(source, chosen, *_SHOWN_BY)

    from tollbook.views.files import replacing
    from tollbook.views.report.page import render_page

    try:
        document = render_page(reading.ask(selection), reading.freshness)
    finally:
        reading.close()
    with replacing(path) as part:
        part.write_text(document, encoding="utf-8")
    typer.echo(f"{path}: {selection.sentence}. {reading.freshness.sentence}")


def _serve(
    source: "Source", chosen: dict[str, str], host: str, port: int, base_path: str, *, opens_browser: bool
) -> None:
    reading, _ = _read(source, chosen, "tollbook.views.report.app", *_SHOWN_BY)

    from tollbook.views.report.app import Address, leave, open_browser, serve

    def announce(url: str) -> None:
        typer.echo(f"The spend report is at {url}\nCtrl-C stops it.")
        if opens_browser:
            open_browser(url)

    serve(source, reading, chosen, Address(host, port, base_path), announce=announce)
    leave(source)
