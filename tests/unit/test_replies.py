"""Reading replies: a table of what a provider can answer and what it means for the money."""

import json
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tollbook.inference.attempts import Attempt
from tollbook.inference.providers.replies import read_json, read_reply, retry_after_s
from tollbook.inference.providers.usage_report import read_usage
from tollbook.schemas.money import MAX_NANOUSD, nanousd_from_usd
from tollbook.schemas.usage import Usage

PROMPT, COMPLETION = "the secret prompt", "the secret completion"


def document(**changes: Any) -> dict[str, Any]:
    return {
        "id": "gen-1",
        "model": "openai/gpt-4o-mini-2024-07-18",
        "choices": [{"message": {"role": "assistant", "content": COMPLETION}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15, "cost": 0.0000045},
    } | changes


def read(
    body: Any, status: int = 200, headers: dict[str, str] | None = None, *, is_openrouter: bool = False
) -> Attempt:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return read_reply(
        status, headers or {}, raw, model="asked/model", is_openrouter=is_openrouter, latency_ms=7, now_s=1_000_000.0
    )


def test_completion_with_its_cost() -> None:
    attempt = read(document(), headers={"x-generation-id": "gen-header"})
    assert attempt == Attempt(
        outcome="ok",
        charge="known",
        latency_ms=7,
        content=COMPLETION,
        model_used="openai/gpt-4o-mini-2024-07-18",
        finish_reason="stop",
        http_status=200,
        usage=Usage(prompt_tokens=10, completion_tokens=5),
        reported_cost_nanousd=4_500,
        generation_id="gen-header",
    )


def test_details_of_the_usage_are_read() -> None:
    report = read_usage(
        {
            "prompt_tokens": 100,
            "completion_tokens": 50,
            "prompt_tokens_details": {"cached_tokens": 40, "cache_write_tokens": 10},
            "completion_tokens_details": {"reasoning_tokens": 30},
        }
    )
    assert report.usage == Usage(
        prompt_tokens=100, completion_tokens=50, cached_tokens=40, cache_write_tokens=10, reasoning_tokens=30
    )
    assert report.cost_nanousd is None


@pytest.mark.parametrize(
    ("usage", "charge", "cost", "has_usage", "is_doubted"),
    [
        ('{"prompt_tokens": 1, "completion_tokens": 1, "cost": 0}', "known", 0, True, False),
        ('{"prompt_tokens": 1, "completion_tokens": 1, "cost": 0.0}', "known", 0, True, False),
        ('{"prompt_tokens": 1, "completion_tokens": 1, "cost": null}', "known", None, True, False),
        ('{"prompt_tokens": 1, "completion_tokens": 1}', "known", None, True, False),
        ('{"prompt_tokens": 1, "completion_tokens": 1, "cost": "0.5"}', "known", 500_000_000, True, False),
        ('{"prompt_tokens": 1, "completion_tokens": 1, "cost": 1e-10}', "known", 1, True, False),
        ('{"prompt_tokens": 1, "completion_tokens": 1, "cost": 0.0000000011}', "known", 2, True, False),
        ('{"cost": 0.1}', "known", 100_000_000, False, False),
        ('{"prompt_tokens": 1, "completion_tokens": 1, "cost": -0.1}', "known", None, True, True),
        ('{"prompt_tokens": 1, "completion_tokens": 1, "cost": NaN}', "known", None, True, True),
        ('{"prompt_tokens": 1, "completion_tokens": 1, "cost": Infinity}', "known", None, True, True),
        ('{"prompt_tokens": 1, "completion_tokens": 1, "cost": 1000000.01}', "known", None, True, True),
        ('{"prompt_tokens": 1, "completion_tokens": 1, "cost": 1e999999}', "known", None, True, True),
        ('{"prompt_tokens": 1, "completion_tokens": 1, "cost": true}', "known", None, True, True),
        ('{"prompt_tokens": 1, "completion_tokens": 1, "cost": {}}', "known", None, True, True),
        ('{"cost": -1}', "unknown", None, False, True),
        ("null", "unknown", None, False, False),
        ("[]", "unknown", None, False, False),
        ('{"prompt_tokens": 1}', "unknown", None, False, False),
        ('{"prompt_tokens": 1.5, "completion_tokens": 1}', "unknown", None, False, False),
        ('{"prompt_tokens": true, "completion_tokens": 1}', "unknown", None, False, False),
        ('{"prompt_tokens": -1, "completion_tokens": 1}', "unknown", None, False, False),
        ('{"prompt_tokens": 1, "completion_tokens": 9000000000}', "unknown", None, False, False),
        # A server that counts nothing must not make the completion free; one that says so does.
        ('{"prompt_tokens": 0, "completion_tokens": 0}', "unknown", None, False, True),
        ('{"prompt_tokens": 9, "completion_tokens": 0}', "unknown", None, False, True),
        ('{"prompt_tokens": 0, "completion_tokens": 0, "cost": 0}', "known", 0, True, False),
    ],
)
def test_what_a_reply_tells_of_its_cost(
    usage: str, charge: str, cost: int | None, has_usage: bool, is_doubted: bool
) -> None:
    body = json.dumps(document(usage="USAGE")).replace('"USAGE"', usage).encode()
    attempt = read(body)
    assert attempt.is_ok
    assert (attempt.charge, attempt.reported_cost_nanousd) == (charge, cost)
    assert (attempt.usage is not None, attempt.warning is not None) == (has_usage, is_doubted)


@pytest.mark.parametrize(
    ("usage", "cost", "is_doubted"),
    [
        # With one's own key, the cost is OpenRouter's fee, and the provider bills the rest.
        ({"cost": "0.05", "is_byok": True, "cost_details": {"upstream_inference_cost": 1}}, 1_050_000_000, False),
        ({"cost": "0.05", "is_byok": True, "cost_details": None}, None, True),
        ({"cost": "0.05", "is_byok": True, "cost_details": "?"}, None, True),
        ({"cost": "999999", "is_byok": True, "cost_details": {"upstream_inference_cost": 2}}, None, True),
        ({"cost": "0.05", "is_byok": False, "cost_details": {"upstream_inference_cost": 1}}, 50_000_000, False),
    ],
)
def test_cost_under_ones_own_key_includes_the_providers(
    usage: dict[str, Any], cost: int | None, is_doubted: bool
) -> None:
    report = read_usage({"prompt_tokens": 1, "completion_tokens": 1, **usage})
    assert (report.cost_nanousd, report.warning is not None) == (cost, is_doubted)


def error(code: object, message: str = PROMPT, **metadata: object) -> dict[str, Any]:
    return {"error": {"code": code, "message": message, "metadata": metadata}}


@pytest.mark.parametrize(
    ("status", "body", "charge", "is_retryable", "may_fall_back"),
    [
        (400, error(400), "none", False, True),
        (401, error(401), "none", False, False),
        (402, error(402), "none", False, True),
        (402, error(402, reason="in_flight_budget_exhausted"), "none", True, True),
        (402, error(402, "in_flight_budget_exhausted"), "none", True, True),
        (403, error(403), "none", False, True),
        (404, error(404), "none", False, True),
        (408, error(408), "unknown", True, True),
        (413, error(413), "none", False, True),
        (422, error(422), "none", False, True),
        (429, error(429), "none", True, True),
        (500, error(500), "none", True, True),
        (502, error(502), "none", True, True),
        (503, error(503), "none", True, True),
        (504, error(504), "unknown", True, True),
        (524, error(524), "unknown", True, True),
        (529, error(529), "none", True, True),
        # An intermediary's own page says nothing of what became of the request.
        (502, b"<html>bad gateway</html>", "unknown", True, True),
        (500, b"", "unknown", True, True),
        (520, b"", "unknown", True, True),
        (429, b"slow down", "none", True, True),
        (302, b"", "none", False, True),
        # An error status that carries a charge was charged.
        (502, error(502) | {"usage": {"prompt_tokens": 3, "completion_tokens": 0, "cost": 0.1}}, "known", True, True),
    ],
)
def test_error_status(status: int, body: Any, charge: str, is_retryable: bool, may_fall_back: bool) -> None:
    attempt = read(body, status)
    assert (attempt.outcome, attempt.http_status, attempt.content) == ("http_error", status, None)
    assert (attempt.charge, attempt.is_retryable, attempt.may_fall_back) == (charge, is_retryable, may_fall_back)
    assert attempt.error is not None
    assert attempt.error.startswith(f"HTTP {status}")


FAILED_CHOICE = [{"message": {"content": "half a compl"}, "finish_reason": "error"}]


@pytest.mark.parametrize(
    ("body", "is_openrouter", "charge", "is_retryable"),
    [
        (error(429), False, "none", True),
        (error("503"), False, "none", True),
        (error(400), False, "none", False),
        (error(408), False, "unknown", True),
        (error(524), True, "unknown", True),
        (error(401), True, "none", False),
        (document(choices=FAILED_CHOICE, usage=None), True, "none", True),
        (document(choices=FAILED_CHOICE, usage=None), False, "unknown", True),
        (document(choices=FAILED_CHOICE), True, "known", True),
        (document(**error(502)), True, "known", True),
        ({"error": "something"}, False, "unknown", True),
        ({"choices": [{"error": {"code": 502}, "message": {"content": "x"}}]}, True, "none", True),
    ],
)
def test_error_inside_a_200(body: Any, is_openrouter: bool, charge: str, is_retryable: bool) -> None:
    attempt = read(body, is_openrouter=is_openrouter)
    assert (attempt.outcome, attempt.http_status, attempt.content) == ("provider_error", 200, None)
    assert (attempt.charge, attempt.is_retryable) == (charge, is_retryable)


@pytest.mark.parametrize(
    ("body", "charge"),
    [
        (b"", "unknown"),
        (b"{", "unknown"),
        (b"\xff\xfe", "unknown"),
        (b"[" * 100_000, "unknown"),
        (b'{"usage": ' + b"9" * 10_000 + b"}", "unknown"),
        (b'{"usage": 1e99999999999999999999}', "unknown"),
        (b"[]", "unknown"),
        (b"{}", "unknown"),
        (document(choices=[]), "known"),
        (document(choices=None, usage=None), "unknown"),
        (document(choices=["?"]), "known"),
        (document(choices=[{"message": None, "finish_reason": "stop"}]), "known"),
        (document(choices=[{"message": {"content": None}, "finish_reason": "length"}]), "known"),
        (document(choices=[{"message": {"content": ""}, "finish_reason": None}], usage=None), "unknown"),
        (document(choices=[{"message": {"content": 5}}]), "known"),
    ],
)
def test_reply_without_a_completion(body: Any, charge: str) -> None:
    attempt = read(body)
    assert (attempt.outcome, attempt.charge, attempt.content) == ("invalid_response", charge, None)
    assert (attempt.is_retryable, attempt.may_fall_back) == (True, True)


def test_generation_id_of_the_headers_outlives_the_body() -> None:
    assert read(b"{", headers={"x-generation-id": "gen-9"}).generation_id == "gen-9"


def test_model_that_the_reply_does_not_name_is_the_one_asked_for() -> None:
    assert read(document(model=None)).model_used == "asked/model"


@pytest.mark.parametrize("odd", ["a b", "x" * 201, "line\nbreak", 5, None, ""])
def test_names_that_are_none_are_left_out(odd: object) -> None:
    attempt = read(document(id=odd, choices=[{"message": {"content": "x"}, "finish_reason": odd}]))
    assert (attempt.generation_id, attempt.finish_reason) == (None, None)


def test_text_that_has_no_utf8_is_made_storable() -> None:
    body = b'{"choices": [{"message": {"content": "a\\ud800b \\ud83d\\ude00"}}]}'
    assert read(body).content == "a\ufffdb \U0001f600"


@pytest.mark.parametrize("status", [200, 400, 403, 502])
@pytest.mark.parametrize(
    "body",
    [
        error(403, f"flagged: {PROMPT}", flagged_input=PROMPT, reasons=[PROMPT], error_type=PROMPT, reason=PROMPT),
        {"error": {"code": PROMPT, "type": PROMPT, "message": PROMPT}},
        {"error": PROMPT},
        document(choices=FAILED_CHOICE, error={"message": COMPLETION}),
    ],
)
def test_no_text_of_the_provider_is_passed_on(status: int, body: Any) -> None:
    attempt = read(body, status)
    assert attempt.error
    assert "secret" not in attempt.error


def test_machine_words_of_an_error_are_kept() -> None:
    attempt = read(error(429, error_type="rate_limit_exceeded", reason="upstream"), 429)
    assert attempt.error == "HTTP 429 rate_limit_exceeded upstream"


def test_repr_shows_no_completion() -> None:
    assert "secret" not in repr(read(document()))


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": " 0.5 "}, 0.5),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": "1e30"}, 86_400.0),
        ({"retry-after": "inf"}, 86_400.0),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": ""}, None),
        ({"retry-after": "Mon, 12 Jan 1970 13:46:50 GMT"}, 10.0),
        ({"retry-after": "Mon, 12 Jan 1970 13:46:30 GMT"}, 0.0),
        (
            {"retry-after": "Tue, 24 Nov 2026 02:00:30 GMT", "date": "Tue, 24 Nov 2026 02:00:00 GMT"},
            30.0,
        ),
        ({"retry-after": "Tue, 24 Nov 2026 02:00:30 GMT", "date": "yesterday"}, None),
    ],
)
def test_retry_after_is_seconds_or_a_date(headers: dict[str, str], expected: float | None) -> None:
    assert retry_after_s(headers, 1_000_000.0) == expected


