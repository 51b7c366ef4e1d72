"""Converting the messages and tools of a chat completion to the form of Anthropic's Messages.

System messages become `system`, wherever they are. Consecutive messages of one role become one message, since the
results of all tools that a message calls must be in the next message, before anything else.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, cast

from tollbook.schemas.messages import (
    AudioPart,
    FilePart,
    FunctionCall,
    ImagePart,
    Message,
    Part,
    TextPart,
    ToolCall,
    VideoPart,
)

_NO_ID_CHARACTER: Final = re.compile(r"[^A-Za-z0-9_-]")
_DATA_URL: Final = re.compile(r"data:([a-z]+/[a-z0-9.+-]+);base64,", re.IGNORECASE)
_NO_PARAMETERS: Final[dict[str, Any]] = {"type": "object", "properties": {}}
_TEXT_PARAMETERS: Final = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
_CHOICES: Final = {"auto": "auto", "none": "none", "required": "any", "any": "any"}
_THOUGHTS: Final = ("thinking", "redacted_thinking")

Block = dict[str, Any]


def messages_of(messages: Sequence[Message]) -> tuple[list[Block], list[dict[str, Any]]]:
    """Return the system prompt and the conversation."""
    system: list[Block] = []
    turns: list[dict[str, Any]] = []
    for message in messages:
        if message.role in ("system", "developer"):
            system += _content(message)
            continue
        role = "assistant" if message.role == "assistant" else "user"
        blocks = _marked(_blocks(message), message)
        if not blocks:
            continue  # Anthropic refuses an empty message.
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += blocks
        else:
            turns.append({"role": role, "content": blocks})
    turns = [kept for turn in turns if (kept := _without_last_thoughts(turn))["content"]]
    # Anthropic requires at least one message.
    return (system, turns) if turns else ([], [{"role": "user", "content": system}])


def may_think(turns: Sequence[Mapping[str, Any]]) -> bool:
    """Whether Anthropic accepts a thinking budget for a conversation.

    In a tool loop, the assistant's turn must begin with a thinking block (November 2026); a turn of another provider's
    model has none.
    """
    calling = next((turn for turn in reversed(turns) if not _is_results(turn)), None)
    if calling is None or calling["role"] != "assistant" or calling is turns[-1]:
        return True
    return calling["content"][0]["type"] in _THOUGHTS


def _is_results(turn: Mapping[str, Any]) -> bool:
    return turn["role"] == "user" and any(block["type"] == "tool_result" for block in turn["content"])


def _without_last_thoughts(turn: dict[str, Any]) -> dict[str, Any]:
    """Return a turn without thinking blocks at its end, which Anthropic refuses."""
    blocks: list[Block] = turn["content"]
    while blocks and blocks[-1]["type"] in _THOUGHTS:
        blocks = blocks[:-1]
    return {**turn, "content": blocks}


def tools_of(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tools, from `tools` and from the older `functions`."""
    tools = [_tool(tool) for tool in parameters.get("tools", ())]
    tools += [_function(function) for function in parameters.get("functions", ())]
    return {"tools": tools} if tools else {}


