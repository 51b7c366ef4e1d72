"""`tollbook demo`: run the whole system on this machine, with nothing to configure."""

import shlex
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tollbook.cli.options import JsonOption

if TYPE_CHECKING:
    from rich.console import Console

    from tollbook.demo.run import DemoOptions
    from tollbook.views.tables import Printer


def demo(
    tasks: Annotated[int, typer.Option(min=1, max=200_000, help="How many tasks to publish.")] = 15_000,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the data, to look at it afterwards.")] = False,
    seed: Annotated[int, typer.Option(help="The same seed publishes the same tasks.")] = 325,
    policy: Annotated[
        Path | None, typer.Option(help="Run the demo with the plans, tasks, streams and budgets of this policy file.")
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Run everything on this machine, with nothing to configure, and verify the books.

    Tasks of realistic sizes go through the whole system, against a local stand-in for OpenRouter. Exit code 0 only if
    the ledger and the provider's own bill agree.

    Example: tollbook demo --tasks 2000 --keep
    Example: tollbook demo --policy tollbook.toml
    """
    from tollbook.demo.run import DemoOptions
    from tollbook.inference.policy_file import read_policy_file
    from tollbook.inference.settings import DEMO_DATA_DIR
    from tollbook.views.tables import make_console

    file = None if policy is None else read_policy_file(policy)
    data_dir = DEMO_DATA_DIR if keep else Path(tempfile.mkdtemp(prefix="tollbook-demo-"))
    if keep and data_dir.exists():
        raise typer.BadParameter(f"{data_dir}/ already exists: remove it first", param_hint="--keep")
    try:
        console = make_console(stderr=as_json)
        return _run(DemoOptions(tasks, data_dir, seed, file), console, as_json=as_json, keep=keep)
    finally:
        if not keep:
            shutil.rmtree(data_dir, ignore_errors=True)


def _run(options: "DemoOptions", console: "Console", *, as_json: bool, keep: bool) -> int:
    import uvloop
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from tollbook.demo import summary as reporting
    from tollbook.demo.run import run_demo
    from tollbook.demo.workload import count_users, plan_caps_nanousd
    from tollbook.observability.logs import configure_logging
    from tollbook.schemas.money import format_usd
    from tollbook.views.tables import Printer

    configure_logging(form="console", level="ERROR")
    users, plans = count_users(options.tasks), [plan for plan, _ in options.product.plans]
    caps = options.policy.policy.plan_caps_nanousd if options.policy else plan_caps_nanousd(options.tasks)
    caps_text = ", ".join(f"{plan} {format_usd(caps[plan])}" for plan in plans)
    on_plans = "one plan" if len(plans) == 1 else "three plans" if len(plans) == 3 else f"{len(plans)} plans"
    console.print(f"[bold]Tollbook demo[/]: {users:,} users on {on_plans}; sizes of real requests")
    if options.policy is None:
        console.print(f"Caps of the plans, for {options.tasks:,} tasks: {caps_text}")
    else:
        types = ", ".join(dict.fromkeys(task_type for task_type, *_ in options.product.mix))
        console.print(f"Product of {options.policy.path}: {types}; caps of its plans: {caps_text}", markup=False)
    console.print("Provider: a local [bold]stand-in[/] for OpenRouter, with a few percent of faults")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        line = bar.add_task("starting", total=None)

        def show(what: str, done: int, total: int) -> None:
            bar.update(line, description=what, completed=done, total=total if total > 1 else None)

        report = uvloop.run(run_demo(options, show))
    if as_json:
        typer.echo(reporting.as_json(report))
    else:
        reporting.print_report(report, Printer())
        again = f"--policy {shlex.quote(str(options.policy.path))} --keep" if options.policy else "--keep"
        print_next_steps(Printer(), options.data_dir if keep else None, f"--tasks {options.tasks} {again}")
    return 0 if report.is_proven else 1


def print_next_steps(printer: "Printer", data_dir: Path | None, again: str) -> None:
    """Suggest commands to try next. `again`: the options of a demo that is the same, but keeps its data."""
    steps = [("tollbook up --stand-in", "run it yourself, still free of charge"), ("tollbook --help", "every command")]
    if data_dir is None:
        steps.insert(0, (f"tollbook demo {again}", "the same again, and keep the data"))
    else:
        steps = [*commands_for_demo(data_dir), *steps]
    printer.line()
    printer.text("Try next" if data_dir is None else f"Try next (the data are in {data_dir}/)", "bold")
    widest = max(len(command) for command, _ in steps)
    if widest + 45 <= printer.width:
        printer.facts(steps, indent=3)
    else:
        for command, meaning in steps:
            printer.line(f"   {command}")
            printer.text(meaning, "dim", indent=5)


def commands_for_demo(data_dir: Path) -> list[tuple[str, str]]:
    """Return the commands that show a kept demo from this directory, and what each shows."""
    from tollbook.app.connect import data_settings
    from tollbook.inference.errors import SettingsError
    from tollbook.inference.settings import load_settings

    setting = f"TOLLBOOK_DATA_DIR={data_dir} "
    try:
        if data_settings(load_settings()).data_dir == data_dir:
            setting = ""
    except SettingsError:
        pass  # The demo does not need the settings; a command that does says what is wrong with them.
    return [
        (f"{setting}tollbook report", "the spend report in the browser"),
        (f"{setting}tollbook report --html report.html", "the same as one file"),
        (f"{setting}tollbook spend", "spend against caps, here"),
        (f'{setting}tollbook sql "FROM denials"', "every refusal, with the numbers that decided it"),
    ]
