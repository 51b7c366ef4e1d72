"""The columns *enforced at* and *audited at* in docs/guarantees.md, from the marks in the code.

A line of code that enforces a guarantee ends with its number in a comment (`# G1`, `-- G1 G9`); one that checks it
afterwards with `audits G1`.
"""

import re
from functools import cache
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
PAGE: Final = ROOT / "docs" / "guarantees.md"
ROOMS: Final = (
    "app",
    "audit",
    "cli",
    "consumers",
    "gateway",
    "inference",
    "ledger",
    "observability",
    "schemas",
    "views",
)
MARK: Final = re.compile(r"(?:--|#) (audits )?((?:G\d+ )*G\d+)$")
_ROW: Final = re.compile(r"^\| (G\d+) \|.*$", re.MULTILINE)
_ENFORCED, _AUDITED = 3, 4


def documents() -> dict[Path, str]:
    """Return the page with the files in which each guarantee is marked."""
    return {PAGE: _ROW.sub(_row, PAGE.read_text(encoding="utf-8"))}


@cache
def code_lines() -> tuple[tuple[str, int, str], ...]:
    """Return file, number and text of every line of the project's code that may have a mark."""
    return tuple(
        (str(path.relative_to(ROOT)), number, line)
        for room in ROOMS
        for path in sorted((ROOT / room).rglob("*"))
        if path.suffix in (".py", ".lua", ".sql")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if "G" in line
    )


def marked_files(guarantee: str, *, audited: bool) -> list[str]:
    """Return the files in which a guarantee is enforced, or audited."""
    found: dict[str, None] = {}
    for file, _, line in code_lines():
        mark = MARK.search(line)
        if mark is not None and bool(mark[1]) == audited and guarantee in mark[2].split():
            found[file] = None
    return list(found)


def _row(match: re.Match[str]) -> str:
    cells = match[0].split(" | ")
    guarantee = match[1]
    cells[_ENFORCED] = _files(marked_files(guarantee, audited=False))
    cells[_AUDITED] = _files(marked_files(guarantee, audited=True))
    return " | ".join(cells)


def _files(files: list[str]) -> str:
    return ", ".join(f"`{file}`" for file in files) or "no event shows it: see the tests"
