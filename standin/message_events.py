"""Anthropic's messages as event streams (November 2026): each block has start, deltas and stop; usage comes twice."""

import json
from collections.abc import Iterator
from typing import Any, cast

from tollbook.standin.event_streams import Cut, cut


def as_message_events(body: bytes, cut: Cut = cut) -> list[bytes] | None:
    """Return the events of a message; None if the body is not a message."""
    try:
        found: Any = json.loads(body)
    except ValueError:
        return None
    if not isinstance(found, dict) or cast("dict[str, Any]", found).get("type") != "message":
        return None
    return [as_event(each) for each in _events(cast("dict[str, Any]", found), cut)]


def as_event(data: dict[str, Any]) -> bytes:
    """Return an event; its type is both the event's name and in its data."""
    return f"event: {data['type']}\ndata: {json.dumps(data)}\n\n".encode()


def _events(message: dict[str, Any], cut: Cut) -> Iterator[dict[str, Any]]:
    usage: dict[str, Any] | None = message.get("usage")
    start: dict[str, Any] = {**message, "content": [], "stop_reason": None}
    if usage is not None:
        start["usage"] = usage | {"output_tokens": 1}
    yield {"type": "message_start", "message": start}
    yield {"type": "ping"}
    for index, block in enumerate(message["content"]):
        empty, deltas = _parts(block, cut)
        yield {"type": "content_block_start", "index": index, "content_block": empty}
        for delta in deltas:
            yield {"type": "content_block_delta", "index": index, "delta": delta}
        yield {"type": "content_block_stop", "index": index}
    ended = {"stop_reason": message["stop_reason"], "stop_sequence": message["stop_sequence"]}
    total = {} if usage is None else {"usage": {"output_tokens": usage["output_tokens"]}}
    yield {"type": "message_delta", "delta": ended, **total}
    yield {"type": "message_stop"}


def _parts(block: dict[str, Any], cut: Cut) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the start of a block, and its deltas."""
    match block["type"]:
        case "text":
            return block | {"text": ""}, [{"type": "text_delta", "text": part} for part in cut(block["text"])]
        case "thinking":
            deltas = [{"type": "thinking_delta", "thinking": part} for part in cut(block["thinking"])]
            signature = {"type": "signature_delta", "signature": block.get("signature", "")}
            return {"type": "thinking", "thinking": "", "signature": ""}, [*deltas, signature]
        case "tool_use":
            parts = cut(json.dumps(block["input"])) if block["input"] else ()
            deltas = [{"type": "input_json_delta", "partial_json": part} for part in ("", *parts)]
            return block | {"input": {}}, deltas
        case _:
            return block, []
