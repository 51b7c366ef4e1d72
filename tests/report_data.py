"""Small ledgers for the tests of the report: a data directory at rest, an archive alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.report_load import ReportLoad
from tollbook.ledger.archive import chain
from tollbook.ledger.archive.segments import Archive
from tollbook.ledger.projection.store import Store
from tollbook.ledger.stream import Batch

LEDGER: Final = "ledger-of-the-report"
# A user id may hold whatever is printable but spaces, quotes and backslashes.
HOSTILE: Final = "</script><script>alert(1)</script><img/src=x/onerror=alert(2)>"


def load(calls: int = 3_000, *, users: int = 200) -> list[list[Any]]:
    """Two months of calls, with some at their caps."""
    return list(ReportLoad(users=users, mean_hold_nanousd=300_000_000).entries(calls))


def renamed(entries: Sequence[list[Any]], names: dict[str, str]) -> list[list[Any]]:
    """Replace names wherever they stand; for names as an attacker would choose them."""

    def replace(part: bytes) -> bytes:
        for old, new in names.items():
            part = part.replace(old.encode(), new.encode())
        return part

    return [[entry_id, [replace(part) for part in row]] for entry_id, row in entries]


def make_data_dir(path: Path, entries: Sequence[list[Any]]) -> Path:
    store = Store.open(path / "tollbook.duckdb", LEDGER)
    if entries:
        store.fold(Batch(0, list(entries)))
    store.close()
    return path


def make_archive(path: Path, entries: Sequence[list[Any]], *, segment: int = 2_000) -> Path:
    archive, head = Archive(path), chain.genesis(LEDGER, 0)
    for start in range(0, len(entries), segment):
        events = Batch(0, list(entries[start : start + segment])).to_table(is_upcast=False)
        sealed = archive.write(events, ledger_id=LEDGER, partition=0, head=head)
        head = bytes.fromhex(sealed.manifest.chain_after)
    return path
