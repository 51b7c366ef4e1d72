"""The spend report in a browser: the time from its address to the last chart, and from a choice to the last redraw.

`tollbook report` runs in a separate process, as for its users; the browser is Debian's headless Chromium, which renders
in software. Each opening has a new process and a new browser profile, so nothing is cached.
"""

import asyncio
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from playwright.async_api import Browser, Page, async_playwright

CHROMIUM: Final = shutil.which("chromium") or shutil.which("chromium-browser")
_FLAGS: Final = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
_FIGURES: Final = ("spend", "cap_use", "cap_classes", "models", "latency", "campaigns", "fallbacks", "denials")
# Marks the charts; a chart that is drawn again has no mark.
_MARK: Final = "elements => elements.forEach(element => element.dataset.seen = '1')"
_TIMEOUT_MS: Final = 60_000


async def open_and_choose(data_dir: Path, rounds: int, choice: tuple[str, str]) -> dict[str, list[float]]:
    """Open the report `rounds` times and choose (label, value); return the seconds of each opening and redrawing.

    The choice must change every chart.
    """
    redrawing = f"redrawing, {choice[0].lower()} {choice[1]}"
    seconds: dict[str, list[float]] = {"opening": [], redrawing: []}
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=list(_FLAGS))
        for _ in range(rounds):
            async with _report(data_dir) as url:
                opened, chosen = await _visit(browser, url, choice)
            seconds["opening"].append(opened)
            seconds[redrawing].append(chosen)
        await browser.close()
    return seconds


async def _visit(browser: Browser, url: str, choice: tuple[str, str]) -> tuple[float, float]:
    context = await browser.new_context(viewport={"width": 1280, "height": 900})
    page = await context.new_page()
    page.set_default_timeout(_TIMEOUT_MS)
    started = time.perf_counter()
    await page.goto(url)
    await _drawn(page)
    opened = time.perf_counter() - started
    await page.locator(":is(canvas, svg.marks)").evaluate_all(_MARK)
    started = time.perf_counter()
    await page.get_by_label(choice[0]).select_option(label=choice[1])
    await _drawn(page)
    chosen = time.perf_counter() - started
    await context.close()
    return opened, chosen


async def _drawn(page: Page) -> None:
    for name in _FIGURES:
        await page.locator(f"#figure-{name} :is(canvas, svg.marks, .empty):not([data-seen])").first.wait_for()


@asynccontextmanager
async def _report(data_dir: Path) -> AsyncGenerator[str]:
    """Run `tollbook report` and yield its address."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("TOLLBOOK_", "OPENROUTER_"))}
    process = await asyncio.create_subprocess_exec(
        *(Path(sys.executable).with_name("tollbook"), "report", "--no-browser"),
        env={**clean, "TOLLBOOK_DATA_DIR": str(data_dir)},
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        line = (await process.stdout.readline()).decode()
        found = re.search(r"http://\S+", line)
        if found is None:
            raise RuntimeError(f"`tollbook report` did not start: {line}")
        yield found[0]
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGINT)
        await process.wait()
