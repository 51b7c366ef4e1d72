"""Tables for people at every width: ids and amounts are never cut, words never broken."""

import io
from collections.abc import Sequence
from decimal import Decimal
from typing import Final
from uuid import UUID

import pytest
from rich.cells import cell_len

from tollbook.views.tables import Column, Printer, Row, dollars, percent_used, printable, wrap

IDS: Final = tuple(str(UUID(int=number * 7**40)) for number in range(1, 4))
COLUMNS: Final = ("user", "plan?", "spent>", "cap>", "calls>?", "fallbacks>?")
ROWS: Final = tuple((user, "growth", f"${1_234.5678:,.4f}", "$5,000.00", "12,345", "7") for user in IDS)


def shown(columns: Sequence[str | Column], rows: Sequence[Row | Sequence[str]], width: int | None) -> list[str]:
    file = io.StringIO()
    Printer(file, width=width).table(columns, rows, "A title")
    return file.getvalue().splitlines()


def test_a_table_that_fits_has_a_line_for_each_row() -> None:
    assert shown(("user", "spent>"), [("u1", "$1.00"), ("u22", "$12.00")], 80) == [
        "",
        " A title",
        " user   spent",
        " ────────────",
        " u1     $1.00",
        " u22   $12.00",
    ]


def test_ids_have_a_line_of_their_own_where_the_rest_does_not_fit_beside_them() -> None:
    lines = shown(COLUMNS, ROWS[:1], 60)
    assert (lines[2], lines[3].split()) == (" user", ["plan", "spent", "cap", "calls", "fallbacks"])
    assert lines[-2:] == [f" {IDS[0]}", "   growth  $1,234.5678  $5,000.00  12,345          7"]


def test_optional_columns_are_left_out_with_a_note() -> None:
    lines = shown(COLUMNS, ROWS, 40)
    assert f" {IDS[0]}" in lines
    assert "   growth  $1,234.5678  $5,000.00" in lines
    said = "No room for: calls, fallbacks. A wider terminal or --json shows them."
    assert " ".join(lines[-2:]).split() == said.split()


@pytest.mark.parametrize("width", [1, 5, 12, 20, 30, 40, 59, 60, 79, 80, 140])
def test_at_every_width_no_line_is_too_wide_and_nothing_is_cut(width: int) -> None:
    details = [f"{IDS[0]}: timed out after 30 seconds, the provider was asked again"]
    rows = [Row(row, details, "bold", has_rule=True) for row in ROWS]
    lines = shown(COLUMNS, rows, width)
    # In a very narrow table, the column's name is beside each value.
    assert max(map(cell_len, lines)) <= max(width, 14)
    assert [line for line in lines if line != line.rstrip()] == []
    text = "".join("".join(lines).split())
    for part in (*IDS, "$1,234.5678", "$5,000.00", "theproviderwasaskedagain"):
        assert part in text
    assert "…" not in text


def test_without_a_terminal_nothing_limits_a_table() -> None:
    note = "word " * 400
    line = shown(("user", "note*"), [(IDS[0], note)], None)[-1]
    assert line == f" {IDS[0]}  {note.rstrip()}"


def test_sentences_are_broken_between_words_in_the_room_that_is_left() -> None:
    note = "settled at 12:00\nby a worker that went on"
    assert shown(("call", "amount>", "note*"), [("c1", "$0.10", note)], 36)[4:] == [
        " c1     $0.10  settled at 12:00",
        "               by a worker that went",
        "               on",
    ]


def test_wide_characters_count_as_they_are_shown() -> None:
    assert shown(("user", "n>"), [("東京", "1"), ("abcd", "2")], 40)[4:] == [" 東京  1", " abcd  2"]
    assert wrap("東京東京 東京", 8) == ["東京東京", "東京"]
    assert wrap("abc def-ghi", 8) == ["abc", "def-ghi"]
    assert wrap("abcdefghij k", 4) == ["abcd", "efgh", "ij k"]


def test_text_of_others_cannot_control_the_terminal() -> None:
    assert printable("\x1b[2Jred\n") == "\\x1b[2Jred\\x0a"
    assert printable("東京 ok") == "東京 ok"


@pytest.mark.parametrize(
    ("spent", "cap", "places", "text"),
    [
        ("4.99", "5", 0, "99%"),
        ("4.999999999", "5", 1, "99.9%"),
        ("5", "5", 0, "100%"),
        ("5.000000001", "5", 0, "101%"),
        ("5.000000001", "5", 1, "100.1%"),
        ("0", "5", 0, "0%"),
        ("1", "0", 0, "-"),
        ("100", "5", 0, "2,000%"),
    ],
)
def test_a_cap_is_used_up_only_where_all_of_it_is_spent(spent: str, cap: str, places: int, text: str) -> None:
    assert percent_used(Decimal(spent), Decimal(cap), places=places) == text


def test_dollars_are_rounded_up_or_exact() -> None:
    assert dollars(Decimal("1234.000000001"), 2) == "$1,234.01"
    assert dollars(Decimal("-0.5"), 2) == "-$0.50"
    assert dollars(Decimal("0E-9"), None) == "$0.00"
    assert dollars(Decimal("1.234000001"), None) == "$1.234000001"
