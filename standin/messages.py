"""Anthropic's Messages API of the stand-in: requests are checked, and replies made, as Anthropic does it.

A request that Anthropic would refuse (an unknown field, no `max_tokens`, a result of a tool that was not called) is
refused here too.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final, cast

from tollbook.standin.replies import BadRequest, CompletionRequest, filler, read_request
from tollbook.standin.scenarios import Scenario, Tokens

_FIELDS: Final = frozenset(
    {"model", "messages", "max_tokens", "system", "metadata", "stop_sequences", "temperature", "top_k", "top_p",
     "tools", "tool_choice", "thinking", "output_config", "service_tier", "cache_control", "stream"}
)  # fmt: skip
_ERROR_TYPES: Final = {
    400: "invalid_request_error", 401: "authentication_error", 402: "billing_error", 403: "permission_error",
    404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error", 529: "overloaded_error",
}  # fmt: skip
_STOP_REASONS: Final = {
    "length": "max_tokens", "MAX_TOKENS": "max_tokens", "tool_calls": "tool_use", "function_call": "tool_use",
    "tool_use": "tool_use", "content_filter": "refusal", "content_filter: RECITATION": "refusal",
}  # fmt: skip
_THOUGHTS: Final = ("thinking", "redacted_thinking")


def read_message_request(document: Any, models: Mapping[str, object]) -> CompletionRequest:
    """Parse a request as Anthropic would. Errors: BadRequest."""
    if not isinstance(document, dict):
        raise BadRequest(400, "the body is not a JSON object")
    body = cast("dict[str, Any]", document)
    for name in body:
        if name not in _FIELDS:
            raise BadRequest(400, f"{name}: Extra inputs are not permitted")
    if type(body.get("max_tokens")) is not int:
        raise BadRequest(400, "max_tokens: Field required")
    budget = body.get("thinking", {}).get("budget_tokens")
    if budget is not None and not 1024 <= budget < body["max_tokens"]:
        raise BadRequest(400, "thinking.budget_tokens must be at least 1024 and below max_tokens")
    turns = cast("list[dict[str, Any]]", body.get("messages") or [])
    _check_turns(turns)
    _check_thoughts(turns, has_budget=budget is not None)
    system = body.get("system", [])
    texts = [*([{"role": "system", "content": _text(system)}] if system else []), *map(_turn, turns)]
    user = body.get("metadata", {}).get("user_id", "")
    asked = {"model": body.get("model"), "messages": texts, "max_tokens": body["max_tokens"], "user": user}
    return read_request({**asked, "stream": body.get("stream", False)}, models)


def _check_turns(turns: list[dict[str, Any]]) -> None:
    called: set[str] = set()
    for number, turn in enumerate(turns):
        if turn.get("role") not in ("user", "assistant") or not turn.get("content"):
            raise BadRequest(400, f"messages.{number}: a message has a role and a content that is not empty")
        blocks = _blocks(turn["content"])
        if any(block.get("type") == "text" and not str(block.get("text", "")).strip() for block in blocks):
            raise BadRequest(400, f"messages.{number}: text content blocks must contain non-whitespace text")
        if any(block.get("type") == "thinking" and not block.get("signature") for block in blocks):
            raise BadRequest(400, f"messages.{number}: Invalid `signature` in `thinking` block")
        results = {str(block.get("tool_use_id")) for block in blocks if block.get("type") == "tool_result"}
        if results != called:
            raise BadRequest(400, f"messages.{number}: tool_use and tool_result blocks do not match")
        called = {str(block.get("id")) for block in blocks if block.get("type") == "tool_use"}


def _check_thoughts(turns: list[dict[str, Any]], *, has_budget: bool) -> None:
    for number, turn in enumerate(turns):
        if _blocks(turn["content"])[-1].get("type") in _THOUGHTS:
            raise BadRequest(400, f"messages.{number}: The final block in an assistant message cannot be `thinking`.")
    is_loop = any(block.get("type") == "tool_result" for block in _blocks(turns[-1]["content"])) if turns else False
    if has_budget and is_loop and _blocks(turns[-2]["content"])[0].get("type") not in _THOUGHTS:
        raise BadRequest(400, "Expected `thinking` or `redacted_thinking`, but found `tool_use`")


def _turn(turn: dict[str, Any]) -> dict[str, Any]:
    return {"role": turn["role"], "content": _text(turn["content"])}


def _blocks(content: object) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [cast("dict[str, Any]", block) for block in cast("list[object]", content) if isinstance(block, dict)]


def _text(content: object) -> str:
    """Return the text of a content; tool calls and their results count as text."""
    parts: list[str] = []
    for block in _blocks(content):
        match block.get("type"):
            case "text":
                parts.append(str(block.get("text", "")))
            case "tool_use":
                parts.append(json.dumps(block.get("input", {})))
            case "tool_result":
                parts.append(_text(block.get("content", [])))
            case _:
                pass
    return "\n".join(parts)


def message(asked: CompletionRequest, generation_id: str, _charged_nanousd: int, fault: str | None) -> bytes:
    """Return the body of a message, changed by the fault. Anthropic's replies have no cost."""
    if fault == "error_finish":
        return message_error(500, "provider failed")
    tokens = Tokens(asked.model, asked.prompt_tokens, asked.completion_tokens)
    stop_reason = "max_tokens" if asked.is_cut else "end_turn"
    document = _document(generation_id, tokens, [{"type": "text", "text": filler(asked)}], stop_reason)
    if fault == "missing_usage":
        del document["usage"]
    return json.dumps(document).encode()


