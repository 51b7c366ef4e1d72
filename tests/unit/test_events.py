"""Event payloads: a numeric boundary, and what each may say. Stored events are in test_golden_events.py."""

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from tollbook.schemas.events import BudgetReserved, CostRecorded, EventPayload, ModelCalled, payload_json
from tollbook.schemas.money import MAX_NANOUSD
from tollbook.schemas.usage import Usage

BOUND = {
    "model": "m", "prompt_tokens": 1, "completion_tokens": 2, "prompt_nanousd_per_mtok": 3,
    "completion_nanousd_per_mtok": 4,
}  # fmt: skip
CALLED: dict[str, Any] = {
    "model": "m", "outcome": "ok", "latency_ms": 5, "charge_nanousd": 7, "charge_basis": "reported",
}  # fmt: skip
RECORDED: dict[str, Any] = {"basis": "reported", "outcome": "done"}
ADJUSTED: dict[str, Any] = {"basis": "reported", "reason": "r", "author": "a"}
RESERVED: dict[str, Any] = {"task_type": "score_post", "plan": "trial", "worker": "w", "bound": BOUND}
DOCUMENTS = {
    "model-called": CALLED, "cost-recorded": RECORDED, "cost-adjusted": ADJUSTED, "budget-reserved": RESERVED,
}  # fmt: skip


def parse_payload(kind: str, document: dict[str, Any]) -> EventPayload:
    return TypeAdapter[EventPayload](EventPayload).validate_python({**document, "type": kind})


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_a_payload_comes_back_from_its_json(kind: str) -> None:
    payload = parse_payload(kind, DOCUMENTS[kind])
    assert payload.type == kind
    assert type(payload).model_validate_json(payload_json(payload)) == payload


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("model-called", "charge_nanousd"),
        ("model-called", "latency_ms"),
        ("cost-recorded", "hold_nanousd"),
        ("cost-recorded", "assumed_nanousd"),
        ("cost-recorded", "overage_nanousd"),
        ("budget-reserved", "cap_nanousd"),
        ("budget-reserved", "hold"),
    ],
)
@pytest.mark.parametrize("value", [-1, 1.0, "1", True, float("nan"), 10**19])
def test_amounts_and_counts_are_bounded_integers(kind: str, name: str, value: Any) -> None:
    if value == 10**19 and name in ("latency_ms", "hold"):
        value = -(10**19)  # Counts have no upper bound.
    with pytest.raises(ValidationError):
        parse_payload(kind, {**DOCUMENTS[kind], name: value})


@pytest.mark.parametrize("value", [0, MAX_NANOUSD])
def test_the_bounds_themselves_are_amounts(value: int) -> None:
    payload = parse_payload("model-called", {**CALLED, "charge_nanousd": value})
    assert isinstance(payload, ModelCalled)
    assert payload.charge_nanousd == value


def test_a_corrected_assumption_may_go_down() -> None:
    assert payload_json(parse_payload("cost-adjusted", {**ADJUSTED, "assumed_nanousd": -7})).endswith(
        '"assumed_nanousd":-7}'
    )


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("model-called", {"outcome": "lost"}),
        ("model-called", {"charge_basis": "guessed"}),
        ("cost-recorded", {"outcome": "forgotten"}),
        ("cost-recorded", {"basis": ""}),
        ("budget-reserved", {"kind": "loan"}),
        ("budget-reserved", {"bound": None}),
        ("no-such-type", {}),
    ],
)
def test_words_outside_the_lists_are_refused(kind: str, change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        parse_payload(kind, {**DOCUMENTS.get(kind, {}), **change})


def test_the_type_of_the_entry_goes_before_one_in_the_payload() -> None:
    assert isinstance(parse_payload("cost-recorded", {**RECORDED, "type": "budget-reserved"}), CostRecorded)


def test_events_cannot_be_changed() -> None:
    """G7."""
    payload = BudgetReserved.model_validate(RESERVED)
    with pytest.raises(ValidationError, match="frozen"):
        payload.hold = 2


@pytest.mark.parametrize("value", [-1, 1.0, "1", True, 1_000_000_001])
def test_usage_is_counts_only(value: Any) -> None:
    with pytest.raises(ValidationError):
        Usage(prompt_tokens=value)


def test_cached_and_reasoning_tokens_are_parts_not_additions() -> None:
    usage = Usage(prompt_tokens=10, completion_tokens=4, cached_tokens=8, cache_write_tokens=1, reasoning_tokens=3)
    assert usage.total_tokens == 10 + 4
