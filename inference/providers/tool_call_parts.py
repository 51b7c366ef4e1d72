"""Joining texts and tool calls that come in parts: each part is passed on, and all parts together are the result."""

import json
import re
from typing import Any, Final

from tollbook.inference.providers.json_values import as_table, plain, storable

_TEXT_OF_KIND: Final = {"function": "arguments", "custom": "input"}
"""By a call's kind, the field whose text continues from part to part."""
_MARKS: Final = re.compile(r'\\.|["{}]', re.DOTALL)
"""Marks in JSON: quotes and braces, which begin and end strings and objects, and escapes, which do not."""


class TextParts:
    """A text that comes in parts. Half of a surrogate pair is withheld until its second half comes."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._half = ""
        self.length = 0
        """Characters so far. Counted here, since joining the parts after each one would be slow."""

    def add(self, text: str) -> str:
        """Add a part; return the text to pass on."""
        if not text.isascii() or self._half:
            text = self._half + text
            self._half = text[-1:] if "\ud800" <= text[-1:] <= "\udbff" else ""
            text = storable(text[: len(text) - len(self._half)])
        if text:
            self._parts.append(text)
            self.length += len(text)
        return text

    def end(self) -> str:
        """Return the last text to pass on: the replacement of a withheld half, if there is one."""
        half, self._half = storable(self._half), ""
        if half:
            self._parts.append(half)
            self.length += len(half)
        return half

    def __bool__(self) -> bool:
        return bool(self._parts)

    def __str__(self) -> str:
        return "".join(self._parts)


class ToolCallParts:
    """The tool calls of one answer. Each is passed on with its place in the list as `index`."""

    def __init__(self) -> None:
        self._calls: list[_Call] = []
        self._all = _Calls()
        self._of_index: dict[str, _Calls] = {}
        self._is_old_form = False

    def __bool__(self) -> bool:
        return bool(self._calls)

    def add(self, call: dict[str, Any]) -> dict[str, Any] | None:
        """Add a part of a call; return the part to pass on, or None."""
        call = in_openai_form(call)
        index = call.get("index")
        of_index = self._all if index is None else self._of_index.setdefault(repr(index), _Calls())
        groups = (self._all,) if index is None else (self._all, of_index)
        found = _continued_call(of_index, call)
        if found is None:
            found = _Call(len(self._calls))
            self._calls.append(found)
            for group in groups:
                group.begin(found)
        part = found.add(call)
        for group in groups:
            group.note_id(found)
        return part

    def add_old_form(self, function: dict[str, Any]) -> dict[str, Any] | None:
        """Add a part of OpenAI's older `function_call`, which is used only if there are no tool calls."""
        if self._calls and not self._is_old_form:
            return None
        if not self._calls and not function.get("name"):
            return None
        self._is_old_form = True
        return self.add({"function": function})

    def end(self) -> list[dict[str, Any]]:
        """Return the last parts to pass on, such as `{}` for calls without arguments."""
        return [part for call in self._calls if (part := call.end()) is not None]

    def joined(self) -> list[dict[str, Any]]:
        """Return the calls in OpenAI's form."""
        return [call.joined() for call in self._calls]


def _continued_call(of_index: "_Calls", call: dict[str, Any]) -> "_Call | None":
    """Return the call with the same index that a part continues; None if the part begins a new call.

    A part continues the call with its id. Some servers send no index, and some send a new id with each part; so a part
    without a name never begins a call. A part with a name, but without index and id, begins a call if the arguments of
    the last call are complete.
    """
    is_named = bool(as_table(call.get("function") or call.get("custom")).get("name"))
    last = of_index.last
    if call_id := call.get("id"):
        same = of_index.of_id(call_id)
        return same if same is not None or is_named else last
    is_next = last is not None and call.get("index") is None and is_named and last.is_whole
    return None if is_next else last


