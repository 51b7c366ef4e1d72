"""Marks of guarantees in the code, and the table of guarantees that names their files."""

import re
from typing import Final

import pytest

from docs.generate import guarantees

_LOOKS_LIKE_ONE: Final = re.compile(r"(?:--|#) (?:audits )?G\d+\b")


@pytest.mark.parametrize("guarantee", [f"G{number}" for number in range(1, 12)])
def test_every_guarantee_is_enforced_at_a_marked_line(guarantee: str) -> None:
    assert guarantees.marked_files(guarantee, audited=False)


@pytest.mark.parametrize("guarantee", ["G1", "G2", "G3", "G4", "G5", "G6", "G7", "G9"])
def test_every_guarantee_that_events_can_prove_is_audited_at_a_marked_line(guarantee: str) -> None:
    assert guarantees.marked_files(guarantee, audited=True)


def test_a_mark_stands_at_the_end_of_its_line_beside_code() -> None:
    wrong = [
        f"{file}:{number}"
        for file, number, line in guarantees.code_lines()
        if _LOOKS_LIKE_ONE.search(line)
        and (not (mark := guarantees.MARK.search(line)) or not line[: mark.start()].strip())
    ]
    assert wrong == []


def test_the_table_names_the_files_that_are_marked() -> None:
    """`python -m docs.generate` writes the two columns."""
    page = guarantees.PAGE.read_text(encoding="utf-8")
    assert guarantees.documents() == {guarantees.PAGE: page}
    rows = re.findall(r"^\| (G\d+) \|", page, re.MULTILINE)
    assert rows == [f"G{number}" for number in range(1, 12)]
