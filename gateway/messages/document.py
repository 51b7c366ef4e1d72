"""Complete answers and errors in the format of Anthropic's Messages."""

import json
from collections.abc import Mapping
from typing import Any, Final, assert_never, cast

from tollbook.gateway.reasoning_details import pack
from tollbook.gateway.request_fields import Table
from tollbook.gateway.segments import Segment, segments_of
from tollbook.schemas.results import InferenceResult
from tollbook.schemas.usage import Usage

_ID_PREFIX: Final = "msg_"
_STOP_REASONS: Final = {"length": "max_tokens", "tool_calls": "tool_use", "content_filter": "refusal"}
# platform.claude.com/docs/en/api/errors, November 2026. Anthropic does not use 503; it means "try again", like 529.
_ERROR_TYPES: Final = {
    400: "invalid_request_error", 401: "authentication_error", 402: "billing_error", 403: "permission_error",
    404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error",
    504: "timeout_error", 529: "overloaded_error",
}  # fmt: skip
_FIRST_SERVER_ERROR: Final = 500
THREAD_REFUSED: Final = "thread_unsupported_request"
"""Anthropic's error code after which the tool runners of its SDKs send the whole conversation.

anthropic 2.14 and @anthropic-ai/sdk 1.14, November 2026: they ask for a thread first, and read `error.details`.
"""


def document(result: InferenceResult, *, message_id: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the complete answer to a request with this body. `message_id` is unique."""
    segments = segments_of(result, id_stem(message_id))
    return {
        **begun_message(message_id, result.model_used or model_of(body)),
        "content": [block_of(segment) for segment in segments],
        **stop_fields(result),
        "usage": usage_of(result.usage or Usage()),
    }


def id_stem(message_id: str) -> str:
    """Return the stem from which tool calls without an id get one."""
    return message_id.removeprefix(_ID_PREFIX)


def model_of(body: Mapping[str, Any] | None) -> str:
    """Return the model that a request names."""
    model = (body or {}).get("model")
    return model if isinstance(model, str) else ""


def begun_message(message_id: str, model: str) -> Table:
    """Return an answer without content."""
    return {
        "id": message_id,
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "stop_details": None,
    }


def block_of(segment: Segment) -> Table:
    """Return a segment as a content block. A refusal is text; the stop reason distinguishes it from other text."""
    match segment.kind:
        case "reasoning":
            return {"type": "thinking", "thinking": segment.text, "signature": pack(segment.details)}
        case "content" | "refusal":
            return {"type": "text", "text": segment.text}
        case "image":
            return {"type": "text", "text": image_text(segment.text)}
        case "call":
            return {"type": "tool_use", "id": segment.call_id, "name": segment.name, "input": _input(segment)}
        case _:
            assert_never(segment.kind)


def image_text(address: str) -> str:
    """Return an image as text, because Anthropic's answers have no images; '' if its address is not known yet."""
    return f"![image]({address})" if address else ""


def stop_fields(result: InferenceResult) -> Table:
    """Return why the model stopped. A stop sequence is reported as `end_turn`: which one it was is unknown."""
    reason = _STOP_REASONS.get(result.finish_reason or "")
    if reason is None and result.refusal:
        reason = "refusal"
    if reason is None:
        reason = "tool_use" if result.tool_calls else "end_turn"
    details = {"type": "refusal", "category": None, "explanation": result.refusal} if reason == "refusal" else None
    return {"stop_reason": reason, "stop_sequence": None, "stop_details": details}


def usage_of(usage: Usage) -> Table:
    """Return usage as Anthropic counts it: `input_tokens` excludes tokens read from a cache or written to it."""
    long = usage.cache_write_1h_tokens
    return {
        "input_tokens": max(0, usage.prompt_tokens - usage.cached_tokens - usage.cache_write_tokens),
        "cache_creation_input_tokens": usage.cache_write_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation": {
            "ephemeral_5m_input_tokens": max(0, usage.cache_write_tokens - long),
            "ephemeral_1h_input_tokens": long,
        },
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
        "service_tier": "standard",
    }


def error_body(status: int, code: str, message: str, metadata: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return an error in Anthropic's format, for a response with this status, plus our own code and metadata."""
    default = "api_error" if status >= _FIRST_SERVER_ERROR else "invalid_request_error"
    error: Table = {"type": _ERROR_TYPES.get(status, default), "message": message, "code": code}
    if code == THREAD_REFUSED:
        error["details"] = {"error_code": code}
    return {"type": "error", "error": {**error, "metadata": dict(metadata)} if metadata else error}


def _input(segment: Segment) -> Table:
    """Return arguments as an object. Other arguments, such as those of a truncated call, are wrapped in one."""
    if segment.is_custom:
        return {"input": segment.text}
    try:
        value: object = json.loads(segment.text) if segment.text.strip() else {}
    except (ValueError, RecursionError):
        value = segment.text
    return cast("Table", value) if isinstance(value, dict) else {"input": value}