@pytest.mark.parametrize("status", [402, 429, 503])
def test_pause_that_is_asked_for_is_told(status: int) -> None:
    assert read(error(status), status, {"retry-after": "9"}).retry_after_s == 9.0


@given(st.decimals(min_value=0, max_value=1_000_000, allow_nan=False, places=12))
def test_cost_is_exact_to_the_nano_dollar_rounded_up(usd: Decimal) -> None:
    body = f'{{"prompt_tokens": 1, "completion_tokens": 1, "cost": {usd:f}}}'
    cost = read_usage(read_json(body.encode())).cost_nanousd
    assert cost is not None
    assert cost == nanousd_from_usd(usd)
    assert 0 <= Decimal(cost) - usd * 10**9 < 1


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(
        st.sampled_from(
            ["usage", "cost", "choices", "message", "content", "error", "code", "metadata", "prompt_tokens", "id",
             "completion_tokens", "prompt_tokens_details", "cached_tokens", "finish_reason", "is_byok", "cost_details"]
        ),
        inner,
        max_size=6,
    ),
    max_leaves=25,
)  # fmt: skip


@given(body=json_values, status=st.sampled_from([200, 201, 302, 400, 402, 429, 500, 503]))
def test_no_json_breaks_the_reader(body: Any, status: int) -> None:
    attempt = read(body, status)
    assert attempt.charge in {"none", "known", "unknown"}
    assert attempt.is_ok == (attempt.content is not None)
    assert attempt.reported_cost_nanousd is None or 0 <= attempt.reported_cost_nanousd <= MAX_NANOUSD
    if attempt.charge == "known":
        assert attempt.usage is not None or attempt.reported_cost_nanousd is not None
    if attempt.usage is not None:
        Usage.model_validate(attempt.usage.model_dump())


@given(st.binary(max_size=200))
def test_no_bytes_break_the_reader(body: bytes) -> None:
    assert read(body).outcome in {"ok", "invalid_response", "provider_error"}
