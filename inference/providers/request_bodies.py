"""Bodies of requests: a completion as each kind of provider wants to be asked for it."""

import json
from typing import Any, Final, cast

from tollbook.inference.attempts import ChatRequest, EmbeddingsRequest
from tollbook.inference.bounds import Bound
from tollbook.schemas.messages import Message
from tollbook.schemas.money import usd_from_nanousd

# OpenRouter's replies have them, and it takes them back; strict servers refuse a request with them.
_FOR_OPENROUTER: Final = ("annotations", "images")
# Further fields that OpenAI's own API refuses.
_NOT_FOR_OPENAI: Final = ("reasoning", "reasoning_content", "reasoning_details", "thinking_blocks", "cache_control")


def completion_body(request: ChatRequest, *, is_openrouter: bool, is_openai: bool) -> bytes:
    """Return the body that asks for a completion. `is_openai`: for OpenAI's own API, or Azure's."""
    body: dict[str, Any] = {
        "model": request.model,
        "messages": [_message(each, is_openrouter=is_openrouter, is_openai=is_openai) for each in request.messages],
        request.limit_name: request.max_tokens,
        **(_for_openai(request.parameters) if is_openai else request.parameters),
    }
    if request.user is not None:
        body["user"] = request.user
    if is_openrouter:
        # The cap relies on endpoints that obey max_tokens and cost no more than the bound assumes. Unless told
        # not to, OpenRouter tries more expensive endpoints when a cheap one fails (November 2026).
        preferences: dict[str, Any] = {"require_parameters": True}  # G1
        if request.price_limit is not None:
            preferences["max_price"] = _max_price(request.price_limit)
        body["provider"] = preferences
    return json.dumps(body).encode()


def embeddings_body(request: EmbeddingsRequest, *, is_openrouter: bool) -> bytes:
    """Return the body that asks for embeddings; one text is sent as such, since not every server takes a list."""
    inputs = list(request.inputs)
    body: dict[str, Any] = {
        "model": request.model,
        "input": inputs[0] if len(inputs) == 1 else inputs,
        **request.parameters,
    }
    if request.user is not None:
        body["user"] = request.user
    if is_openrouter and request.price_limit is not None:
        body["provider"] = {"max_price": _max_price(request.price_limit)}  # G1
    return json.dumps(body).encode()


def _message(message: Message, *, is_openrouter: bool, is_openai: bool) -> dict[str, Any]:
    fields = message.as_json()
    if not is_openrouter:
        fields = _without(fields, _FOR_OPENROUTER)
    if not is_openai:
        return fields
    fields = _without(fields, _NOT_FOR_OPENAI)
    if isinstance(fields["content"], list):
        parts = cast("list[dict[str, Any]]", fields["content"])
        fields["content"] = [_without(part, _NOT_FOR_OPENAI) for part in parts]
    if "tool_calls" in fields:
        fields["tool_calls"] = [_without(call, ("extra_content",)) for call in fields["tool_calls"]]
    return fields


def _for_openai(parameters: Any) -> dict[str, Any]:
    """Say in OpenAI's way what OpenRouter's parameters say. Its cache needs no marks."""
    changed = {name: value for name, value in parameters.items() if name not in ("reasoning", "cache_control")}
    effort = parameters.get("reasoning", {}).get("effort")
    if effort is not None:
        changed.setdefault("reasoning_effort", effort)
    if "tools" in changed:
        changed["tools"] = [_without(tool, ("cache_control",)) for tool in changed["tools"]]
    return changed


def _without(fields: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


def _max_price(bound: Bound) -> dict[str, str]:
    """Return dollars per million tokens, per request and per image, as strings, which are exact."""
    limits = {
        "prompt": bound.endpoint_nanousd_per_mtok,
        "completion": bound.completion_nanousd_per_mtok,
        "request": bound.request_nanousd,
        **({"image": bound.image_nanousd} if bound.image_nanousd else {}),
    }
    return {name: f"{usd_from_nanousd(limit):f}" for name, limit in limits.items()}
