"""Translates items of Responses' `input` into chat messages.

The output of a model in one turn (reasoning, text, tool calls) becomes one message, because in a chat completion the
tool results must directly follow it. Images and files in tool results follow in a user's message.
"""

import json
from collections.abc import Mapping
from typing import Any, Final

from tollbook.gateway.reasoning_details import unpack
from tollbook.gateway.request_fields import Table, kind_of, list_at, refusal, table_at, text_at, word_at
from tollbook.gateway.responses.content import NOTHING_KEPT, answer_content, message_content, tool_output
from tollbook.gateway.responses.output import response_id_of
from tollbook.gateway.responses.tools import ADDITIONAL_TOOLS, INPUT, function_name
from tollbook.schemas.problems import shown

_HOW_TO_SEND: Final = "SDKs do so with `store: false`"
REFERENCE: Final = "item_reference"
_ROLES: Final = ("user", "assistant", "system", "developer")
# A `web_search_call` says only that a search was made; its outcome is in the model's text. Additional tools are read
# together with the tools.
_PASSED_OVER: Final = frozenset({"web_search_call", ADDITIONAL_TOOLS})


def messages_of(items: object, known: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """Return the conversation; `known` are earlier items that it may refer to, by id. Errors: InvalidTask."""
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    conversation = _Conversation(known)
    for number, item in enumerate(list_at(items, "input")):
        conversation.add(item, f"input[{number}]")
    return conversation.end()


class _Conversation:
    """Collects messages: the model's current turn, and media of tool results that must wait for the last result."""

    def __init__(self, known: Mapping[str, Mapping[str, Any]]) -> None:
        self._known = known
        self._known_answers = frozenset(map(response_id_of, known))
        self._messages: list[Table] = []
        self._turn: Table | None = None
        self._media: list[Table] = []

    def add(self, value: object, path: str) -> None:
        item = table_at(value, path)
        match kind_of(item, path, "message" if "role" in item else REFERENCE):
            case "message":
                self._add_message(item, path)
            case "reasoning":
                self._add_reasoning(item, path)
            case "function_call" | "custom_tool_call" as kind:
                self._add_call(item, path, is_custom=kind == "custom_tool_call")
            case "function_call_output" | "custom_tool_call_output":
                self._add_output(item, path)
            case "image_generation_call":
                self._add_image(item, path)
            case kind if kind == REFERENCE:
                self._add_known(text_at(item.get("id"), f"{path}.id"), path)
            case "compaction":
                raise refusal(path, "is a compaction, which only OpenAI can read: send the conversation")
            case kind if kind not in _PASSED_OVER:
                raise refusal(path, f"has the type {shown(kind)}, which cannot be translated to a chat completion")
            case _:
                pass

    def end(self) -> list[Table]:
        self._end_turn()
        self._end_results()
        return self._messages

    def _add_known(self, item_id: str, path: str) -> None:
        item = self._known.get(item_id)
        if item is not None:
            self.add(item, path)
        # A text may be two items in a stream, but one item in the stored answer.
        elif response_id_of(item_id) not in self._known_answers:
            raise refusal(
                path,
                f"refers to an earlier item: {NOTHING_KEPT}; send the item itself (SDKs do so with `store: false`)",
            )

    def _add_message(self, item: Table, path: str) -> None:
        role = word_at(item.get("role"), f"{path}.role", _ROLES)
        if role != "assistant":
            content = message_content(item.get("content"), f"{path}.content")
            self._end_turn()
            self._end_results()
            self._messages.append({"role": role, "content": content})
            return
        text, refusal = answer_content(item.get("content"), f"{path}.content")
        turn = self._open_turn()
        if text:
            turn["content"] = f"{turn['content']}\n\n{text}" if turn.get("content") else text
        if refusal:
            turn["refusal"] = refusal

    def _add_reasoning(self, item: Table, path: str) -> None:
        details = unpack(item.get("encrypted_content"))
        if details:
            turn = self._open_turn()
            turn["reasoning_details"] = [*turn.get("reasoning_details", []), *details]
            return
        listed = [
            table_at(each, f"{path}.{name}")
            for name in ("content", "summary")
            for each in list_at(item.get(name, []), f"{path}.{name}")
        ]
        of_model = [each for each in listed if each.get("type") == "reasoning_text"] or listed
        text = "\n\n".join(text_at(each.get("text"), f"{path}.summary") for each in of_model)
        turn = self._open_turn()
        if text:
            turn["reasoning"] = f"{turn['reasoning']}\n\n{text}" if "reasoning" in turn else text

    def _add_image(self, item: Table, path: str) -> None:
        data = text_at(item.get("result"), f"{path}.result")
        url = f"data:image/{item.get('output_format', 'png')};base64,{data}"
        turn = self._open_turn()
        turn.setdefault("content", "")
        turn.setdefault("images", []).append({"type": "image_url", "image_url": {"url": url}})

    def _add_call(self, item: Table, path: str, *, is_custom: bool) -> None:
        name = function_name(text_at(item.get("name"), f"{path}.name"), item.get("namespace"))
        if is_custom:
            arguments = json.dumps({INPUT: text_at(item.get("input"), f"{path}.input")}, ensure_ascii=False)
        else:
            arguments = text_at(item.get("arguments"), f"{path}.arguments")
        call_id = text_at(item.get("call_id"), f"{path}.call_id")
        call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        self._open_turn().setdefault("tool_calls", []).append(call)

    def _add_output(self, item: Table, path: str) -> None:
        text, media = tool_output(item.get("output"), f"{path}.output")
        call_id = text_at(item.get("call_id"), f"{path}.call_id")
        self._end_turn()
        self._messages.append({"role": "tool", "tool_call_id": call_id, "content": text})
        self._media += media

    def _open_turn(self) -> Table:
        if self._turn is None:
            self._end_results()
            self._turn = {"role": "assistant"}
        return self._turn

    def _end_turn(self) -> None:
        turn, self._turn = self._turn, None
        # Reasoning alone does not make a message.
        if turn is not None and turn.keys() & {"content", "refusal", "tool_calls"}:
            self._messages.append(turn)

    def _end_results(self) -> None:
        media, self._media = self._media, []
        if media:
            self._messages.append({"role": "user", "content": media})
