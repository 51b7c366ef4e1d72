"""Event streams: however a completion is cut into parts, it reads as the plain reply does."""

import json
from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tollbook.inference.attempts import Attempt
from tollbook.inference.providers.dialects import ADAPTERS
from tollbook.standin.event_streams import COMMENT, DONE, as_events

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
CALLS = st.builds(
    lambda name, arguments, number: {
        "id": f"call_{number}",
        "type": "function",
        "function": {"name": name, "arguments": json.dumps(arguments)},
    },
    st.sampled_from(["look_up", "send"]),
    st.dictionaries(TEXTS, TEXTS, max_size=2),
    st.integers(0, 99),
)
MESSAGES = st.fixed_dictionaries(
    {"role": st.just("assistant")},
    optional={
        "content": st.none() | TEXTS,
        "reasoning": TEXTS,
        "refusal": st.none() | TEXTS,
        "tool_calls": st.lists(CALLS, min_size=1, max_size=3, unique_by=lambda call: call["id"]),
    },
)
USAGES = st.none() | st.builds(
    lambda prompt, completion, cost: {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        **({} if cost is None else {"cost": cost}),
    },
    st.integers(0, 10**6),
    st.integers(0, 10**6),
    st.none() | st.floats(0, 100),
)
DOCUMENTS = st.builds(
    lambda message, finish, usage: {
        "id": "gen-1",
        "model": "a/b",
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        **({} if usage is None else {"usage": usage}),
    },
    MESSAGES,
    st.sampled_from(["stop", "length", "tool_calls", "content_filter", "error"]),
    USAGES,
)


def read(body: bytes) -> Attempt:
    return ADAPTERS["openrouter"].read_reply(
        200, {"x-generation-id": "gen-1"}, body, model="a/b", latency_ms=1, now_s=0, max_tokens=100
    )


def pieces(text: str, data: st.DataObject) -> list[str]:
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    return [text[start:end] for start, end in pairwise([0, *places, len(text)])]


@given(DOCUMENTS, st.data())
def test_stream_reads_as_the_plain_reply(document: dict[str, Any], data: st.DataObject) -> None:
    plain = json.dumps(document, ensure_ascii=data.draw(st.booleans())).encode()
    events = as_events(plain, lambda text: pieces(text, data))
    assert events is not None
    if document["choices"][0]["finish_reason"] != "error" and data.draw(st.booleans()):
        events.remove(DONE)
    end = data.draw(st.sampled_from([b"\n", b"\r\n", b"\r"]))
    stream = b"".join(
        data.draw(st.sampled_from([b"", COMMENT])).replace(b"\n", end) + event.replace(b"\n", end) for event in events
    )
    assert read(stream) == read(plain)


def test_calls_without_an_index_are_told_apart_by_their_ids() -> None:
    """Gemini's server counts none; others give every call the index 0."""
    for index in ({}, {"index": 0}):
        deltas = [
            [{**index, "id": "a", "function": {"name": "f", "arguments": '{"x"'}}],
            [{**index, "function": {"arguments": ": 1}"}}],
            [{**index, "id": "b", "function": {"name": "g", "arguments": "{}"}}],
        ]
        parts: list[Any] = [{"choices": [{"delta": {"tool_calls": each}}]} for each in deltas]
        parts.append({"choices": [{"delta": {}, "finish_reason": "tool_calls"}]})
        calls = read(b"".join(b"data: %s\n\n" % json.dumps(part).encode() for part in parts)).tool_calls
        assert [(call["id"], call["function"]["name"], call["function"]["arguments"]) for call in calls] == [
            ("a", "f", '{"x": 1}'),
            ("b", "g", "{}"),
        ]


def test_old_function_call_is_put_together() -> None:
    deltas = [{"name": "f", "arguments": ""}, {"arguments": '{"x"'}, {"arguments": ": 1}"}]
    parts: list[Any] = [{"choices": [{"delta": {"function_call": each}}]} for each in deltas]
    parts.append({"choices": [{"delta": {}, "finish_reason": "function_call"}]})
    (call,) = read(b"".join(b"data: %s\n\n" % json.dumps(part).encode() for part in parts)).tool_calls
    assert call["function"] == {"name": "f", "arguments": '{"x": 1}'}


def test_error_in_mid_stream_is_an_error() -> None:
    body = (
        b'data: {"id": "gen-1", "choices": [{"delta": {"content": "Hel"}}]}\n\n'
        b'data: {"id": "gen-1", "error": {"code": 524, "message": "late"}, "choices": []}\n\n'
    )
    attempt = read(body)
    assert (attempt.outcome, attempt.charge, attempt.content) == ("provider_error", "unknown", "Hel")
