"""Spend report: opening it with 2,000,000 events, and drawing it again after a filter.

Without a browser, opening is everything that `tollbook report` does before the first chart: the copy of the projection,
its preparation, the queries for the newest period, and the charts as they are sent to the browser. With a browser
(Chromium, if it is installed), it is the time until a person sees the charts.
"""

import asyncio
import json
import shutil
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Final

from benchmarks.measure import Result, Sizes, Target, in_turn
from benchmarks.report_browser import CHROMIUM, open_and_choose
from benchmarks.report_load import ReportLoad
from tollbook.ledger.archive.rebuilding import Rebuild
from tollbook.ledger.projection.store import Store
from tollbook.ledger.stream import Batch
from tollbook.views.report.figures import figures
from tollbook.views.report.queries import Selection, ask
from tollbook.views.report.reading import Reading, Source

_USERS: Final = 2_000
_PAGE: Final = 120_000
_LIMIT: Final = Target("<=", 3.0)


async def run(directory: Path, sizes: Sizes) -> list[Result]:
    path = directory / "tollbook.duckdb"
    events = await asyncio.to_thread(_fill, path, sizes.of(670_500, 2_000))
    source, rounds = Source(str(directory), path), sizes.of(5, 1)
    opened: list[Reading] = []
    processor: list[float] = []

    async def open_report() -> float:
        while opened:
            opened.pop().close()
        started, worked = time.perf_counter(), time.process_time()
        reading = await source.read()
        opened.append(reading)
        await asyncio.to_thread(_draw, reading, Selection(reading.choices.newest_period))
        processor.append(time.process_time() - worked)
        return time.perf_counter() - started

    def redraw(selection: Selection) -> float:
        started = time.perf_counter()
        _draw(opened[0], selection)
        return time.perf_counter() - started

    async def redraw_everything() -> float:
        return await asyncio.to_thread(redraw, Selection())

    async def redraw_plan() -> float:
        return await asyncio.to_thread(redraw, Selection(plan="starter"))

    async def redraw_user() -> float:
        return await asyncio.to_thread(redraw, Selection(user="user-0007"))

    sides = {
        "opening": open_report,
        "redrawing, everything chosen": redraw_everything,
        "redrawing, one plan of all periods": redraw_plan,
        "redrawing, one user": redraw_user,
    }
    await in_turn(1, *sides.values())
    seconds = await in_turn(rounds, *sides.values())
    opened.pop().close()
    lines = dict(zip(sides, seconds, strict=True))
    if CHROMIUM is None:
        print("chromium is not installed, so the report is not opened in a browser", file=sys.stderr)
    else:
        in_browser = await open_and_choose(
            directory, rounds, ("Plan", "starter") if sizes.is_quick else ("Period", "all")
        )
        lines |= {f"in Chromium, {what}": each for what, each in in_browser.items()}
    shutil.rmtree(directory)
    return [
        Result(
            benchmark="spend_report",
            what=f"{what}, {events:,} events",
            subject=sorted(each)[len(each) // 2],
            reference=None,
            unit="s",
            floor=_LIMIT,
            details={"subject_rounds": each, "processor_s_of_opening": processor},
        )
        for what, each in lines.items()
    ]


def _draw(reading: Reading, selection: Selection) -> None:
    for figure in figures(ask(reading.connection, selection)):
        if figure.chart is not None:
            json.dumps(figure.chart.to_dict())


def _fill(path: Path, calls: int) -> int:
    """Fold `calls` calls into a new file; return the number of their events."""
    store = Store.open(path, "ledger-of-the-report")
    entries = ReportLoad(users=_USERS, mean_hold_nanousd=2_500_000).entries(calls)
    with Rebuild.of(store) as rebuild:
        while page := list(islice(entries, _PAGE)):
            rebuild.fold(Batch(0, page).to_table(), partition=0)
    events = store.position().seq
    store.close()
    return events
