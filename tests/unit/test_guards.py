"""Marks of guarantees: `G1` in a comment at the end of a line that enforces one, `audits G1` where one is checked."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]
_MARK: Final = re.compile(r"(?:--|#) (audits )?((?:G\d+ )*G\d+)$")
_LOOKS_LIKE_ONE: Final = re.compile(r"(?:--|#) (?:audits )?G\d+\b")


def lines() -> Iterator[tuple[str, str]]:
    """Yield place and text of every line of the ledger's and the audit's code."""
    for room in ("ledger", "audit"):
        for path in sorted((ROOT / room).rglob("*")):
            if path.suffix in (".py", ".lua", ".sql"):
                for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
                    yield f"{path.relative_to(ROOT)}:{number}", line


def marks(kind: str) -> dict[str, list[str]]:
    """Return the places of every guarantee's marks: of those that enforce it, or of those that audit it."""
    found: dict[str, list[str]] = {}
    for place, line in lines():
        mark = _MARK.search(line)
        if mark is not None and ("audited" if mark[1] else "enforced") == kind:
            for guarantee in mark[2].split():
                found.setdefault(guarantee, []).append(place)
    return found


@pytest.mark.parametrize("guarantee", [f"G{number}" for number in range(1, 11)])
def test_every_guarantee_is_enforced_at_a_marked_line(guarantee: str) -> None:
    assert marks("enforced").get(guarantee)


@pytest.mark.parametrize("guarantee", ["G1", "G2", "G3", "G4", "G5", "G6", "G7", "G9"])
def test_every_guarantee_that_events_can_prove_is_audited_at_a_marked_line(guarantee: str) -> None:
    assert marks("audited").get(guarantee)


def test_a_mark_stands_at_the_end_of_its_line_beside_code() -> None:
    wrong = [
        place
        for place, line in lines()
        if _LOOKS_LIKE_ONE.search(line) and (not (mark := _MARK.search(line)) or not line[: mark.start()].strip())
    ]
    assert wrong == []
