"""Reading replies: a table of what a provider can answer and what it means for the money."""

import gzip
import json
import time
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.quick import first_quick
from tests.replies import NO_LIMIT, chat_request, reply_of
from tollbook.inference.attempts import Attempt
from tollbook.inference.providers.bodies import Body, read_json
from tollbook.inference.providers.dialects import ADAPTERS
from tollbook.inference.providers.replies import name_in, read_reply, retry_after_s
from tollbook.inference.providers.usage_report import read_usage
from tollbook.schemas.failures import FAILURES, ErrorDetails
from tollbook.schemas.money import MAX_NANOUSD, nanousd_from_usd
from tollbook.schemas.results import ErrorCode
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
    body: Any, status: int = 200, headers: dict[str, str] | None = None, max_tokens: int = NO_LIMIT, **options: Any
) -> Attempt:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    options = {"is_insured": False, "request_id": name_in(headers or {}, "x-generation-id"), **options}
    reply = reply_of(raw, status, headers, latency_ms=7, now_s=1_000_000.0)
    return read_reply(reply, chat_request("asked/model", max_tokens), **options)


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
def test_the_cost_of_a_reply_is_read(
    usage: str, charge: str, cost: int | None, has_usage: bool, is_doubted: bool
) -> None:
    body = json.dumps(document(usage="USAGE")).replace('"USAGE"', usage).encode()
    attempt = read(body)
    assert attempt.is_ok
    assert (attempt.charge, attempt.reported_cost_nanousd) == (charge, cost)
    assert (attempt.usage is not None, attempt.usage_doubt is not None) == (has_usage, is_doubted)


COUNTED = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
MORE = {"promptTokenCount": 10, "candidatesTokenCount": 5, "thoughtsTokenCount": 90, "totalTokenCount": 105}
NO_TOKENS = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
ANSWERED = {"message": {"content": "a"}, "finish_reason": "stop"}


@pytest.mark.parametrize(
    ("changes", "tokens", "cost", "is_doubted"),
    [
        ({"usage": [COUNTED]}, {15}, None, False),
        ({"usage": None, "x_groq": {"id": "r", "usage": COUNTED}}, {15}, None, False),
        ({"usage": None, "choices": [{**ANSWERED, "usage": COUNTED}]}, {15}, None, False),
        ({"usage": COUNTED, "cost": 0.5}, {15}, 500_000_000, False),
        ({"usage": {**COUNTED, "cost": 0.2}, "cost": "0.5"}, {15}, 500_000_000, True),
        ({"usage": {**COUNTED, "cost": 0.5}, "cost": 0.2}, {15}, 500_000_000, True),
        # A zero elsewhere is no price.
        ({"usage": COUNTED, "cost": 0}, {15}, None, False),
        ({"usage": COUNTED, "usageMetadata": MORE}, {15, 105}, None, True),
        ({"usage": COUNTED, "usage_metadata": {"prompt_token_count": 10, "candidates_token_count": 5}}, {15}, None,
         False),
        ({"usage": NO_TOKENS, "x_groq": {"usage": COUNTED}}, {15}, None, False),
        ({"usage": COUNTED, "x_groq": {"usage": NO_TOKENS}}, {15}, None, False),
        ({"usage": {"cost": "?"}, "x_groq": {"usage": COUNTED}}, {15}, None, True),
    ],
)  # fmt: skip
def test_usage_is_read_in_every_place(
    changes: dict[str, Any], tokens: set[int], cost: int | None, is_doubted: bool
) -> None:
    attempt = read(document(**changes))
    assert attempt.usage is not None
    assert {usage.total_tokens for usage in (attempt.usage, *attempt.other_readings)} == tokens
    assert (attempt.charge, attempt.reported_cost_nanousd) == ("known", cost)
    assert (attempt.usage_doubt is not None) == is_doubted


@pytest.mark.parametrize("status", [200, 502])
@pytest.mark.parametrize("reported", [{"usage": {"cost": 0.5}}, {"metadata": {"usage": {"cost": 0.5}}}, {"cost": 0.5}])
def test_error_that_reports_a_cost_was_charged(status: int, reported: dict[str, Any]) -> None:
    attempt = read({"error": {"code": 502, "message": "x", **reported}}, status, is_insured=True)
    assert (attempt.charge, attempt.reported_cost_nanousd) == ("known", 500_000_000)


def test_tokens_that_an_error_names_were_not_charged() -> None:
    named = {"message": "too long", "code": 400, "prompt_tokens": 9_000, "completion_tokens": 1, "total_tokens": 9_001}
    assert read({"error": named}, 400).charge == "none"


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
    assert (report.cost_nanousd, report.doubt is not None) == (cost, is_doubted)


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
        # The error page of a proxy does not say how the request ended.
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
    ("body", "is_insured", "charge", "is_retryable"),
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
def test_error_inside_a_200(body: Any, is_insured: bool, charge: str, is_retryable: bool) -> None:
    attempt = read(body, is_insured=is_insured)
    assert (attempt.outcome, attempt.http_status, attempt.is_ok) == ("provider_error", 200, False)
    # What had come of a text is kept.
    choices = body.get("choices")
    assert attempt.content == (choices[0]["message"]["content"] if choices else None)
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
        (document(choices=None, usage=None), "unknown"),
        (document(choices=[{"message": {"content": ""}, "finish_reason": None}], usage=None), "unknown"),
        # After a free empty reply the model is asked again: nothing is paid twice.
        (document(choices=[{"message": {"content": ""}, "finish_reason": "stop"}], usage={"cost": 0}), "known"),
    ],
)
def test_reply_that_cannot_be_read_or_is_free(body: Any, charge: str) -> None:
    attempt = read(body)
    assert (attempt.outcome, attempt.charge, attempt.content) == ("invalid_response", charge, None)
    assert (attempt.is_retryable, attempt.may_fall_back) == (True, True)


def said(finish: str | None = "stop", **message: Any) -> list[dict[str, Any]]:
    return [{"message": {"role": "assistant", **message}, "finish_reason": finish}]


