"""Translates Anthropic's messages into chat messages.

Tool results become messages of their own, before the rest of the user's message. A tool message of a chat completion
has only text, so images and files in tool results follow in the user's message. Signed thinking is sent back in
OpenRouter's format.
"""

import json
from typing import Any, Final

from tollbook.gateway.messages.blocks import content_of, mark_of, part_of, parts_of, text_part
from tollbook.gateway.reasoning_details import unpack
from tollbook.gateway.request_fields import Table, kind_of, list_at, refusal, table_at, text_at, word_at
from tollbook.schemas.problems import shown

_ROLES: Final = ("user", "assistant", "system")
_THINKING_FORMAT: Final = "anthropic-claude-v1"
_SEE_NEXT: Final = "The result follows in the next message."
_ERROR: Final = "Error: "
"""Put before the result of a failed tool: chat messages have no field for that."""


def messages_of(system: object, messages: object) -> list[Table]:
    """Return the conversation, the system prompt first. Errors: InvalidTask."""
    made: list[Table] = []
    parts = [] if system is None else [part for part in parts_of(system, "system") if part.get("text") != ""]
    if parts:
        made.append({"role": "system", "content": content_of(parts)})
    for number, value in enumerate(list_at(messages, "messages")):
        path = f"messages[{number}]"
        message = table_at(value, path)
        role = word_at(message.get("role"), f"{path}.role", _ROLES)
        content, inner = message.get("content"), f"{path}.content"
        if role == "assistant":
            made += _of_assistant(content, inner)
        elif role == "user":
            made += _of_user(content, inner)
        else:
            made.append({"role": "system", "content": content_of(parts_of(content, inner))})
    return made


def _of_user(content: object, path: str) -> list[Table]:
    if isinstance(content, str):
        return [{"role": "user", "content": content}]
    results: list[Table] = []
    parts: list[Table] = []
    for number, value in enumerate(list_at(content, path)):
        inner = f"{path}[{number}]"
        block = table_at(value, inner)
        if kind_of(block, inner) == "tool_result":
            result, media = _tool_result(block, inner)
            results.append(result)
            parts += media
        else:
            parts += part_of(block, inner)
    return [*results, *([{"role": "user", "content": content_of(parts)}] if parts else [])]


def _tool_result(block: Table, path: str) -> tuple[Table, list[Table]]:
    parts = parts_of(block.get("content", ""), f"{path}.content")
    media = [part for part in parts if part["type"] != "text"]
    texts = [part for part in parts if part["type"] == "text" and part["text"]]
    if not texts:
        texts = [text_part(_SEE_NEXT if media else "", {})]
    if block.get("is_error") is True:
        texts[0] = {**texts[0], "text": f"{_ERROR}{texts[0]['text']}"}
    texts[-1] = {**texts[-1], **mark_of(block)}
    call_id = text_at(block.get("tool_use_id"), f"{path}.tool_use_id")
    return {"role": "tool", "tool_call_id": call_id, "content": content_of(texts)}, media


def _of_assistant(content: object, path: str) -> list[Table]:
    if isinstance(content, str):
        return [{"role": "assistant", "content": content}]
    message: Table = {"role": "assistant"}
    texts: list[Table] = []
    for number, value in enumerate(list_at(content, path)):
        inner = f"{path}[{number}]"
        block = table_at(value, inner)
        match kind_of(block, inner):
            case "text":
                texts.append(text_part(text_at(block.get("text"), f"{inner}.text"), block))
            case "thinking" | "redacted_thinking":
                _add_thinking(message, block, inner)
            case "tool_use":
                message.setdefault("tool_calls", []).append(_tool_call(block, inner))
            case kind:
                raise refusal(inner, f"has the type {shown(kind)}, which cannot be translated to a chat completion")
    texts = [part for part in texts if part["text"].strip()]
    if texts:
        message["content"] = content_of(texts)
    # Thinking alone does not make a message.
    return [message] if message.keys() & {"content", "tool_calls"} else []


def _add_thinking(message: Table, block: Table, path: str) -> None:
    details: list[Table] = message.get("reasoning_details", [])
    described: Table = {"format": _THINKING_FORMAT, "index": len(details)}
    if block.get("type") == "redacted_thinking":
        data = text_at(block.get("data"), f"{path}.data")
        message["reasoning_details"] = [*details, {"type": "reasoning.encrypted", "data": data, **described}]
        return
    text = text_at(block.get("thinking", ""), f"{path}.thinking")
    signature = text_at(block.get("signature", ""), f"{path}.signature")
    own = unpack(signature)
    if own:
        message["reasoning_details"] = [*details, *own]
    elif signature:
        detail = {"type": "reasoning.text", "text": text, "signature": signature, **described}
        message["reasoning_details"] = [*details, detail]
    elif text:
        # Reasoning of another provider: those that want it back in a tool loop accept it as text.
        message["reasoning"] = f"{message['reasoning']}\n\n{text}" if "reasoning" in message else text


def _tool_call(block: Table, path: str) -> Table:
    arguments: Any = table_at(block.get("input", {}), f"{path}.input")
    function = {
        "name": text_at(block.get("name"), f"{path}.name"),
        "arguments": json.dumps(arguments, ensure_ascii=False),
    }
    return {"id": text_at(block.get("id"), f"{path}.id"), "type": "function", "function": function}
