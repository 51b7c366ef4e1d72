"""Complete answers and errors in the format of Responses."""

from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

from tollbook.gateway.request_fields import Table
from tollbook.gateway.responses.output import ID_PREFIX, item_of
from tollbook.gateway.responses.tools import ToolNames
from tollbook.gateway.segments import Segment, segments_of
from tollbook.schemas.results import InferenceResult
from tollbook.schemas.usage import Usage

_INCOMPLETE: Final = {"length": "max_output_tokens", "content_filter": "content_filter"}
# OpenAI's error types by status; any other 4xx is an invalid request.
_ERROR_TYPES: Final = {
    401: "authentication_error", 402: "insufficient_quota", 403: "permission_error", 404: "not_found_error",
    409: "conflict_error", 429: "rate_limit_error",
}  # fmt: skip
_FIRST_SERVER_ERROR: Final = 500
# Fields of the request that the answer repeats, as OpenAI's does, with their defaults.
_REPEATED: Final[Mapping[str, Any]] = {
    "instructions": None, "max_output_tokens": None, "max_tool_calls": None, "metadata": {},
    "parallel_tool_calls": True, "prompt_cache_key": None, "reasoning": {"effort": None, "summary": None},
    "safety_identifier": None, "temperature": None, "text": {"format": {"type": "text"}}, "tool_choice": "auto",
    "top_p": None, "user": None,
}  # fmt: skip


def document(
    result: InferenceResult, *, response_id: str, created_s: int, body: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the complete answer to a request with this body.

    `response_id` is unique; the ids of items are derived from it. Units: `created_s` seconds since the epoch.
    """
    stem = id_stem(response_id)
    begun = begun_document(response_id=response_id, created_s=created_s, body=body or {})
    return ended_document(begun, result, items_of(segments_of(result, stem), stem, body or {}))


def id_stem(response_id: str) -> str:
    """Return the stem of the ids of items."""
    return response_id.removeprefix(ID_PREFIX)


def items_of(segments: Sequence[Segment], stem: str, body: Mapping[str, Any]) -> list[Table]:
    """Return the items of an answer."""
    names = ToolNames(body)
    return [item_of(segment, stem=stem, names=names) for segment in segments]


def begun_document(*, response_id: str, created_s: int, body: Mapping[str, Any]) -> Table:
    """Return an answer that has just begun."""
    repeated = {name: _repeated(body.get(name), default) for name, default in _REPEATED.items()}
    return {
        "id": response_id,
        "object": "response",
        "created_at": created_s,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "model": body.get("model") or "",
        "output": [],
        "previous_response_id": None,
        "service_tier": "default",
        "store": False,
        "tools": [_repeated_tool(tool) for tool in body.get("tools") or ()],
        "top_logprobs": 0,
        "truncation": "disabled",
        "usage": None,
        **repeated,
    }


def ended_document(begun: Table, result: InferenceResult, items: list[Table]) -> Table:
    """Return a complete answer, with its items."""
    reason = _INCOMPLETE.get(result.finish_reason or "")
    ended: Table = {
        "status": "incomplete" if reason else "completed",
        "incomplete_details": {"reason": reason} if reason else None,
        "model": result.model_used or begun["model"],
        "output": items,
        "usage": None if result.usage is None else _usage(result.usage),
    }
    if not reason and result.finished_at_ms is not None:
        ended["completed_at"] = result.finished_at_ms // 1_000
    return {**begun, **ended}


def error_body(
    status: int, code: str, message: str, metadata: Mapping[str, Any] | None = None, *, param: str | None = None
) -> dict[str, Any]:
    """Return an error in OpenAI's format, for a response with this status."""
    kind = "server_error" if status >= _FIRST_SERVER_ERROR else _ERROR_TYPES.get(status, "invalid_request_error")
    error: Table = {"message": message, "type": kind, "param": param, "code": code}
    return {"error": {**error, "metadata": dict(metadata)} if metadata else error}


def _usage(usage: Usage) -> Table:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "cache_write_tokens": usage.cache_write_tokens,
        },
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.total_tokens,
    }


def _repeated(value: object, default: object) -> object:
    """Return a value of the request, completed with OpenAI's defaults."""
    if not isinstance(value, dict):
        return default if value is None else value
    added = cast("Table", default) if isinstance(default, dict) else {}
    return {**added, **cast("Table", value)}


def _repeated_tool(tool: object) -> object:
    """Return a tool as OpenAI repeats it: a function with all of its fields."""
    if not isinstance(tool, dict):
        return tool
    table = cast("Table", tool)
    given = {"description": None, "parameters": None, "strict": None} if table.get("type") == "function" else {}
    return {**given, **table}