FAILED, CUT, FILTERED = ErrorCode.INFERENCE_FAILED, ErrorCode.OUTPUT_LIMIT_REACHED, ErrorCode.CONTENT_FILTERED


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (document(choices=[]), FAILED),
        (document(choices=["?"]), FAILED),
        (document(choices=[{"message": None, "finish_reason": "stop"}]), FAILED),
        (document(choices=[{"message": {"content": 5}}]), FAILED),
        (document(choices=said("stop", content=None)), FAILED),
        (document(choices=said("tool_calls", content=None, tool_calls=[])), FAILED),
        (document(choices=said("stop", content=" \n")), FAILED),
        (document(choices=said("stop", content=[])), FAILED),
        (document(choices=said("stop", content=[{"type": "text", "text": ""}])), FAILED),
        (document(choices=said("error_unknown", content="")), FAILED),
        *(
            (document(choices=said(word, content=None)), CUT)
            for word in (
                "length",
                "max_tokens",
                "MAX_TOKENS",
                "max_output_tokens",
                "model_length",
                "model_context_window_exceeded",
                "max-tokens",
                "FinishReason.MAX_TOKENS",
                "FINISH_REASON_MAX_TOKENS",
                "REASON_MAX_LEN",
                "ERROR_LIMIT",
                " Length ",
            )
        ),
        *(
            (document(choices=said(word, content="")), FILTERED)
            for word in (
                "content_filter",
                "SAFETY",
                "RECITATION",
                "PROHIBITED_CONTENT",
                "BLOCKLIST",
                "SPII",
                "refusal",
                "content_filter: SAFETY",
                "content-filter",
                "FINISH_REASON_SAFETY",
                "IMAGE_PROHIBITED_CONTENT",
                "guardrail_intervened",
                "sensitive",
            )
        ),
        # A router's own word hides the provider's.
        (document(choices=[said("stop", content="")[0] | {"native_finish_reason": "MAX_TOKENS"}]), CUT),
        (document(choices=[said(None, content="")[0] | {"native_finish_reason": "SAFETY"}]), FILTERED),
        # The provider says nothing, but the limit is used up.
        (document(choices=said("stop", content=""), usage={"prompt_tokens": 9, "completion_tokens": 50}), CUT),
        (document(choices=said(None, content=""), usage={"prompt_tokens": 9, "completion_tokens": 50}), CUT),
        ({"choices": None, "promptFeedback": {"blockReason": "SAFETY"}, "usage": {"total_tokens": 9}}, FILTERED),
        # The same answer would come again, paid or not.
        (document(choices=said("length", content=""), usage=None), CUT),
        (document(choices=said("content_filter", content=""), usage={"cost": 0}), FILTERED),
    ],
)
def test_reply_without_an_answer_is_the_outcome(body: Any, code: ErrorCode) -> None:
    attempt = read(body, max_tokens=50)
    assert (attempt.outcome, attempt.error_code) == ("ok", code)
    assert (attempt.is_retryable, attempt.may_fall_back) == (False, False)
    assert attempt.error
    assert attempt.reason in FAILURES


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        (said("length", content="part"), {"content": "part", "finish_reason": "length"}),
        (said("content_filter", content="part"), {"content": "part", "finish_reason": "content_filter"}),
        (said(content=[{"type": "text", "text": "a"}, {"type": "output_text", "text": "b"}, "c"]), {"content": "abc"}),
        (said(content={"type": "text", "text": "a"}), {"content": "a"}),
        (said(content=[{"type": "text", "text": {"value": "a"}}]), {"content": "a"}),
        (said(content=[{"type": "image_url", "image_url": {}}, {"type": "text", "text": "a"}]), {"content": "a"}),
        (said(content="a", reasoning="r"), {"content": "a", "reasoning": "r"}),
        (said(content="a", reasoning_content="r"), {"content": "a", "reasoning": "r"}),
        (said(content="a", reasoning_details=[{"type": "reasoning.text", "text": "r"}]), {"reasoning": "r"}),
        (said(content=[{"type": "thinking", "thinking": "r"}, {"type": "text", "text": "a"}]), {"reasoning": "r"}),
        (said(content=None, refusal="no"), {"content": None, "refusal": "no"}),
        (said(content="", refusal="no"), {"content": None, "refusal": "no"}),
        ([{"text": "a", "finish_reason": "stop"}], {"content": "a"}),
        ([{"delta": {"content": "a"}, "finish_reason": "stop"}], {"content": "a"}),
        (said(content="") + said(content="b"), {"content": "b"}),
        (said("end_turn", content="a"), {"finish_reason": "stop"}),
        (said("FinishReason.STOP", content="a"), {"finish_reason": "stop"}),
        (said("tool-calls", content="a"), {"finish_reason": "tool_calls"}),
        (said(" Stop ", content="a"), {"finish_reason": "stop"}),
        (said(content=[{"text": "a"}, {"type": "text", "content": "b"}]), {"content": "ab"}),
        (said(content=[{"type": "mcp_tool_result", "content": "x"}, "b"]), {"content": "b"}),
        *(
            (said(content=None, images=[image]), {"images": ("data:image/png;base64,AA",)})
            for image in (
                "data:image/png;base64,AA",
                {"type": "image_url", "image_url": "data:image/png;base64,AA"},
                {"url": "data:image/png;base64,AA"},
                {"b64_json": "AA"},
            )
        ),
        (said(content={"answer": [4, 2.5, "\u00e9"]}), {"content": '{"answer": [4, 2.5, "\u00e9"]}'}),
        (said(content="a", thinking="r"), {"content": "a", "reasoning": "r"}),
        (
            said(content=[{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]),
            {"content": None, "images": ("data:image/png;base64,AA",)},
        ),
        (
            said(tool_calls={"id": "c", "function": {"name": "f", "arguments": "{}"}}),
            {"tool_calls": ({"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}},)},
        ),
        (
            said(tool_calls=[{"id": "c", "type": None, "name": "f", "arguments": {"x": 1}}]),
            {"tool_calls": ({"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}},)},
        ),
        (
            said(tool_calls=[{"id": "c", "function": {"name": "f", "arguments": " "}}]),
            {"tool_calls": ({"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}},)},
        ),
        (
            said(content=[{"type": "custom_tool_call", "call_id": "c", "name": "f", "input": "x"}]),
            {"tool_calls": ({"id": "c", "type": "custom", "custom": {"name": "f", "input": "x"}},)},
        ),
        ([{"message": "a", "finish_reason": "stop"}], {"content": "a"}),
        ([{"content": "a", "finish_reason": "stop"}], {"content": "a"}),
        (said(content="a")[0], {"content": "a"}),
        ({"0": said(content="a")[0]}, {"content": "a"}),
        (said("a word of its own", content="a"), {"finish_reason": None}),
        (said("own_word", content="a"), {"finish_reason": "own_word"}),
    ],
)
def test_answer_is_read_in_every_form(choices: Any, expected: dict[str, Any]) -> None:
    attempt = read(document(choices=choices))
    assert (attempt.outcome, attempt.error_code) == ("ok", None)
    assert {name: getattr(attempt, name) for name in expected} == expected


ITEMS = [
    {"type": "reasoning", "summary": [{"type": "summary_text", "text": "r"}]},
    {"type": "message", "content": [{"type": "output_text", "text": "a"}]},
    {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
]


@pytest.mark.parametrize(
    ("body", "content", "finish"),
    [
        # OpenAI's responses, Anthropic's messages, Ollama's chat.
        ({"status": "completed", "output": ITEMS, "usage": {"input_tokens": 2, "output_tokens": 3}}, "a", "stop"),
        ({"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}, "output": ITEMS,
          "usage": {"input_tokens": 2, "output_tokens": 3}}, "a", "length"),
        ({"type": "message", "content": [{"type": "text", "text": "a"}], "stop_reason": "max_tokens",
          "usage": {"input_tokens": 2, "output_tokens": 3}}, "a", "length"),
        ({"message": {"role": "assistant", "content": "a"}, "done_reason": "stop", "prompt_eval_count": 2,
          "eval_count": 3}, "a", "stop"),
        # Ollama's generate, Cohere's chat, Anthropic's and DashScope's older forms.
        ({"response": "a", "done": True, "done_reason": "length", "prompt_eval_count": 2, "eval_count": 3}, "a",
         "length"),
        ({"message": {"content": [{"type": "text", "text": "a"}]}, "finish_reason": "MAX_TOKENS",
          "usage": {"tokens": {"input_tokens": 2, "output_tokens": 3}}}, "a", "length"),
        ({"completion": "a", "stop_reason": "stop_sequence", "usage": {"input_tokens": 2, "output_tokens": 3}}, "a",
         "stop"),
        ({"output": {"text": "a", "finish_reason": "stop"}, "usage": {"input_tokens": 2, "output_tokens": 3}}, "a",
         "stop"),
    ],
)  # fmt: skip
def test_answer_in_the_form_of_another_api_is_read(body: Any, content: str, finish: str) -> None:
    attempt = read(body)
    assert (attempt.outcome, attempt.content, attempt.finish_reason) == ("ok", content, finish)
    assert attempt.usage == Usage(prompt_tokens=2, completion_tokens=3)
    if isinstance(body.get("output"), list):
        assert attempt.reasoning == "r"
        assert attempt.tool_calls[0]["function"] == {"name": "f", "arguments": "{}"}


def response_events(*items: dict[str, Any], **end: Any) -> bytes:
    events = [
        {"type": "response.created", "response": {"id": "r1", "status": "in_progress", "output": [], "usage": None}},
        {"type": "response.output_item.added", "item": {"type": "message", "content": []}},
        {"type": "response.output_text.delta", "delta": "a", "item_id": "i"},
        {"type": "response.output_text.done", "text": "a"},
        {"type": "response.function_call_arguments.delta", "delta": "{}"},
        *items,
        *([{"type": "response.completed", "response": {"id": "r1", "model": "m", **end}}] if end else []),
    ]
    return b"".join(b"event: x\ndata: " + json.dumps(each).encode() + b"\n\n" for each in events)


def test_events_of_a_response_are_read() -> None:
    usage = {"input_tokens": 10, "output_tokens": 5, "total_tokens": 15}
    attempt = read(response_events(status="completed", output=ITEMS, usage=usage, error=None))
    assert (attempt.outcome, attempt.content, attempt.reasoning, attempt.finish_reason) == ("ok", "a", "r", "stop")
    assert attempt.tool_calls[0]["function"] == {"name": "f", "arguments": "{}"}
    assert (attempt.usage, attempt.generation_id) == (Usage(prompt_tokens=10, completion_tokens=5), "r1")
    cut = {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}, "output": ITEMS[:2]}
    assert read(response_events(**cut, usage=usage)).finish_reason == "length"
    # It broke off.
    assert read(response_events()).outcome == "connection_error"
    response = {"status": "failed", "error": {"code": "server_error"}, "output": []}
    failed = {"type": "response.failed", "response": response}
    assert read(response_events(failed)).outcome == "provider_error"


GEMINI_PARTS = [
    {"text": "r", "thought": True},
    {"text": "a"},
    {"functionCall": {"name": "f", "args": {"x": 1}}},
    {"inlineData": {"mimeType": "image/png", "data": "AAAA"}},
]
CONVERSE_PARTS = [
    {"reasoningContent": {"reasoningText": {"text": "r", "signature": "s"}}},
    {"text": "a"},
    {"toolUse": {"toolUseId": "c1", "name": "f", "input": {"x": 1}}},
]


@pytest.mark.parametrize(
    "body",
    [
        {"candidates": [{"content": {"parts": GEMINI_PARTS, "role": "model"}, "finishReason": "STOP"}],
         "usageMetadata": {"promptTokenCount": 10, "candidatesTokenCount": 5, "totalTokenCount": 15}},
        {"output": {"message": {"role": "assistant", "content": CONVERSE_PARTS}}, "stopReason": "end_turn",
         "usage": {"inputTokens": 10, "outputTokens": 5, "totalTokens": 15}},
    ],
)  # fmt: skip
def test_parts_without_a_type_are_read(body: Any) -> None:
    attempt = read(body)
    assert (attempt.content, attempt.reasoning, attempt.finish_reason) == ("a", "r", "stop")
    assert [call["function"] for call in attempt.tool_calls] == [{"name": "f", "arguments": '{"x": 1}'}]
    assert attempt.images == (("data:image/png;base64,AAAA",) if "candidates" in body else ())
    assert attempt.usage == Usage(prompt_tokens=10, completion_tokens=5)


@pytest.mark.parametrize(
    "error",
    [{}, {"message": "", "type": "", "param": None, "code": None}, {"code": 0, "message": "success"}, "", "null", False,
     {"code": "200", "message": "OK"}, [], [{}]],
)  # fmt: skip
@pytest.mark.parametrize("form", ["document", "choice", "events"])
def test_error_without_content_is_no_error(error: object, form: str) -> None:
    """G4: gateways have a member for errors in each reply, and the answer beside it was paid for."""
    if form == "events":
        body: Any = event(choices=delta(content="a"), error=error) + event(choices=delta("stop"), error=error)
    elif form == "choice":
        body = document(choices=[{**said(content="a")[0], "error": error}])
    else:
        body = document(choices=said(content="a"), error=error, errors=error)
    attempt = read(body)
    assert (attempt.outcome, attempt.content) == ("ok", "a")


def test_error_is_kept_beside_one_without_content() -> None:
    failed = event(choices=delta(content="a"), error={"code": 502, "message": "x"})
    attempt = read(failed + event(choices=delta("stop"), error={}))
    assert (attempt.outcome, attempt.http_status) == ("provider_error", 200)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"code": 429, "msg": "slow down", "data": None}, "slow down"),
        ({"choices": None, "base_resp": {"status_code": 1002, "status_msg": "slow down"}}, "slow down"),
        ({"error": {}, "errors": [{"message": "slow down"}]}, "slow down"),
    ],
)
def test_error_of_a_gateway_is_read(body: Any, sentence: str) -> None:
    attempt = read(body)
    assert (attempt.outcome, attempt.provider_error) == ("provider_error", sentence)


def test_tool_calls_are_storable_and_keep_what_their_provider_needs() -> None:
    call = (
        b'{"id": "a", "extra_content": {"signature": "s\\ud800"}, "function": {"name": "f", "arguments": {"x": 1.5}}}'
    )
    body = b'{"choices": [{"message": {"tool_calls": [' + call + b']}, "finish_reason": "tool_calls"}]}'
    (found,) = read(body).tool_calls
    assert found == {
        "id": "a",
        "type": "function",
        "extra_content": {"signature": "s\ufffd"},
        "function": {"name": "f", "arguments": '{"x": 1.5}'},
    }
    json.dumps(found).encode()


def event(**changes: Any) -> bytes:
    return b"data: " + json.dumps({"id": "gen-1", "model": "m", **changes}).encode() + b"\n\n"


def delta(finish: str | None = None, **parts: Any) -> list[dict[str, Any]]:
    return [{"index": 0, "delta": parts, "finish_reason": finish}]


USAGE = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
WHOLE = json.dumps(document()).encode()


@pytest.mark.parametrize(
    "body",
    [
        b"\xef\xbb\xbf" + WHOLE,
        "\ufeff".encode("utf-16-le") + json.dumps(document()).encode("utf-16-le"),
        b"\n \n\r\n" + WHOLE + b"\n\0",
        b": PROCESSING\n\n: PROCESSING\n\n" + WHOLE,
        b"[" + WHOLE + b"]",
        b"data: " + WHOLE + b"\n\ndata: [DONE]\n\n",
        b"event: message\ndata: " + WHOLE + b"\n",
        b"data: data: " + WHOLE + b"\n\ndata: data: [DONE]\n\n",
        WHOLE + b"\n\ndata: [DONE]\n\n",
        WHOLE + b"\n<!-- served by x -->",
        WHOLE + WHOLE,
        WHOLE + b"\n{}\n",
        b"[" + WHOLE + b", {}]",
        b")]}'\n" + WHOLE,
        b"```json\n" + WHOLE + b"\n```",
        WHOLE[:-1] + b",}",
        WHOLE.replace(b"}]", b"} ,\n]"),
        WHOLE.replace(b'"object"', b'"object \n\t"'),
        json.dumps(WHOLE.decode()).encode(),
        gzip.compress(WHOLE, mtime=0),
        b'{"code": 0, "message": "success", "data": ' + WHOLE + b"}",
        b'{"success": true, "errors": [], "messages": [], "result": ' + WHOLE + b"}",
        WHOLE.replace(b'"object"', b'"object\xff"'),
    ],
)
def test_body_is_read_with_text_around_it(body: bytes) -> None:
    attempt = read(body)
    assert (attempt.content, attempt.reported_cost_nanousd) == (COMPLETION, 4_500)


NO_REPLIES = [
    (200, b"<html><script>var a = " + WHOLE + b"</script></html>"),
    (200, WHOLE[:-1]),
    (200, b"[" + WHOLE[:-1]),
    (200, b"x" * 65 + WHOLE),
    (200, b"\x1f\x8b" + WHOLE),
    (200, gzip.compress(WHOLE, mtime=0)[:20]),
    (200, b'"no JSON"'),
    (502, b"<html>" + json.dumps(error(502)).encode() + b"</html>"),
]


@pytest.mark.parametrize(("status", "body"), NO_REPLIES)
def test_body_that_is_no_reply_may_have_been_charged(status: int, body: bytes) -> None:
    attempt = read(body, status)
    assert (attempt.charge, attempt.content) == ("unknown", None)


@pytest.mark.parametrize("rest", ['\\"' * 500_000, ",]" * 500_000, "{" * 500_000, "{} " * 200_000, '"' * 500_001])
def test_body_that_is_not_json_is_parsed_once(rest: str) -> None:
    """Where each quote or brace would be tried, these would take hours."""
    started = time.process_time()
    assert read(f'{{"a": 1}} {{"b": "{rest}'.encode()).outcome == "invalid_response"
    assert time.process_time() - started < 5


LINES = [
    ({"model": "m", "message": {"role": "assistant", "content": "Hel"}, "done": False},
     {"model": "m", "message": {"role": "assistant", "content": "lo"}, "done": True, "done_reason": "stop",
      "prompt_eval_count": 10, "eval_count": 5}),
    ({"response": "Hel", "done": False},
     {"response": "lo", "done": True, "done_reason": "stop", "prompt_eval_count": 10, "eval_count": 5}),
    ({"choices": delta(content="Hel")}, {"choices": delta("stop", content="lo"), "usage": USAGE}),
    ({"candidates": [{"content": {"parts": [{"text": "Hel"}]}}]},
     {"candidates": [{"content": {"parts": [{"text": "lo"}]}, "finishReason": "STOP"}],
      "usageMetadata": {"promptTokenCount": 10, "candidatesTokenCount": 5, "totalTokenCount": 15}}),
]  # fmt: skip


@pytest.mark.parametrize("lines", LINES)
@pytest.mark.parametrize("form", ["lines", "list", "events", "nothing"])
def test_objects_after_one_another_are_parts_of_one_answer(lines: tuple[dict[str, Any], ...], form: str) -> None:
    texts = [json.dumps(line) for line in lines]
    whole = {
        "lines": "\n".join(texts),
        "list": f"[{', '.join(texts)}]",
        "events": "".join(f"data: {text}\n\n" for text in texts),
        "nothing": "".join(texts),
    }[form]
    attempt = read(whole.encode())
    assert (attempt.outcome, attempt.content, attempt.finish_reason) == ("ok", "Hello", "stop")
    assert attempt.usage == Usage(prompt_tokens=10, completion_tokens=5)


@pytest.mark.parametrize("lines", LINES[:3])
def test_objects_of_which_the_last_was_cut_off_are_a_lost_connection(lines: tuple[dict[str, Any], ...]) -> None:
    first, last = map(json.dumps, lines)
    attempt = read(f"{first}\n{last[:-5]}".encode())
    assert (attempt.outcome, attempt.charge, attempt.content) == ("connection_error", "unknown", "Hel")


@pytest.mark.parametrize("sign", [b" ", b":\n", b": alive\n\n", b":"], ids=["space", "empty", "comment", "no end"])
@pytest.mark.parametrize("pieces", first_quick(1, [200_000, 1]))
def test_many_keep_alive_lines_are_parsed_once(sign: bytes, pieces: int) -> None:
    """It would take minutes if all of it were parsed again with each piece."""
    body, size = Body(), 200_000 // pieces
    for _ in range(pieces):
        body.feed(sign * size)
    body.feed(b"\n" + WHOLE)
    body.end()
    assert body.document is not None
    assert body.document["id"] == document()["id"]


@pytest.mark.parametrize(
    ("changes", "tier"),
    [
        ({}, ""),
        ({"service_tier": "default"}, ""),
        ({"service_tier": "priority"}, "priority"),
        ({"usage": USAGE | {"service_tier": "batch"}}, "batch"),
        ({"usage": USAGE | {"speed": "fast"}}, "fast"),
        ({"service_tier": ["flex"]}, ""),
    ],
)
def test_processing_with_prices_of_its_own_is_noted(changes: dict[str, Any], tier: str) -> None:
    assert read(document(**changes)).service_tier == tier


def test_event_stream_is_put_together() -> None:
    function = {"name": "f", "arguments": '{"a"'}
    body = (
        b": PROCESSING\n\n"
        + event(choices=delta(role="assistant", content="Hel", reasoning="think"))
        + event(choices=delta(content="lo", reasoning="ing"))
        + event(choices=delta(tool_calls=[{"index": 0, "id": "c1", "type": "function", "function": function}]))
        + event(choices=delta(tool_calls=[{"index": 0, "function": {"arguments": ": 1}"}}]))
        + event(choices=delta("tool_calls"))
        + event(choices=[], usage=USAGE | {"cost": 0.5})
        + b"data: [DONE]\n\n"
    )
    attempt = read(body)
    assert (attempt.content, attempt.reasoning, attempt.finish_reason) == ("Hello", "thinking", "tool_calls")
    assert attempt.tool_calls[0]["function"]["arguments"] == '{"a": 1}'
    assert attempt.reported_cost_nanousd == 500_000_000


def test_event_stream_that_ends_in_an_error_is_an_error() -> None:
    body = event(choices=delta(content="Hel")) + event(error={"code": 502, "message": PROMPT}, choices=delta("error"))
    attempt = read(body, is_insured=True)
    assert (attempt.outcome, attempt.charge, attempt.content) == ("provider_error", "none", "Hel")


def test_event_stream_without_an_end_is_a_lost_connection() -> None:
    """A socket that is closed in mid-answer looks like an end; the usage so far is not what is billed."""
    attempt = read(event(choices=delta(content="Hel"), usage=USAGE))
    assert (attempt.outcome, attempt.charge, attempt.content) == ("connection_error", "unknown", "Hel")
    assert (attempt.is_retryable, attempt.generation_id) == (True, "gen-1")


@pytest.mark.parametrize("end", [b"", b"data: [DONE]", b"data: [DONE]\n\n", b'data: {"choi', b": bye\n\n"])
def test_event_stream_has_ended_where_a_choice_says_why(end: bytes) -> None:
    attempt = read(event(choices=delta(content="Hel")) + event(choices=delta("length"), usage=USAGE) + end)
    assert (attempt.outcome, attempt.charge, attempt.finish_reason) == ("ok", "known", "length")


@pytest.mark.parametrize("end", [b"[DONE]", b"[done]", b"DONE", b'"[DONE]"'])
def test_event_stream_has_ended_where_it_says_so(end: bytes) -> None:
    attempt = read(event(choices=delta(content="Hel")) + b"data: " + end + b"\n\n")
    assert (attempt.outcome, attempt.charge, attempt.content) == ("ok", "unknown", "Hel")


def counted(prompt: int, completion: int, **further: Any) -> dict[str, Any]:
    total = prompt + completion
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": total, **further}


@pytest.mark.parametrize(
    ("usages", "expected", "cost", "is_doubted"),
    [
        # All that was used so far in each chunk, as vLLM has it.
        ([counted(10, 1), counted(10, 2), counted(10, 5)], (10, 5), None, False),
        ([counted(10, 5), counted(10, 5), None], (10, 5), None, False),
        # Nothing, after the true usage or before it.
        ([counted(10, 5, cost=0.5), {}], (10, 5), 500_000_000, False),
        ([counted(10, 5, cost=0.5), counted(0, 0, cost=0)], (10, 5), 500_000_000, False),
        ([counted(0, 0), counted(10, 5)], (10, 5), None, False),
        ([counted(0, 0, cost=0), counted(10, 5, cost=0)], (10, 5), 0, False),
        ([counted(10, 5, cost=0.5), counted(10, 5)], (10, 5), 500_000_000, False),
        ([counted(10, 5, cost=0.5), counted(10, 5, cost=None)], (10, 5), 500_000_000, False),
        # What is new in each chunk.
        ([counted(10, 30), counted(10, 20), counted(10, 25)], (10, 75), None, True),
        ([counted(10, 0), counted(0, 20)], (10, 20), None, True),
        ([counted(10, 3, cost=0.25), counted(10, 3, cost=0.125)], (10, 3), 375_000_000, False),
        ([{"input_tokens": 10, "output_tokens": "4"}, {"input_tokens": 10, "output_tokens": 3.0}], (10, 7), None,
         False),
        # What is cached is what the last one says.
        ([counted(10, 5, prompt_tokens_details={"cached_tokens": 9}),
          counted(10, 5, prompt_tokens_details={"cached_tokens": 0})], (10, 5), None, False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["usage", "usageMetadata"])
def test_usages_of_an_event_stream_are_joined(
    usages: list[Any], expected: tuple[int, int], cost: int | None, is_doubted: bool, name: str
) -> None:
    chunks = [event(choices=delta(content="a"), **{name: usage}) for usage in usages]
    attempt = read(b"".join(chunks) + event(choices=delta("stop")) + b"data: [DONE]\n\n")
    assert attempt.usage is not None
    assert (attempt.usage.prompt_tokens, attempt.usage.completion_tokens, attempt.usage.cached_tokens) == (*expected, 0)
    assert (attempt.reported_cost_nanousd, attempt.usage_doubt is not None) == (cost, is_doubted)


def test_event_stream_has_ended_with_a_usage_of_its_own() -> None:
    """As the last chunk before `[DONE]`, also where the server gives no reason and does not say that it is over."""
    begun = event(choices=delta(content="Hel"))
    attempt = read(begun + event(choices=[], usage=USAGE))
    assert (attempt.outcome, attempt.charge, attempt.content) == ("ok", "known", "Hel")
    for body in (
        event(choices=[], usage=USAGE) + begun,  # Anthropic's first event has the usage of the prompt.
        begun + event(choices=[], usage=USAGE) + begun,
        event(choices=delta(content="Hel"), usage=USAGE) + event(choices=[], usage=USAGE),  # One in each chunk.
    ):
        assert read(body).outcome == "connection_error"


@pytest.mark.parametrize(
    "chunks",
    [
        [{"delta": {"content": "Hel"}, "message": {"content": "Hel"}},
         {"delta": {"content": "lo"}, "message": {"content": "Hello"}, "finish_reason": "stop"}],
        [{"delta": {"content": "Hel"}}, {"delta": {"content": "lo"}},
         {"delta": {}, "message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}],
        [{"delta": {"content": "Hel"}},
         {"message": {"content": [{"type": "text", "text": "Hello"}]}, "finish_reason": "stop"}],
        [{"delta": {"content": "Hello"}}, {"message": {"content": "Another form"}, "finish_reason": "stop"}],
        [{"delta": {"role": "assistant"}, "message": {"content": "Hel"}},
         {"message": {"content": "lo"}, "finish_reason": "stop"}],
        [{"message": "Hel"}, {"content": "lo", "finish_reason": "stop"}],
    ],
)  # fmt: skip
def test_repeated_parts_of_chunks_count_once(chunks: list[dict[str, Any]]) -> None:
    body = b"".join(event(choices=[{"index": 0, **each}], usage=USAGE) for each in chunks)
    assert read(body).content == "Hello"


def test_choices_without_an_index_are_told_apart_by_their_place() -> None:
    choices = [{"delta": {"content": "Hel"}}, {"delta": {"content": "other"}}]
    ends = [{"delta": {"content": "lo"}, "finish_reason": "stop"}, {"delta": {}, "finish_reason": "stop"}]
    assert read(event(choices=choices) + event(choices=ends)).content == "Hello"


@pytest.mark.parametrize("form", ["data", "result", "response"])
def test_chunks_in_an_envelope_are_put_together(form: str) -> None:
    body = b"".join(
        event(code=0, message="success", **{form: {"choices": choices, "usage": USAGE}})
        for choices in (delta(content="Hel"), delta("stop", content="lo"))
    )
    assert read(body).content == "Hello"


def test_text_beside_the_chunks_is_no_answer() -> None:
    assert read(event(text="not this") + event(choices=delta("stop", content="a"), usage=USAGE)).content == "a"
    assert read(event(text="not this") + event(choices=[], usage=USAGE)).content is None


def test_calls_in_the_message_of_the_last_chunk_are_not_lost() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    end = [{"index": 0, "message": {"content": "Hel", "tool_calls": [call], "reasoning": "r"}, "finish_reason": "stop"}]
    attempt = read(event(choices=delta(content="Hel")) + event(choices=end))
    assert (attempt.content, attempt.tool_calls, attempt.reasoning) == ("Hel", (call,), "r")


def called(name: str | None = None, arguments: object = None, **further: Any) -> dict[str, Any]:
    return {**further, "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        # Without index and id: the next begins where the arguments are whole.
        ([[called("f", "{}"), called("g", "{}")]], [("f", "{}"), ("g", "{}")]),
        ([[called("f", '{"a":')], [called("f", " 1}")], [called("f", "{}")]], [("f", '{"a": 1}'), ("f", "{}")]),
        # Another id for each part, as vLLM had it: a part without a name begins no call.
        ([[called("f", '{"a":', index=0, id="c1")], [called(None, " 1}", index=0, id="c2")]], [("f", '{"a": 1}')]),
        ([[called("f", "{}", index=0, id="c1")], [called("g", "{}", index=0, id="c2")]], [("f", "{}"), ("g", "{}")]),
        # No arguments: a text that is no JSON.
        ([[called("f", "", index=0, id="c1")]], [("f", "{}")]),
        # Name and arguments beside the id.
        ([[{"index": 0, "id": "c1", "name": "f", "arguments": '{"a":'}], [{"index": 0, "arguments": " 1}"}]],
         [("f", '{"a": 1}')]),
    ],
)  # fmt: skip
def test_parts_of_tool_calls_are_put_together(parts: list[Any], expected: list[tuple[str, str]]) -> None:
    body = b"".join(event(choices=delta(tool_calls=each)) for each in parts) + event(choices=delta("tool_calls"))
    functions = [call["function"] for call in read(body).tool_calls]
    assert [(function["name"], function["arguments"]) for function in functions] == expected


@pytest.mark.parametrize(
    ("status", "body", "reason", "sentence"),
    [
        (402, error(402, "no credit"), "out_of_credit", "no credit"),
        (429, {"error": {"code": "insufficient_quota", "message": "x"}}, "out_of_credit", "x"),
        (400, {"error": {"message": "Your credit balance is too low"}}, "out_of_credit", None),
        (429, error(429, "slow down"), "rate_limited", "slow down"),
        (429, [error(429, "slow down")], "rate_limited", "slow down"),
        (400, {"error": {"code": "context_length_exceeded", "message": "x"}}, "context_too_long", "x"),
        (400, error(400, "This model's maximum context length is 8192 tokens"), "context_too_long", None),
        (400, error(400, "prompt is too long: 210000 tokens > 200000 maximum"), "context_too_long", None),
        (413, error(413, "Request too large"), "context_too_long", None),
        (400, {"object": "error", "message": "the context has 8192 tokens", "code": 400}, "context_too_long", None),
        (400, {"error": {"code": "unsupported_value", "param": "temperature"}}, "unsupported_parameter", None),
        (404, error(404, "No endpoints found that support the requested parameters"), "unsupported_parameter", None),
        (404, {"error": "model 'x' not found, try pulling it first"}, "not_found", None),
        (403, error(403, "flagged", reasons=["x"]), "content_filtered", "flagged"),
        (400, {"error": {"code": "content_filter", "message": "x"}}, "content_filtered", "x"),
        (401, error(401, "no"), "bad_key", "no"),
        (403, error(403, "no"), "forbidden", "no"),
        (422, {"detail": [{"loc": ["body"], "msg": "Field required", "type": "missing"}]}, "bad_request", None),
        (400, {"detail": "Bad"}, "bad_request", "Bad"),
        (500, error(500, "boom"), "provider_failed", "boom"),
        (503, error(503, "full"), "overloaded", "full"),
        (529, error(529, "full"), "overloaded", "full"),
        (504, b"", "timed_out", None),
        (502, b"<html>502</html>", "provider_failed", None),
        (429, b"slow down", "rate_limited", "slow down"),
        (
            400,
            error(400, "Provider returned error", raw='{"error": {"message": "inner"}}'),
            "bad_request",
            "Provider returned error: inner",
        ),
    ],
)
def test_error_has_a_reason_and_the_sentence_of_its_provider(
    status: int, body: Any, reason: str, sentence: str | None
) -> None:
    attempt = read(body, status)
    assert attempt.reason == reason
    assert reason in FAILURES
    if sentence is not None:
        assert attempt.provider_error == sentence
    if body in (b"", b"<html>502</html>"):
        assert attempt.provider_error is None


@pytest.mark.parametrize(
    ("status", "body", "may_fall_back"),
    [
        (402, error(402, "no", limit_source="openrouter_credits"), False),
        (402, error(402, "Insufficient Balance"), False),
        (429, {"error": {"code": "insufficient_quota", "message": "x"}}, False),
        (402, error(402, "You requested up to 2000 tokens, but can only afford 300"), True),
        (402, error(402, "no"), True),
    ],
)
def test_account_without_credit_is_not_asked_again(status: int, body: Any, may_fall_back: bool) -> None:
    attempt = read(body, status)
    assert (attempt.is_retryable, attempt.may_fall_back) == (False, may_fall_back)


def test_machine_words_of_an_error_have_fields_of_their_own() -> None:
    body = {"error": {"code": "bad", "type": "invalid_request_error", "param": "messages[0].content", "message": PROMPT,
                      "metadata": {"limit_source": "key", "provider_name": "Google AI Studio"}}}  # fmt: skip
    assert read(body, 400).error_details == ErrorDetails(
        code="bad",
        type="invalid_request_error",
        param="messages[0].content",
        limit_source="key",
        provider="Google AI Studio",
    )
    secret = dict.fromkeys(("code", "type", "param"), PROMPT)
    metadata = {"limit_source": PROMPT, "provider_name": PROMPT}
    assert read({"error": {**secret, "metadata": metadata}}, 400).error_details is None


def test_generation_id_of_the_headers_is_kept_if_the_body_breaks() -> None:
    reply = reply_of(b"{", headers={"x-generation-id": "gen-9"})
    assert ADAPTERS["openrouter"].read_reply(reply, chat_request()).generation_id == "gen-9"


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
    assert "secret" not in repr(attempt.error_details)
    assert "secret" not in repr(attempt)


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
def test_requested_pause_is_returned(status: int) -> None:
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
             "completion_tokens", "prompt_tokens_details", "cached_tokens", "finish_reason", "is_byok", "cost_details",
             "total_tokens", "input_tokens", "cache_creation_input_tokens", "tool_calls", "refusal", "reasoning",
             "text", "type", "function", "delta", "detail", "usageMetadata", "thoughtsTokenCount"]
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
    has_answer = bool((attempt.content or "").strip() or attempt.tool_calls or attempt.refusal)
    assert attempt.is_ok or not has_answer or attempt.outcome == "provider_error" or status != 200
    assert (attempt.error_code is None) == has_answer or not attempt.is_ok
    assert attempt.reported_cost_nanousd is None or 0 <= attempt.reported_cost_nanousd <= MAX_NANOUSD
    if attempt.charge == "known":
        assert attempt.usage is not None or attempt.reported_cost_nanousd is not None
    if attempt.usage is not None:
        Usage.model_validate(attempt.usage.model_dump())


@given(st.binary(max_size=200))
def test_no_bytes_break_the_reader(body: bytes) -> None:
    assert read(body).outcome in {"ok", "invalid_response", "provider_error"}


def of_anthropic(document: Any, status: int = 200) -> Attempt:
    raw = json.dumps(document).encode()
    reply = reply_of(raw, status, {"request-id": "req_1"}, latency_ms=7)
    return ADAPTERS["anthropic"].read_reply(reply, chat_request("claude-x", 100))


def message(**changes: Any) -> dict[str, Any]:
    return {
        "id": "msg_1", "type": "message", "role": "assistant", "model": "claude-x-1",
        "content": [{"type": "text", "text": "Yes."}], "stop_reason": "end_turn", "stop_sequence": None,
        "usage": {"input_tokens": 10, "output_tokens": 5},
    } | changes  # fmt: skip


def test_a_message_of_anthropics() -> None:
    usage = {
        "input_tokens": 10, "output_tokens": 50, "cache_read_input_tokens": 300, "cache_creation_input_tokens": 700,
        "cache_creation": {"ephemeral_5m_input_tokens": 600, "ephemeral_1h_input_tokens": 100},
        "service_tier": "standard",
    }  # fmt: skip
    content = [
        {"type": "thinking", "thinking": "hm", "signature": "c2ln"},
        {"type": "redacted_thinking", "data": "eA=="},
        {"type": "text", "text": "I look"},
        {"type": "text", "text": " it up."},
        {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"x": 1}},
    ]
    reply = of_anthropic(message(content=content, stop_reason="tool_use", usage=usage))
    assert (reply.outcome, reply.charge, reply.generation_id, reply.model_used) == (
        "ok",
        "known",
        "req_1",
        "claude-x-1",
    )
    assert (reply.content, reply.reasoning, reply.finish_reason) == ("I look it up.", "hm", "tool_calls")
    of_claude = {"format": "anthropic-claude-v1"}
    assert reply.reasoning_details == (
        {"type": "reasoning.text", "text": "hm", "signature": "c2ln", "index": 0, **of_claude},
        {"type": "reasoning.encrypted", "data": "eA==", "index": 1, **of_claude},
    )
    (call,) = reply.tool_calls
    assert call == {"id": "toolu_1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    assert reply.usage == Usage(
        prompt_tokens=10 + 300 + 700, completion_tokens=50, cached_tokens=300, cache_write_tokens=700,
        cache_write_1h_tokens=100,
    )  # fmt: skip
    assert (reply.usage_doubt, reply.other_readings, reply.service_tier) == (None, (), "")


@pytest.mark.parametrize(
    ("changes", "finish_reason", "error_code"),
    [
        ({"stop_reason": "stop_sequence", "stop_sequence": "END"}, "stop", None),
        ({"stop_reason": "max_tokens"}, "length", None),
        ({"stop_reason": "max_tokens", "content": []}, "length", ErrorCode.OUTPUT_LIMIT_REACHED),
        ({"stop_reason": "model_context_window_exceeded"}, "length", None),
        ({"stop_reason": "refusal", "content": []}, "content_filter", ErrorCode.CONTENT_FILTERED),
        ({"stop_reason": "end_turn", "content": []}, "stop", ErrorCode.INFERENCE_FAILED),
        ({"stop_reason": "pause_turn"}, "pause_turn", None),
    ],
)
def test_the_stop_reason_of_an_anthropic_message_is_read(
    changes: dict[str, Any], finish_reason: str, error_code: ErrorCode | None
) -> None:
    attempt = of_anthropic(message(**changes))
    assert (attempt.outcome, attempt.finish_reason, attempt.error_code) == ("ok", finish_reason, error_code)


@pytest.mark.parametrize(
    ("status", "kind", "text", "reason", "is_retryable", "charge"),
    [
        (400, "invalid_request_error", "max_tokens: must be at most 64000", "bad_request", False, "none"),
        (400, "invalid_request_error", "Your credit balance is too low", "out_of_credit", False, "none"),
        (400, "invalid_request_error", "prompt is too long: 9 tokens > 8 maximum", "context_too_long", False, "none"),
        (400, "invalid_request_error", "top_k: Extra inputs are not permitted", "unsupported_parameter", False, "none"),
        (401, "authentication_error", "invalid x-api-key", "bad_key", False, "none"),
        (402, "billing_error", "Payment required", "out_of_credit", False, "none"),
        (403, "permission_error", "not allowed", "forbidden", False, "none"),
        (404, "not_found_error", "model: claude-x", "not_found", False, "none"),
        (413, "request_too_large", "Request exceeds the maximum size", "context_too_long", False, "none"),
        (429, "rate_limit_error", "This request would exceed your limit", "rate_limited", True, "none"),
        (500, "api_error", "Internal server error", "provider_failed", True, "none"),
        (504, "timeout_error", "Request timed out", "timed_out", True, "unknown"),
        (529, "overloaded_error", "Overloaded", "overloaded", True, "none"),
    ],
)  # fmt: skip
def test_an_error_of_anthropics(
    status: int, kind: str, text: str, reason: str, is_retryable: bool, charge: str
) -> None:
    error = {"type": "error", "error": {"type": kind, "message": text}, "request_id": "req_1"}
    attempt = of_anthropic(error, status)
    assert (attempt.reason, attempt.is_retryable, attempt.charge) == (reason, is_retryable, charge)
    assert attempt.error_details is not None
    assert (attempt.error_details.type, attempt.provider_error, attempt.generation_id) == (kind, text, "req_1")


def test_us_inference_of_anthropic_is_marked() -> None:
    usage = {"input_tokens": 10, "output_tokens": 5, "inference_geo": "us"}
    assert of_anthropic(message(usage=usage)).service_tier == "us"
    assert of_anthropic(message(usage={**usage, "inference_geo": "global"})).service_tier == ""


NESTED = [
    ('{"error":', "}"), ('{"message":[', "]}"), ('{"data":', "}"), ('{"output":', "}"), ('{"parts":[', "]}"),
    ('{"content":[', "]}"), ('{"choices":[{"message":', "}]}"), ("[", "]"),
    ('{"type":"text","content":[{"text":', "}]}"),
]  # fmt: skip


@pytest.mark.parametrize("depth", [200, 300, 500, 900])
@pytest.mark.parametrize(
    "around",
    [
        '{"error":%s,"choices":[{"message":{"content":"hi"},"finish_reason":"stop"}]}',
        '{"usage":%s,"choices":[{"message":{"content":"hi"},"finish_reason":"stop"}]}',
        '{"choices":[{"message":{"content":%s},"finish_reason":"stop"}]}',
        '{"choices":[{"message":{"content":"hi","tool_calls":%s,"reasoning_details":%s}}]}',
        '{"choices":[{"delta":{"content":%s}}]}',
        '{"candidates":[{"content":%s}]}',
        '{"output":%s}',
        '{"data":%s}',
        "%s",
    ],
)
def test_deep_nesting_is_no_internal_error(around: str, depth: int) -> None:
    for opening, closing in NESTED:
        nested = opening * depth + "1" + closing * depth
        attempt = read(around.replace("%s", nested).encode())
        assert attempt.charge != "none", "it may have been charged"
