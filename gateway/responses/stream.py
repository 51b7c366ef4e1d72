"""Translates the chunks of a chat completion's stream into the events of Responses.

Order: `response.created`, `response.in_progress`; for each item `output_item.added`, its parts with their deltas,
`output_item.done`; then `response.completed`, `response.incomplete` or `response.failed`. Numbered from 0.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, assert_never

from tollbook.gateway.request_fields import Table
from tollbook.gateway.responses.document import begun_document, ended_document, id_stem, items_of
from tollbook.gateway.responses.output import (
    custom_input,
    is_custom,
    item_id_of,
    item_of,
    opened_item,
    part_of,
    summary_part,
)
from tollbook.gateway.responses.tools import ToolNames
from tollbook.gateway.segments import Closed, Grown, Opened, Segment, Segments, Step
from tollbook.gateway.sse import event_bytes
from tollbook.schemas.results import InferenceResult

# The error in a response has one of OpenAI's codes; the event `error` has our own code.
_CODES: Final = {"budget_wait_timeout": "rate_limit_exceeded", "invalid_task": "invalid_prompt"}
_SERVER_ERROR: Final = "server_error"
_Event = tuple[str, Table]


class Events:
    """Translates one answer. Call `begin`, then `delta` for each chunk, then `end` or `error`, once."""

    def __init__(self, *, response_id: str, created_s: int, body: Mapping[str, Any] | None = None) -> None:
        """Prepare the events of an answer to a request with this body. Units: `created_s` seconds since the epoch."""
        self._body = body or {}
        self._stem = id_stem(response_id)
        self._begun = begun_document(response_id=response_id, created_s=created_s, body=self._body)
        self._names = ToolNames(self._body)
        self._segments = Segments(self._stem)
        self._sequence_number = 0

    def begin(self) -> list[bytes]:
        """Return the events before the content."""
        return self._numbered(
            [("response.created", {"response": self._begun}), ("response.in_progress", {"response": self._begun})]
        )

    def delta(self, chunk: Mapping[str, Any]) -> list[bytes]:
        """Return the events of a chunk of a chat completion; often none."""
        return self._numbered(self._events_of(self._segments.add(chunk)))

    def end(self, result: InferenceResult) -> list[bytes]:
        """Return the last events: content that no chunk had, and the complete answer with its usage."""
        events = [*self._events_of(self._segments.finish(result))]
        ended = ended_document(self._begun, result, self._items())
        return self._numbered([*events, (f"response.{ended['status']}", {"response": ended})])

    def error(self, code: str, message: str) -> list[bytes]:
        """Return the last events of an incomplete answer.

        OpenAI sends `response.failed`. SDKs raise an exception only for the event `error`, and read its message in one
        of two places.
        """
        # The last segment was not finished.
        for segment in self._segments.all[-1:]:
            segment.is_cut = True
        error = {"code": _CODES.get(code, _SERVER_ERROR), "message": message}
        failed = {**self._begun, "status": "failed", "error": error, "output": self._items()}
        words = {"code": code, "message": message, "param": None}
        return self._numbered(
            [("response.failed", {"response": failed}), ("error", {**words, "error": {"type": _SERVER_ERROR, **words}})]
        )

    def _items(self) -> list[Table]:
        return items_of(self._segments.all, self._stem, self._body)

    def _numbered(self, events: Iterable[_Event]) -> list[bytes]:
        made: list[bytes] = []
        for name, data in events:
            made.append(event_bytes(name, {"type": name, "sequence_number": self._sequence_number, **data}))
            self._sequence_number += 1
        return made

    def _events_of(self, steps: Iterable[Step]) -> Iterable[_Event]:
        for step in steps:
            match step:
                case Opened(segment, index):
                    item = opened_item(segment, stem=self._stem, names=self._names)
                    yield "response.output_item.added", {"output_index": index, "item": item}
                    yield from self._of_item(index, segment, _opened)
                case Grown(segment, index):
                    if segment.kind != "call" or segment.is_custom or not is_custom(segment, self._names):
                        yield from self._of_item(index, segment, lambda _segment, step=step: _grown(step))
                case Closed(segment, index):
                    yield from self._of_item(index, segment, self._closed)
                    item = item_of(segment, stem=self._stem, names=self._names)
                    yield "response.output_item.done", {"output_index": index, "item": item}
                case _:
                    assert_never(step)

    def _of_item(self, index: int, segment: Segment, events: Callable[[Segment], Iterable[_Event]]) -> Iterable[_Event]:
        item_id = item_id_of(segment, stem=self._stem, names=self._names)
        return [(name, {"item_id": item_id, "output_index": index, **data}) for name, data in events(segment)]

    def _closed(self, segment: Segment) -> Iterable[_Event]:
        if segment.kind == "call" and is_custom(segment, self._names):
            text = custom_input(segment)
            if not segment.is_custom and text:
                # From a function's arguments, which can be parsed only when they are complete.
                yield "response.custom_tool_call_input.delta", {"delta": text}
            yield "response.custom_tool_call_input.done", {"input": text}
            return
        if segment.kind == "call":
            name = self._names.of(segment.name).name
            yield "response.function_call_arguments.done", {"name": name, "arguments": segment.text}
            return
        yield from _done(segment)


def _opened(segment: Segment) -> Iterable[_Event]:
    match segment.kind:
        case "content" | "refusal":
            yield "response.content_part.added", {"content_index": 0, "part": part_of(segment, "")}
        case "image":
            yield "response.image_generation_call.in_progress", {}
        case "reasoning" | "call":
            return
        case _:
            assert_never(segment.kind)


def _grown(step: Grown) -> Iterable[_Event]:
    segment, text = step.segment, step.text
    match segment.kind:
        case "reasoning":
            if step.is_first:  # Encrypted reasoning has no part at all.
                yield "response.reasoning_summary_part.added", {"summary_index": 0, "part": summary_part("")}
            yield "response.reasoning_summary_text.delta", {"summary_index": 0, "delta": text}
        case "content":
            yield "response.output_text.delta", {"content_index": 0, "delta": text, "logprobs": []}
        case "refusal":
            yield "response.refusal.delta", {"content_index": 0, "delta": text}
        case "image":
            return
        case "call" if segment.is_custom:
            yield "response.custom_tool_call_input.delta", {"delta": text}
        case "call":
            yield "response.function_call_arguments.delta", {"delta": text}
        case _:
            assert_never(segment.kind)


def _done(segment: Segment) -> Iterable[_Event]:
    text = segment.text
    match segment.kind:
        case "reasoning" if not text:
            return
        case "reasoning":
            yield "response.reasoning_summary_text.done", {"summary_index": 0, "text": text}
            yield "response.reasoning_summary_part.done", {"summary_index": 0, "part": summary_part(text)}
        case "content":
            yield "response.output_text.done", {"content_index": 0, "text": text, "logprobs": []}
            yield "response.content_part.done", {"content_index": 0, "part": part_of(segment, text)}
        case "refusal":
            yield "response.refusal.done", {"content_index": 0, "refusal": text}
            yield "response.content_part.done", {"content_index": 0, "part": part_of(segment, text)}
        case "image":
            yield "response.image_generation_call.completed", {}
        case "call":
            return
        case _:
            assert_never(segment.kind)
