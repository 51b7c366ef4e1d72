"""Small ledgers for the tests of the report: a data directory at rest, an archive alone; and Chromium to look at it."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.report_load import ReportLoad
from ledger import chain
from ledger.segments import Archive
from ledger.store import Store
from ledger.stream import Batch

LEDGER: Final = "ledger-of-the-report"
CHROMIUM: Final = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS: Final = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


def load(calls: int = 3_000, *, users: int = 200) -> list[list[Any]]:
    """Two months of calls, with some at their caps."""
    return list(ReportLoad(users=users, mean_hold_nanousd=300_000_000).entries(calls))


def make_data_dir(path: Path, entries: Sequence[list[Any]]) -> Path:
    store = Store.open(path / "tollbook.duckdb", LEDGER)
    if entries:
        store.fold(Batch(0, list(entries)))
    store.close()
    return path


def make_archive(path: Path, entries: Sequence[list[Any]], *, segment: int = 2_000) -> Path:
    archive, head = Archive(path), chain.genesis(LEDGER, 0)
    for start in range(0, len(entries), segment):
        events = Batch(0, list(entries[start : start + segment])).to_table(is_lifted=False)
        sealed = archive.write(events, ledger_id=LEDGER, partition=0, head=head)
        head = bytes.fromhex(sealed.manifest.chain_after)
    return path


def describe_chromium() -> str:
    """One line for pytest's header and summary."""
    if CHROMIUM:
        return f"chromium: {CHROMIUM}"
    what = "the report's tests in a browser FAIL" if is_ci() else "the report's tests in a browser are SKIPPED"
    return f"chromium: not found, so {what} (Debian: apt-get install chromium)"


def is_ci() -> bool:
    return os.environ.get("CI", "").lower() == "true"
