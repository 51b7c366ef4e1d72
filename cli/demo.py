"""`tollbook demo`: everything at once, on this machine, with nothing to configure."""

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tollbook.cli.options import JsonOption

if TYPE_CHECKING:
    from rich.console import Console


def demo(
    tasks: Annotated[int, typer.Option(min=1, max=200_000, help="How many tasks to publish.")] = 15_000,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the data to look around afterwards.")] = False,
    seed: Annotated[int, typer.Option(help="The same seed publishes the same tasks.")] = 325,
    as_json: JsonOption = False,
) -> int:
    """Run everything on this machine, with nothing to configure, and prove the books.

    Tasks of real sizes go through all parts, against a local stand-in for OpenRouter. Exit code 0 only if the ledger
    and the provider's own book agree.

    Example: tollbook demo --tasks 2000 --keep
    """
    from tollbook.inference.settings import DEMO_DATA_DIR
    from tollbook.views.tables import make_console

    data_dir = DEMO_DATA_DIR if keep else Path(tempfile.mkdtemp(prefix="tollbook-demo-"))
    if keep and data_dir.exists():
        raise typer.BadParameter(
            f"{data_dir}/ already exists: look around in it, or remove it first", param_hint="--keep"
        )
    try:
        return _run(tasks, data_dir, seed, make_console(stderr=as_json), as_json=as_json, keep=keep)
    finally:
        if not keep:
            shutil.rmtree(data_dir, ignore_errors=True)


def _run(tasks: int, data_dir: Path, seed: int, console: "Console", *, as_json: bool, keep: bool) -> int:
    import uvloop
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from tollbook.demo import summary as reporting
    from tollbook.demo.run import DemoOptions, run_demo
    from tollbook.observability.logs import configure_logging

    configure_logging(form="console", level="ERROR")
    console.print("[bold]Tollbook demo[/]: 200 users on three plans; real request sizes")
    console.print("Provider: a local [bold]stand-in[/] for OpenRouter, with a few percent of faults")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        line = bar.add_task("starting", total=None)

        def show(what: str, done: int, total: int) -> None:
            bar.update(line, description=what, completed=done, total=total if total > 1 else None)

        report = uvloop.run(run_demo(DemoOptions(tasks, data_dir, seed), show))
    if as_json:
        typer.echo(reporting.as_json(report))
    else:
        reporting.print_report(report, console)
    if keep:
        console.print(f"\n{ways_around(data_dir)}", highlight=False)
    return 0 if report.is_proven else 1


def ways_around(data_dir: Path) -> str:
    """Return the commands with which to look at a kept demo from the current directory, with Rich's markup."""
    from tollbook.app.connect import data_settings
    from tollbook.inference.errors import SettingsError
    from tollbook.inference.settings import load_settings

    setting = f"TOLLBOOK_DATA_DIR={data_dir} "
    try:
        if data_settings(load_settings()).data_dir == data_dir:
            setting = ""
    except SettingsError:
        pass  # The demo does not use the settings; a command that does will say what is wrong with them.
    lines = (
        (f"{setting}tollbook report", "the spend report in the browser"),
        (f"{setting}tollbook report --html report.html", "the same as one file"),
        (f"{setting}tollbook spend", "spend against caps, here"),
    )
    width = max(len(command) for command, _ in lines)
    shown = "\n".join(f"  {command:<{width}}  [dim]{meaning}[/]" for command, meaning in lines)
    return f"[bold]Look around[/] (the data are in {data_dir}/)\n{shown}"
