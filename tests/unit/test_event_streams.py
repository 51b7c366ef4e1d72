"""Event streams: however a completion is cut into parts, it reads as the plain reply does."""

import json
from collections.abc import Iterable
from dataclasses import fields
from itertools import pairwise
from typing import Any, AnyStr

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.replies import chat_request, reply_of
from tollbook.inference.attempts import Attempt
from tollbook.inference.deltas import Delta
from tollbook.inference.providers.bodies import Body
from tollbook.inference.providers.dialects import ADAPTERS
from tollbook.standin.event_streams import COMMENT, DONE, as_events
from tollbook.standin.message_events import as_event, as_message_events

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


def reasoning_of(message: dict[str, Any]) -> dict[str, str]:
    """Return the reasoning of a message, which its details say too where they have words."""
    words = "".join(detail.get("text", "") for detail in message.get("reasoning_details", ()))
    return {"reasoning": words} if words and "reasoning" in message else {}


DETAILS = st.lists(
    st.fixed_dictionaries(
        {"type": st.just("reasoning.text"), "text": TEXTS, "format": st.just("f")},
        optional={"signature": TEXTS, "id": st.none() | st.just("rs_1")},
    )
    | st.fixed_dictionaries({"type": st.just("reasoning.encrypted"), "data": TEXTS}),
    max_size=3,
).map(lambda details: [{**detail, "index": index} for index, detail in enumerate(details)])
MESSAGES = st.fixed_dictionaries(
    {"role": st.just("assistant")},
    optional={
        "content": st.none() | TEXTS,
        "reasoning": TEXTS,
        "reasoning_details": DETAILS,
        "refusal": st.none() | TEXTS,
        "tool_calls": st.lists(CALLS, min_size=1, max_size=3, unique_by=lambda call: call["id"]),
    },
)
MESSAGES = MESSAGES.map(lambda message: {**message, **reasoning_of(message)})
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
    reply = reply_of(body, headers={"x-generation-id": "gen-1"})
    return ADAPTERS["openrouter"].read_reply(reply, chat_request("a/b", 100))


def pieces(text: AnyStr, data: st.DataObject, most: int = 5) -> list[AnyStr]:
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=most)))
    return [text[start:end] for start, end in pairwise([0, *places, len(text)])]


def received(parts: Iterable[bytes]) -> tuple[Body, list[Delta]]:
    body = Body()
    deltas = [delta for part in parts for delta in body.feed(part)]
    return body, [*deltas, *body.end()]


def joined(deltas: Iterable[Delta]) -> dict[str, Any]:
    """Join deltas as the client libraries of OpenAI's API do: texts go on, tool calls by their index."""
    said: dict[str, Any] = {"content": "", "reasoning": "", "refusal": "", "finish_reason": None}
    calls: dict[int, dict[str, Any]] = {}
    details: dict[int, dict[str, Any]] = {}
    for delta in deltas:
        (choice,) = delta["choices"]
        assert json.dumps(choice).encode()
        for name, value in choice["delta"].items():
            if name == "tool_calls":
                for part in value:
                    call = calls.setdefault(part["index"], {"function": {"arguments": ""}})
                    call |= {key: each for key, each in part.items() if key not in ("index", "function")}
                    function = {**part.get("function", {})}
                    call["function"]["arguments"] += function.pop("arguments", "")
                    call["function"] |= function
            elif name == "reasoning_details":
                for part in value:
                    detail = details.setdefault(part["index"], {})
                    text = {"text": detail.get("text", "") + part["text"]} if "text" in part else {}
                    detail |= {**part, **text}
            else:
                said[name] += value
        assert choice["finish_reason"] is None or said["finish_reason"] is None
        said["finish_reason"] = choice["finish_reason"] or said["finish_reason"]
    listed = {"tool_calls": calls, "reasoning_details": details}
    return {**said, **{name: [found[index] for index in sorted(found)] for name, found in listed.items()}}


def assert_joined_are(deltas: Iterable[Delta], attempt: Attempt) -> None:
    found = joined(deltas)
    for name in ("content", "reasoning", "refusal"):
        assert found[name] == (getattr(attempt, name) or "")
    assert found["tool_calls"] == list(attempt.tool_calls)
    assert found["reasoning_details"] == list(attempt.reasoning_details)
    assert found["finish_reason"] in (attempt.finish_reason, None)


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
    _, deltas = received(pieces(stream, data, 20))
    if document["choices"][0]["finish_reason"] != "error":
        assert_joined_are(deltas, read(plain))


FRAGMENTS = [
    b"data:", b"data: ", b"event: x", b": hm", b"\n", b"\r\n", b"\r", b"\n\n", b"\xef\xbb\xbf", b" ", b"[DONE]", b"{",
    b"}", b"null", b"\xe2\x82", b'{"id": "a",', b' "id": "b"}', b'{"usage": {"cost": 1}}', b'{"type": "message_stop"}',
    b'{"error": {"code": 502}}', b'data: {"choices": [{"text": "t"}]}\n',
    '{"choices": [{"delta": {"content": "h\u00e9"}}]}'.encode(),
    b'{"choices": [{"delta": {"content": "\\ud83d"}}]}',
    b'{"choices": [{"delta": {"content": "\\ude00"}, "finish_reason": "stop"}]}',
]  # fmt: skip


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=14).map(b"".join), st.data())
def test_a_stream_reads_the_same_however_it_is_split(stream: bytes, data: st.DataObject) -> None:
    whole, whole_deltas = received([stream])
    body, deltas = received(pieces(stream, data, 20))
    assert deltas == whole_deltas
    assert (body.document, body.is_cut_off, body.raw) == (whole.document, whole.is_cut_off, whole.raw)
    attempt = read(stream)
    if attempt.is_ok and deltas:
        assert_joined_are(deltas, attempt)


