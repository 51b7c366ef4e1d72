"""The table of outcomes: each of its rows is a scenario that is played against the whole system.

`tests/integration/test_outcomes.py` plays every scenario; here the table is compared with them.
"""

import re
from typing import Any

import pytest

from docs.generate.outcomes import PAGE, attempt_of
from tollbook.cli.publish import print_result
from tollbook.cli.stand_in import stand_in
from tollbook.inference.providers.provider_errors import read_error
from tollbook.schemas.events import Event, ModelCalled, payload_json
from tollbook.schemas.failures import FAILURES, ErrorDetails
from tollbook.schemas.results import ErrorCode, InferenceResult, TaskStatus
from tollbook.schemas.routes import Route
from tollbook.schemas.usage import Usage
from tollbook.standin import FAULTS, SCENARIOS
from tollbook.views.audit.texts import event_text


def test_every_scenario_has_a_row() -> None:
    rows = re.findall(r"^\| `(\w+)` \| .* \| `\w+` \| ", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == [name for group in ("outcome", "form", "usage", "error") for name in SCENARIOS
                    if SCENARIOS[name].group == group]  # fmt: skip


@pytest.mark.parametrize("name", SCENARIOS)
def test_row_agrees_with_the_reader(name: str) -> None:
    scenario, attempt = SCENARIOS[name], attempt_of(name)
    assert scenario.is_asked_again == attempt.is_retryable or name == "proxy_page"
    assert attempt.reason is None or attempt.reason in FAILURES
    if attempt.is_ok:
        assert scenario.result == (attempt.error_code or "done")
    assert scenario.result == "done" or scenario.result in ErrorCode.__members__


def test_no_scenario_has_the_name_of_a_fault() -> None:
    assert not SCENARIOS.keys() & FAULTS.keys()


def test_help_of_the_stand_in_names_every_scenario() -> None:
    option = stand_in.__annotations__["scenario"].__metadata__[0]
    assert all(name in option.help for name in SCENARIOS)


def test_every_reason_of_an_error_is_a_known_failure() -> None:
    for status in range(400, 600):
        assert read_error({"code": status}, status).reason in FAILURES


def test_audit_shows_reason_words_and_doubt() -> None:
    payload = ModelCalled(
        model="m",
        outcome="http_error",
        http_status=402,
        error="HTTP 402 openrouter_credits",
        latency_ms=7,
        usage=Usage(prompt_tokens=10, completion_tokens=5, cache_write_tokens=4, cache_write_1h_tokens=2),
        charge_nanousd=1,
        charge_basis="priced",
        reason="out_of_credit",
        error_details=ErrorDetails(code="402", limit_source="openrouter_credits"),
        usage_doubt="only the total number of tokens is reported",
    )
    event = Event(
        id="1-0", v=2, seq=1, user_id="u", period="2026-11", call_id="c", attempt=1, amount=0, committed=None,
        payload=payload,
    )  # fmt: skip
    headline, details = event_text(event)
    text = "; ".join(details)
    assert headline == "attempt 1 refused by the provider (HTTP 402)"
    assert "code 402, limit source openrouter_credits" in text
    assert "reason out_of_credit" in text
    assert "the more expensive reading is charged: only the total number of tokens is reported" in text
    assert "2 of them for an hour" in text
    paid = event.model_copy(update={"payload": payload.model_copy(update={"outcome": "ok", "reason": "output_limit"})})
    assert event_text(paid)[0] == "attempt 1 was paid for, but has no answer"


def test_empty_new_fields_of_an_event_are_left_out() -> None:
    plain = ModelCalled(model="m", outcome="ok", latency_ms=7, charge_nanousd=1, charge_basis="reported")
    assert payload_json(plain) == (
        '{"model":"m","outcome":"ok","latency_ms":7,"charge_nanousd":1,"charge_basis":"reported"}'
    )


def test_result_is_printed_with_what_the_model_did(capsys: pytest.CaptureFixture[str]) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "look_up", "arguments": '{"id": 7}'}}
    print_result(
        InferenceResult(
            task_id="t1", status=TaskStatus.DONE, finish_reason="tool_calls", tool_calls=[call], refusal="I cannot."
        )
    )
    shown = capsys.readouterr().out
    assert 'look_up({"id": 7})' in shown
    assert "I cannot." in shown
    assert "tool_calls" in shown


def test_route_tries_again_only_with_a_larger_limit() -> None:
    fields: dict[str, Any] = {"model": "m", "fallback": None, "max_tokens": 100, "temperature": 0}
    assert Route(**fields, retry_max_tokens=101).retry_max_tokens == 101
    with pytest.raises(ValueError, match="retry_max_tokens must be above max_tokens, which is 100, got 100"):
        Route(**fields, retry_max_tokens=100)