def tool_choice_of(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the choice of tool, and whether several tools may be called at once."""
    choice = parameters.get("tool_choice", parameters.get("function_call"))
    if choice in ("auto", "none") and not tools_of(parameters):
        return {}  # Anthropic refuses a choice without tools, and these choices have no effect then.
    is_single = parameters.get("parallel_tool_calls") is False
    if choice is None and not (is_single and tools_of(parameters)):
        return {}
    made = _choice(choice or "auto")
    if is_single and made.get("type") != "none":
        made["disable_parallel_tool_use"] = True
    return {"tool_choice": made}


def _choice(choice: object) -> dict[str, Any]:
    if isinstance(choice, str):
        return {"type": _CHOICES.get(choice, choice)}
    table = cast("dict[str, Any]", choice)
    named = table.get(table.get("type", "function"), table)
    name = cast("dict[str, Any]", named).get("name") if isinstance(named, dict) else None
    return {"type": "tool", "name": name} if name is not None else dict(table)


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    mark = {"cache_control": tool["cache_control"]} if "cache_control" in tool else {}
    if tool["type"] == "custom":
        custom = tool["custom"]
        return {**_function({**custom, "parameters": _TEXT_PARAMETERS}), **mark}
    return {**_function(tool["function"]), **mark}


def _function(function: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": function["name"],
        "input_schema": function.get("parameters") or _NO_PARAMETERS,
        **{name: function[name] for name in ("description", "strict") if name in function},
    }


def _blocks(message: Message) -> list[Block]:
    if message.role in ("tool", "function"):
        called = message.tool_call_id if message.role == "tool" else message.name
        return [{"type": "tool_result", "tool_use_id": _id(called), "content": _content(message)}]
    blocks = [*_thoughts(message), *_content(message)]
    if message.refusal:
        blocks.append(_text(message.refusal))
    blocks += [_tool_use(call) for call in message.tool_calls or ()]
    if message.function_call is not None:
        blocks.append(_function_use(message.function_call, message.function_call.name))
    return blocks


def _content(message: Message) -> list[Block]:
    if message.content is None:
        return []
    parts = (message.content,) if isinstance(message.content, str) else message.content
    blocks = [_part(part) for part in parts]
    # Anthropic refuses empty texts; applications send them along with tool calls.
    return [block for block in blocks if block["type"] != "text" or block["text"].strip()]


def _part(part: str | Part) -> Block:
    if isinstance(part, ImagePart):
        return {"type": "image", "source": _source(part.image_url.url), **_mark(part)}
    if isinstance(part, TextPart):
        return {**_text(part.text), **_mark(part)}
    if isinstance(part, FilePart):
        return {"type": "document", "source": _document(part), **_title(part), **_mark(part)}
    if isinstance(part, AudioPart | VideoPart):
        # Anthropic supports neither: it refuses the request, which is then free.
        return part.model_dump(mode="json", exclude_none=True)
    return _text(part if isinstance(part, str) else part.refusal)


def _document(part: FilePart) -> dict[str, str]:
    if part.file.file_data is None:
        return {"type": "file", "file_id": part.file.file_id or ""}
    return _source(part.file.file_data)


def _title(part: FilePart) -> dict[str, str]:
    return {} if part.file.filename is None else {"title": part.file.filename}


def _text(text: str) -> Block:
    return {"type": "text", "text": text}


def _mark(part: TextPart | ImagePart | FilePart) -> Block:
    mark = part.cache_control
    return {} if mark is None else {"cache_control": mark.model_dump(exclude_none=True)}


def _marked(blocks: list[Block], message: Message) -> list[Block]:
    """Put the cache mark of a whole message on its last block, as Anthropic requires."""
    if message.cache_control is not None and blocks:
        blocks[-1]["cache_control"] = message.cache_control.model_dump(exclude_none=True)
    return blocks


def _source(url: str) -> dict[str, str]:
    found = _DATA_URL.match(url)
    if found is None:
        return {"type": "url", "url": url}
    return {"type": "base64", "media_type": found[1].lower(), "data": url[found.end() :]}


def _thoughts(message: Message) -> Iterable[Block]:
    """Yield the signed thinking of earlier turns, which Anthropic requires before tool calls.

    The message has it in Anthropic's own blocks, or in OpenRouter's form.
    """
    for block in message.thinking_blocks or ():
        if block.get("type") == "thinking" and block.get("signature"):
            yield {"type": "thinking", "thinking": block.get("thinking") or "", "signature": block["signature"]}
        elif block.get("type") == "redacted_thinking" and block.get("data"):
            yield {"type": "redacted_thinking", "data": block["data"]}
    if message.thinking_blocks:
        return
    for detail in message.reasoning_details or ():
        if not str(detail.get("format", "")).startswith("anthropic"):
            continue
        if detail.get("type") == "reasoning.text" and detail.get("signature"):
            yield {"type": "thinking", "thinking": detail.get("text") or "", "signature": detail["signature"]}
        elif detail.get("type") == "reasoning.encrypted" and detail.get("data"):
            yield {"type": "redacted_thinking", "data": detail["data"]}


def _tool_use(call: ToolCall) -> Block:
    if call.function is not None:
        return _function_use(call.function, call.id)
    name, text = (call.custom.name, call.custom.input) if call.custom is not None else ("", "")
    return {"type": "tool_use", "id": _id(call.id), "name": name, "input": {"input": text}}


def _function_use(function: FunctionCall, call_id: str | None) -> Block:
    return {"type": "tool_use", "id": _id(call_id), "name": function.name, "input": _arguments(function.arguments)}


def _arguments(text: str) -> dict[str, Any]:
    """Return the arguments of a call; a value that is no JSON object is put into one."""
    try:
        value: object = json.loads(text, parse_constant=str) if text.strip() else {}
    except (ValueError, RecursionError):
        value = text
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {"input": value}


def _id(call_id: str | None) -> str:
    """Return the id of a call with only the characters that Anthropic accepts; other providers use more."""
    return _NO_ID_CHARACTER.sub("_", call_id or "") or "call"
