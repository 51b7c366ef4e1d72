"""Translates the chunks of a chat completion's stream into the events of Anthropic's Messages.

Order: `message_start`, `ping`; for each block `content_block_start`, its deltas, `content_block_stop`; then
`message_delta` with the stop reason and the usage, and `message_stop`.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final, assert_never

from tollbook.gateway.messages.document import (
    begun_message,
    block_of,
    error_body,
    id_stem,
    image_text,
    model_of,
    stop_fields,
    usage_of,
)
from tollbook.gateway.reasoning_details import pack
from tollbook.gateway.request_fields import Table
from tollbook.gateway.segments import Closed, Grown, Opened, Segment, Segments, Step
from tollbook.gateway.sse import event_bytes
from tollbook.schemas.results import InferenceResult
from tollbook.schemas.usage import Usage

# The status that an error would have had before the stream began; any other code is a server error.
_STATUSES: Final = {
    "plan_limit_reached": 402, "budget_wait_timeout": 429, "price_unknown": 400, "invalid_task": 400,
    "ledger_unavailable": 503,
}  # fmt: skip
_FAILED: Final = 500
_NOT_IN_A_DELTA: Final = frozenset({"cache_creation", "service_tier"})


class Events:
    """Translates one answer. Call `begin`, then `delta` for each chunk, then `end` or `error`, once."""

    def __init__(self, *, message_id: str, body: Mapping[str, Any] | None = None, input_tokens: int = 0) -> None:
        """Prepare the events of an answer to a request with this body.

        `input_tokens` is an estimate that clients show while they wait; the last event corrects it.
        """
        self._message = begun_message(message_id, model_of(body))
        self._input_tokens = input_tokens
        self._segments = Segments(id_stem(message_id))

    def begin(self) -> list[bytes]:
        """Return the events before the content."""
        usage = usage_of(Usage(prompt_tokens=self._input_tokens))
        return [_event("message_start", {"message": {**self._message, "usage": usage}}), *self.ping()]

    def ping(self) -> list[bytes]:
        """Return an event that keeps the connection alive; it may be sent between any two others."""
        return [_event("ping", {})]

    def delta(self, chunk: Mapping[str, Any]) -> list[bytes]:
        """Return the events of a chunk of a chat completion; often none."""
        return list(_events_of(self._segments.add(chunk)))

    def end(self, result: InferenceResult) -> list[bytes]:
        """Return the last events: content that no chunk had, the stop reason, and the usage."""
        usage = usage_of(result.usage or Usage(prompt_tokens=self._input_tokens))
        told = {name: count for name, count in usage.items() if name not in _NOT_IN_A_DELTA}
        return [
            *_events_of(self._segments.finish(result)),
            _event("message_delta", {"delta": stop_fields(result), "usage": told}),
            _event("message_stop", {}),
        ]

    def error(self, code: str, message: str) -> list[bytes]:
        """Return the last event of an incomplete answer: SDKs raise an exception for it."""
        return [event_bytes("error", error_body(_STATUSES.get(code, _FAILED), code, message))]


def _event(name: str, data: Table) -> bytes:
    return event_bytes(name, {"type": name, **data})


def _events_of(steps: Iterable[Step]) -> Iterable[bytes]:
    for step in steps:
        match step:
            case Opened(segment, index):
                begun = Segment(segment.kind, call_id=segment.call_id, name=segment.name)
                yield _event("content_block_start", {"index": index, "content_block": block_of(begun)})
            case Grown(segment, index, text):
                if not segment.is_custom:
                    yield _event("content_block_delta", {"index": index, "delta": _delta(segment, text)})
            case Closed(segment, index):
                last = _last_delta(segment)
                if last:
                    yield _event("content_block_delta", {"index": index, "delta": last})
                yield _event("content_block_stop", {"index": index})
            case _:
                assert_never(step)


def _last_delta(segment: Segment) -> Table | None:
    """Return the delta that is known only when a block is complete."""
    if segment.is_custom:
        return _delta(segment, json.dumps({"input": segment.text}))
    signature = pack(segment.details)
    return {"type": "signature_delta", "signature": signature} if signature else None


def _delta(segment: Segment, text: str) -> Table:
    match segment.kind:
        case "reasoning":
            return {"type": "thinking_delta", "thinking": text}
        case "content" | "refusal":
            return {"type": "text_delta", "text": text}
        case "image":
            return {"type": "text_delta", "text": image_text(text)}
        case "call":
            return {"type": "input_json_delta", "partial_json": text}
        case _:
            assert_never(segment.kind)
