"""Streams of very many parts: the time is linear in their length, since the event loop serves all calls."""

import json
import time
from collections.abc import Callable
from typing import Any, Final

import pytest

from tests.quick import first_quick
from tollbook.gateway.segments import Segments
from tollbook.inference.providers.bodies import Body

PARTS: Final = 10_000
# It takes less than a second. If each part scanned all parts before it, it would take more than half a minute.
MOST_S: Final = 8.0


def delta(**said: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": said}]}


def call(arguments: str = "{}", **members: Any) -> dict[str, Any]:
    return delta(tool_calls=[{**members, "function": {"name": "f", "arguments": arguments}}])


def detail(**members: Any) -> dict[str, Any]:
    return delta(reasoning_details=[{"type": "reasoning.text", "text": "a", **members}])


KINDS: Final[dict[str, Callable[[int], dict[str, Any]]]] = {
    "calls with an index and an id each": lambda i: call(index=i, id=f"c{i}"),
    "calls of one index with an id each": lambda i: call(index=0, id=f"c{i}"),
    "calls with an id each": lambda i: call(id=f"c{i}"),
    "calls with neither": lambda _: call(),
    "named parts of one call": lambda i: call("xxxxxxxx" if i else '{"a": "'),
    "parts that look like an end": lambda i: call("}" if i else '{"a": "'),
    "older calls": lambda i: delta(function_call={"name": "f", "arguments": "x" if i else '{"a": "'}),
    "details with an index each": lambda i: detail(index=i, signature="s"),
    "details with an id each": lambda i: detail(id=f"r{i}"),
    "texts and details in turn": lambda i: detail(index=i, signature="s") if i % 2 else delta(content="a"),
    "choices": lambda i: {"choices": [{"index": i, "delta": {"content": "a"}}]},
    "log probabilities": lambda _: {
        "choices": [{"delta": {"content": "a"}, "logprobs": {"content": [{"token": "a", "logprob": -1}]}}]
    },
    "images": lambda _: delta(images=[{"type": "image_url", "image_url": {"url": "data:,"}}]),
    "usages": lambda i: {**delta(content="a"), "usage": {"prompt_tokens": 1, "completion_tokens": i}},
    "texts of another API": lambda i: {"type": "response.output_text.delta", "output_index": i, "delta": "a"},
    "blocks of another API": lambda i: {
        "type": "content_block_start",
        "index": i,
        "content_block": {"type": "tool_use", "id": f"t{i}", "name": "f", "input": {}},
    },
}


@pytest.mark.parametrize("kind", first_quick(2, KINDS))
def test_the_time_for_many_parts_grows_in_proportion_to_their_length(kind: str) -> None:
    events = [b"data: %s\n\n" % json.dumps(KINDS[kind](number)).encode() for number in range(PARTS)]
    began, body, segments = time.process_time(), Body(), Segments("s")
    for event in events:
        for passed in body.feed(event):
            segments.add(passed)
    body.end()
    assert body.document is not None
    assert time.process_time() - began < MOST_S