def scenario_message(scenario: Scenario, tokens: Tokens, generation_id: str, text: str) -> bytes:
    """Return a scenario's reply as a message: the same answer, with its tokens in Anthropic's form."""
    if scenario.error is not None:
        return scenario.error if isinstance(scenario.error, bytes) else message_error(scenario.status, "as asked for")
    played = json.loads(replace(scenario, wrap=None).body(tokens, generation_id, text))
    blocked = {"finish_reason": "content_filter" if "promptFeedback" in played else "stop"}
    choice = (played["choices"] or [blocked])[0]
    said = cast("dict[str, Any]", choice.get("message") or {})
    finish = str(choice.get("finish_reason"))
    document = _document(generation_id, tokens, list(_content(said)), _STOP_REASONS.get(finish, "end_turn"))
    body = json.dumps(document).encode()
    try:
        return scenario.wrap(body) if scenario.wrap is not None else body
    except KeyError:  # The wrapper makes a stream of chat chunks, which does not fit a message.
        return body


def _content(said: Mapping[str, Any]) -> list[dict[str, Any]]:
    blocks = _thoughts(said)
    content = said.get("content") or said.get("refusal")
    if isinstance(content, str):
        blocks.append({"type": "text", "text": content})
    elif isinstance(content, list):
        for part in cast("list[dict[str, Any]]", content):
            text = part.get("text") or part.get("refusal")
            blocks.append(part if text is None else {"type": "text", "text": text})
    for call in said.get("tool_calls", [{"function": said["function_call"]}] if "function_call" in said else []):
        try:
            arguments = json.loads(call["function"]["arguments"])
        except ValueError:
            arguments = {}
        blocks.append({"type": "tool_use", "id": "toolu_1", "name": call["function"]["name"], "input": arguments})
    return blocks


def _thoughts(said: Mapping[str, Any]) -> list[dict[str, Any]]:
    if details := said.get("reasoning_details"):
        return [
            {"type": "thinking", "thinking": each["text"], "signature": each["signature"]}
            if each["type"] == "reasoning.text"
            else {"type": "redacted_thinking", "data": each["data"]}
            for each in details
        ]
    names = [name for name in ("reasoning", "reasoning_content") if said.get(name)]
    return [{"type": "thinking", "thinking": said[name], "signature": "c2lnbmVk"} for name in names]


def _document(generation_id: str, tokens: Tokens, content: list[dict[str, Any]], stop_reason: str) -> dict[str, Any]:
    return {
        "id": f"msg_{generation_id}",
        "type": "message",
        "role": "assistant",
        "model": tokens.model,
        "content": content,
        "stop_reason": stop_reason,
        "stop_sequence": None,
        "usage": {
            "input_tokens": tokens.fresh,
            "cache_creation_input_tokens": tokens.written,
            "cache_read_input_tokens": tokens.cached,
            "cache_creation": {"ephemeral_5m_input_tokens": tokens.written, "ephemeral_1h_input_tokens": 0},
            "output_tokens": tokens.completion,
            "service_tier": "standard",
        },
    }


def message_error(code: int, text: str, _metadata: Mapping[str, Any] | None = None) -> bytes:
    """Return the body of an error."""
    kind = _ERROR_TYPES.get(code, "api_error")
    return json.dumps({"type": "error", "error": {"type": kind, "message": text}}).encode()