@given(
    st.lists(st.tuples(st.sampled_from(["text", "thinking", "redacted_thinking", "tool_use"]), TEXTS), max_size=4),
    st.data(),
)
def test_events_of_anthropics_read_as_the_plain_message(blocks: list[tuple[str, str]], data: st.DataObject) -> None:
    content: list[dict[str, Any]] = []
    for number, (kind, text) in enumerate(blocks):
        if kind == "tool_use":
            given_input = {"text": text} if text else {}
            content.append({"type": kind, "id": f"toolu_{number}", "name": "f", "input": given_input})
        elif kind == "redacted_thinking":
            content.append({"type": kind, "data": text})
        else:
            signature = {"signature": data.draw(TEXTS)} if kind == "thinking" else {}
            content.append({"type": kind, kind: text, **signature})
    message = {
        "id": "msg_1", "type": "message", "role": "assistant", "model": "claude-x", "content": content,
        "stop_reason": data.draw(st.sampled_from(["end_turn", "max_tokens", "tool_use", "refusal"])),
        "stop_sequence": None, "usage": {"input_tokens": 10, "output_tokens": 50, "cache_read_input_tokens": 3},
    }  # fmt: skip
    plain = json.dumps(message).encode()
    events = as_message_events(plain, lambda text: pieces(text, data))
    assert events is not None
    expected = read_of_anthropic(plain)
    assert_same(read_of_anthropic(b"".join(events)), expected)
    _, deltas = received(pieces(b"".join(events), data, 20))
    assert_joined_are(deltas, read_of_anthropic(b"".join(events)))


def read_of_anthropic(body: bytes) -> Attempt:
    return ADAPTERS["anthropic"].read_reply(reply_of(body), chat_request("claude-x", 100))


def assert_same(streamed: Attempt, plain: Attempt) -> None:
    """Assert that two attempts are the same but for the white space in the arguments of tool calls."""
    for each in fields(Attempt):
        found, expected = (getattr(attempt, each.name) for attempt in (streamed, plain))
        if each.name == "tool_calls":
            found, expected = ([(call["id"], json.loads(call["function"]["arguments"])) for call in calls]
                               for calls in (found, expected))  # fmt: skip
        assert found == expected


@pytest.mark.parametrize("ended_by", ["the end", "an error"])
def test_usage_of_a_message_that_breaks_off_is_not_all_that_was_generated(ended_by: str) -> None:
    """G3: `message_start` has one token of the output."""
    start = {"type": "message_start", "message": {"usage": {"input_tokens": 10, "output_tokens": 1}}}
    delta = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hel"}}
    events = [start, delta]
    if ended_by == "an error":
        events.append({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}})
    attempt = read_of_anthropic(b"".join(as_event(event) for event in events))
    assert (attempt.is_ok, attempt.charge, attempt.usage, attempt.content) == (False, "unknown", None, "Hel")


def test_error_is_not_passed_on_nor_what_comes_after_it() -> None:
    events: list[dict[str, Any]] = [{"choices": [{"delta": {"content": text}}]} for text in ("a", "b", "c")]
    events[1] |= {"error": {"code": 502, "message": "late"}}
    _, deltas = received(b"data: %s\n\n" % json.dumps(event).encode() for event in events)
    assert [delta["choices"][0]["delta"] for delta in deltas] == [{"content": "a"}]


def test_bytes_of_a_stream_are_not_kept() -> None:
    body = Body()
    for number in range(3):
        body.feed(b'data: {"choices": [{"delta": {"content": "%d"}}]}\n\n' % number)
        assert body.raw == b""
    assert body.document == {"choices": [{"message": {"content": "012"}}]}


def test_log_probabilities_are_joined_and_passed_on() -> None:
    first, second = ({"content": [{"token": text, "logprob": -0.5}]} for text in ("a", "b"))
    parts: list[Any] = [
        {"choices": [{"delta": {"content": "a"}, "logprobs": first}]},
        {"choices": [{"delta": {"content": "b"}, "logprobs": second, "finish_reason": "stop"}]},
    ]
    stream = b"".join(b"data: %s\n\n" % json.dumps(part).encode() for part in parts)
    assert [delta["choices"][0]["logprobs"] for delta in received([stream])[1]] == [first, second]
    assert read(stream).logprobs == {"content": [*first["content"], *second["content"]]}


def test_long_calls_with_neither_index_nor_id_are_told_apart() -> None:
    arguments = json.dumps({"rows": [{"n": number} for number in range(5_000)]})
    parts = [arguments[start : start + 7] for start in range(0, len(arguments), 7)]
    chunks = [
        {"choices": [{"delta": {"tool_calls": [{"function": {"name": name, "arguments": part}}]}}]}
        for name in ("f", "g")
        for part in parts
    ]
    body, _ = received(b"data: %s\n\n" % json.dumps(chunk).encode() for chunk in chunks)
    assert body.document is not None
    (choice,) = body.document["choices"]
    called = [call["function"] for call in choice["message"]["tool_calls"]]
    assert called == [{"name": name, "arguments": arguments} for name in ("f", "g")]


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
