"""The progress bar of commands that read the whole ledger."""

import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager


@contextmanager
def progress(label: str, total: int | None, *, is_quiet: bool) -> Generator[Callable[[int], None]]:
    """Show a bar on standard error, if that is a terminal; yields a function that takes the number of events done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from tollbook.views.tables import make_console

    rate = TextColumn("{task.fields[rate]:>12}")
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    is_hidden = is_quiet or not sys.stderr.isatty()
    started, done = time.perf_counter(), 0
    with Progress(*columns, console=make_console(stderr=True), transient=True, disable=is_hidden) as bar:
        line = bar.add_task("", total=total, rate="")

        def advance(events: int) -> None:
            nonlocal done
            done += events
            rate = done / max(time.perf_counter() - started, 1e-9)
            bar.update(line, completed=done, rate=f"{rate:,.0f}/s")

        yield advance
