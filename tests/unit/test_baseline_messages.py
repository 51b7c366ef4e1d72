"""Requests for baselines and answers, as text and back: exact, bounded, and anything else is refused."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tollbook.ledger.errors import BaselineUnavailable, LedgerError, LedgerRefused, LedgerReplaced
from tollbook.ledger.gate.baseline_messages import (
    MAX_ANSWER_BYTES,
    MAX_REQUEST_BYTES,
    BaselineRequest,
    MessageMalformed,
    answer_text,
    read_answer,
    read_request,
    request_text,
)
from tollbook.ledger.gate.baselines import MAX_PAGE_NAMES, BaselinePage
from tollbook.ledger.gate.requests import Position
from tollbook.schemas.identifiers import EntryId

NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=50)
AMOUNTS = st.integers(-(2**70), 2**70)
REQUEST = BaselineRequest("host-1", 3, ("user:u:2026-11", "other"))
PAGE = BaselinePage({1: Position(EntryId(7, 1), 9)}, {"user:u:2026-11": (1, 2)})


@given(st.lists(NAMES, max_size=20), st.integers(0, 2**70))
def test_a_request_is_read_as_it_was_made(names: list[str], number: int) -> None:
    request = BaselineRequest("host-17-a1b2c3", number, tuple(names))
    assert read_request(request_text(request).encode()) == request


@given(st.dictionaries(NAMES, st.tuples(AMOUNTS, AMOUNTS)), st.sets(NAMES), st.integers(0, 2**70))
def test_an_answer_has_every_nanodollar(balances: dict[str, tuple[int, int]], changed: set[str], seq: int) -> None:
    names = tuple({*balances, *changed, "of nobody"})
    known = {name: amounts for name, amounts in balances.items() if name not in changed}
    page = BaselinePage({4: Position(EntryId(seq, 2), seq)} if seq < 2**60 else {}, known, frozenset(changed))
    text = answer_text(BaselineRequest("a", 7, names), ledger_id="l", partition=4, found=page)
    answer = read_answer(text.encode())
    assert (answer.number, answer.ledger_id) == (7, "l")
    assert answer.page(names, partition=4) == BaselinePage(
        {4: page.positions.get(4, Position())}, known, frozenset(changed)
    )


def test_an_answer_has_what_was_asked_for_and_no_more() -> None:
    found = BaselinePage({0: Position(), **PAGE.positions}, {**PAGE.balances, "of another asker": (5, 6)})
    text = answer_text(REQUEST, ledger_id="l", partition=1, found=found)
    assert read_answer(text.encode()).page(REQUEST.names, partition=1) == PAGE
    assert "of another asker" not in text


@pytest.mark.parametrize(
    ("problem", "kind"),
    [
        (BaselineUnavailable("it is being reopened"), BaselineUnavailable),
        (LedgerReplaced(expected="a", found="b"), LedgerRefused),
        (LedgerRefused("x" * 10_000), LedgerRefused),
    ],
)
def test_an_error_comes_as_that_error(problem: LedgerError, kind: type[LedgerError]) -> None:
    text = answer_text(REQUEST, ledger_id="l", partition=1, found=problem)
    with pytest.raises(LedgerError) as refused:
        read_answer(text.encode()).page(REQUEST.names, partition=1)
    assert type(refused.value) is kind
    assert str(refused.value) == str(problem)[:1_000]


def test_the_largest_messages_are_within_their_limits() -> None:
    crab = "\U0001f980"
    names = tuple(f"user:{crab * 90}{number:03}:2026-11" for number in range(MAX_PAGE_NAMES))
    request = BaselineRequest("a" * 100, 2**70, names)
    assert len(request_text(request).encode()) < MAX_REQUEST_BYTES
    page = BaselinePage({0: Position(EntryId(2**63, 2**63), 2**63)}, dict.fromkeys(names, (-(2**63), -(2**63))))
    text = answer_text(request, ledger_id="l" * 36, partition=0, found=page)
    assert len(text.encode()) < MAX_ANSWER_BYTES
    assert read_answer(text.encode()).page(names, partition=0) == page


GOOD = json.loads(answer_text(REQUEST, ledger_id="l", partition=1, found=PAGE))


@pytest.mark.parametrize(
    "change",
    [
        {"position": None}, {"position": ["7-1", 9.0]}, {"position": ["7-1", True]}, {"position": ["-7-1", 9]},
        {"balances": None}, {"balances": [[1, 2]]}, {"balances": [[1, 2], [1]]}, {"balances": [[1, 2], ["1", 2]]},
        {"balances": [[True, 2], None]}, {"balances": [[1.0, 2], None]}, {"balances": [[1, 2], True]},
        {"balances": [[1, 2], 0]},
    ],
)  # fmt: skip
def test_a_malformed_answer_is_refused(change: Mapping[str, Any]) -> None:
    with pytest.raises(MessageMalformed):
        read_answer(json.dumps({**GOOD, **change}).encode()).page(REQUEST.names, partition=1)


@pytest.mark.parametrize("change", [{"v": 2}, {"number": "3"}, {"number": None}, {"ledger": 7}, {"ledger": None}])
def test_an_answer_without_request_or_ledger_is_refused(change: Mapping[str, Any]) -> None:
    with pytest.raises(MessageMalformed):
        read_answer(json.dumps({**GOOD, **change}).encode())
