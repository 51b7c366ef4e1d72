"""Converting the events of Anthropic's Messages (November 2026) to chunks of a chat completion.

The events are `message_start`, `content_block_start`, `content_block_delta`, `content_block_stop`, `message_delta`,
`message_stop` and `error`. A `ping`, and event types added later, are ignored.
"""

import json
from typing import Any, Final

from tollbook.inference.providers.event_streams import DONE
from tollbook.inference.providers.json_values import as_table
from tollbook.inference.providers.reasoning_details import redacted_detail, thinking_detail

_KINDS: Final = ("message_", "content_block_")
_NOT_KEPT: Final = ("type", "role", "content", "usage", "stop_reason", "stop_sequence")


class MessageEvents:
    """Reads the events of one message."""

    def __init__(self) -> None:
        self._usage: dict[str, Any] = {}
        self._calls: dict[object, _Call] = {}
        self._details: dict[object, int] = {}
        """By the index of a reasoning block, its number among the reasoning blocks."""

    def chunk(self, event: Any) -> Any:
        """Return an event as a chunk, or `[DONE]`; an event that is not Anthropic's is returned unchanged."""
        table = as_table(event)
        kind = table.get("type")
        if not isinstance(kind, str) or not kind.startswith(_KINDS):
            return event
        match kind:
            case "message_start":
                message = as_table(table.get("message"))
                self._usage = as_table(message.get("usage"))
                return {name: value for name, value in message.items() if name not in _NOT_KEPT}
            case "content_block_start":
                return self._begin_block(table.get("index"), as_table(table.get("content_block")))
            case "content_block_delta":
                return self._continue_block(table.get("index"), as_table(table.get("delta")))
            case "content_block_stop":
                return self._end_block(table.get("index"))
            case "message_delta":
                return self._end_message(as_table(table.get("delta")), as_table(table.get("usage")))
            case "message_stop":
                return DONE
            case _:
                return {}

    def _begin_block(self, index: object, block: dict[str, Any]) -> dict[str, Any]:
        match block.get("type"):
            case "text":
                return _chunk(content=block.get("text"))
            case "thinking":
                self._details[index] = len(self._details)
                return self._thinking_chunk(index, block)
            case "redacted_thinking":
                place = self._details[index] = len(self._details)
                return _chunk(reasoning_details=[redacted_detail(place, block)])
            case "tool_use":
                call = self._calls[index] = _Call(len(self._calls), block.get("input"))
                function = {"name": block.get("name"), "arguments": ""}
                return _chunk(tool_calls=[{"index": call.index, "id": block.get("id"), "function": function}])
            case _:
                return {}

    def _continue_block(self, index: object, delta: dict[str, Any]) -> dict[str, Any]:
        match delta.get("type"):
            case "text_delta":
                return _chunk(content=delta.get("text"))
            case "thinking_delta" | "signature_delta":
                return self._thinking_chunk(index, delta)
            case "input_json_delta" if index in self._calls:
                return self._calls[index].add(delta.get("partial_json"))
            case _:
                return {}

    def _thinking_chunk(self, index: object, block: dict[str, Any]) -> dict[str, Any]:
        detail = thinking_detail(self._details.setdefault(index, len(self._details)), block)
        return _chunk(reasoning=block.get("thinking"), reasoning_details=[detail])

    def _end_block(self, index: object) -> dict[str, Any]:
        call = self._calls.get(index)
        # The input of a tool without parameters comes in no delta.
        return (
            {} if call is None or call.has_input else call.add(json.dumps(call.whole_input or {}, ensure_ascii=False))
        )

    def _end_message(self, delta: dict[str, Any], usage: dict[str, Any]) -> dict[str, Any]:
        """Return the last chunk, with the merged usage: the usage at the start lacks what was generated since (G3)."""
        reason = delta.get("stop_reason")
        for name, value in usage.items():
            old = self._usage.get(name)
            if type(old) is int and type(value) is int:
                self._usage[name] = max(old, value)
            elif value is not None:
                self._usage[name] = value
        choice: dict[str, Any] = {"index": 0, "delta": {}, "finish_reason": reason}
        return {"choices": [choice], "usage": self._usage}


class _Call:
    def __init__(self, index: int, whole_input: object) -> None:
        self.index = index
        self.whole_input = whole_input
        self.has_input = False

    def add(self, text: object) -> dict[str, Any]:
        self.has_input = self.has_input or bool(text)
        return _chunk(tool_calls=[{"index": self.index, "function": {"arguments": text}}])


def _chunk(**delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} if delta else {}