class _Calls:
    """Calls in their order, with an index by id: an answer may have as many calls as parts, so a scan would be slow."""

    def __init__(self) -> None:
        self._calls: list[_Call] = []
        self._by_id: dict[str, _Call] = {}
        self._have_ids = 0

    @property
    def last(self) -> "_Call | None":
        return self._calls[-1] if self._calls else None

    def begin(self, call: "_Call") -> None:
        self._calls.append(call)

    def note_id(self, call: "_Call") -> None:
        if (call_id := call.fields.get("id")) is not None:
            self._by_id.setdefault(repr(call_id), call)

    def of_id(self, call_id: object) -> "_Call | None":
        """Return the first call that has this id, or has no id yet."""
        while self._have_ids < len(self._calls) and self._calls[self._have_ids].fields.get("id") is not None:
            self._have_ids += 1
        found = [self._by_id[key]] if (key := repr(call_id)) in self._by_id else []
        found += self._calls[self._have_ids : self._have_ids + 1]
        return min(found, key=lambda call: call.place, default=None)


def in_openai_form(call: dict[str, Any]) -> dict[str, Any]:
    """Return a call with its name and arguments under `function`; some servers send them beside the id."""
    if isinstance(call.get("function") or call.get("custom"), dict) or not ("name" in call or "arguments" in call):
        return call
    further = {name: value for name, value in call.items() if name not in ("name", "arguments", "function")}
    return {**further, "function": {"name": call.get("name"), "arguments": call.get("arguments")}}


class _ObjectEnd:
    """Finds the end of a JSON object that comes in parts, in linear time."""

    def __init__(self) -> None:
        self.is_reached = False
        self._depth = 0
        self._is_in_text = False
        self._escape = ""

    def add(self, part: str) -> None:
        part = self._escape + part
        escapes = len(part) - len(part.rstrip("\\"))
        self._escape = "\\" if escapes % 2 else ""
        for mark in _MARKS.findall(part.removesuffix(self._escape)):
            if mark == '"':
                self._is_in_text = not self._is_in_text
            elif not self._is_in_text and mark in "{}":
                self._depth += 1 if mark == "{" else -1
                self.is_reached = self.is_reached or self._depth == 0


class _Call:
    def __init__(self, place: int) -> None:
        self.place = place
        self.fields: dict[str, Any] = {}
        self._kind = "function"
        self._named: dict[str, Any] = {}
        self._text = TextParts()
        self._has_text = False
        self._object = _ObjectEnd()

    @property
    def is_whole(self) -> bool:
        """Whether the arguments so far are a complete JSON object."""
        return self._object.is_reached

    def add(self, call: dict[str, Any]) -> dict[str, Any] | None:
        if not self.fields:
            self._kind = "custom" if isinstance(call.get("custom"), dict) else "function"
            call = {"type": self._kind, **call}
        part: dict[str, Any] = {"index": self.place}
        part |= self._new_fields(self.fields, call, ("index", self._kind))
        text_name = _TEXT_OF_KIND[self._kind]
        table = as_table(call.get(self._kind))
        named = self._new_fields(self._named, table, (text_name,))
        text = table.get(text_name)
        if text is not None:
            whole = text if isinstance(text, str) else json.dumps(plain(text), ensure_ascii=False)
            self._object.add(whole)
            passed = self._text.add(whole)
            if passed or not self._has_text:
                named[text_name] = passed
            self._has_text = True
        if named:
            part[self._kind] = named
        return part if len(part) > 1 else None

    def end(self) -> dict[str, Any] | None:
        left = self._text.end()
        # For a call without arguments, some servers send an empty text, which is no JSON.
        if not self._text and self._kind == "function":
            self._has_text = True
            left = self._text.add("{}")
        return {"index": self.place, self._kind: {_TEXT_OF_KIND[self._kind]: left}} if left else None

    def joined(self) -> dict[str, Any]:
        text = {_TEXT_OF_KIND[self._kind]: str(self._text)} if self._has_text else {}
        return {**self.fields, self._kind: {**self._named, **text}}

    @staticmethod
    def _new_fields(known: dict[str, Any], given: dict[str, Any], but: tuple[str, ...]) -> dict[str, Any]:
        """Add the new fields of a part to `known`, and return them. An id, type or name is never changed later."""
        new_fields: dict[str, Any] = {}
        for name, value in given.items():
            if name in but or value is None or value == "":
                continue
            clean = plain(value)
            if known.get(name) == clean or (name in ("id", "type", "name") and name in known):
                continue
            new_fields[storable(name)] = clean
        known |= new_fields
        return new_fields
