"""The event stream of a completion: its parts are put together to the object that the plain reply would have been.

Of one part to the next, texts and the arguments of tool calls go on, lists grow, and of anything else the last value
counts: a usage is in the last part. What is no event (comments that keep the connection alive, an event that was cut
off) is left out.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, Final, cast

from tollbook.inference.providers.json_values import as_list, as_table, tables_of

_LINE_ENDS: Final = re.compile(r"\r\n|\n|\r")  # Those of event streams alone: a text in JSON may have others in it.
_DONE: Final = "[DONE]"
_JOINED: Final = ("content", "refusal", "reasoning", "reasoning_content")
Parse = Callable[[str], Any]
"""Parses JSON. Errors: ValueError."""


def read_stream(text: str, parse: Parse) -> tuple[dict[str, Any] | None, bool]:
    """Return the object that the events make up, None where there are none; and whether it was cut off in mid-answer.

    A socket that is closed looks like an end: an answer has ended where a choice says why, or the stream says so.
    """
    document: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    is_done, is_empty = False, True
    for event in _events(text, parse):
        if event == _DONE:
            is_done = True
        table = as_table(event)
        if not table:
            continue
        is_empty = False
        document |= {name: value for name, value in table.items() if name != "choices" and value is not None}
        for choice in tables_of(table.get("choices")):
            index = choice.get("index")
            _add_choice(choices.setdefault(index if type(index) is int else 0, {"message": {}}), choice)
    if choices:
        document["choices"] = [choices[index] for index in sorted(choices)]
    is_ended = is_done or all(choice.get("finish_reason") or choice.get("error") for choice in choices.values())
    return None if is_empty else document, not is_ended and not document.get("error")


def _events(text: str, parse: Parse) -> Iterator[Any]:
    """Yield the data of the events, parsed, and `[DONE]`."""
    lines: list[str] = []
    for line in [*_LINE_ENDS.split(text), ""]:
        if line.startswith("data:"):
            lines.append(line[5:].strip())
        elif not line.strip() and lines:
            # Some servers leave out the empty line between two events.
            whole = _parsed("\n".join(lines), parse)
            found = [whole] if whole is not None or len(lines) == 1 else [_parsed(each, parse) for each in lines]
            yield from (each for each in found if each is not None)
            lines.clear()


def _parsed(data: str, parse: Parse) -> Any:
    """Return what the data of an event says; None where it cannot be read."""
    if data == _DONE:
        return data
    try:
        return parse(data)
    except ValueError:
        return None


def _add_choice(joined: dict[str, Any], choice: dict[str, Any]) -> None:
    others = {name: value for name, value in choice.items() if name not in ("delta", "message", "text")}
    joined |= {name: value for name, value in others.items() if value is not None}
    message: dict[str, Any] = joined["message"]
    for part in (choice.get("delta"), choice.get("message")):
        for name, value in as_table(part).items():
            if value is None:
                continue
            if name == "tool_calls":
                _add_tool_calls(message.setdefault(name, []), value)
            elif name == "function_call":
                _add_function(message.setdefault(name, {}), value)
            elif name in _JOINED or isinstance(value, list):
                message[name] = _together(message.get(name), cast("object", value))
            else:
                message[name] = value
    text = choice.get("text")
    if isinstance(text, str):  # As completions without messages have it.
        joined["text"] = joined.get("text", "") + text


def _together(old: object, new: object) -> object:
    if old is None:
        return new
    if isinstance(old, str) and isinstance(new, str):
        return old + new
    return [*_listed(old), *_listed(new)]


def _listed(value: object) -> list[object]:
    return as_list(cast("object", value)) if isinstance(value, list) else [value]


def _add_tool_calls(joined: list[dict[str, Any]], calls: object) -> None:
    for call in tables_of(calls):
        found = _call_that_goes_on(joined, call)
        if found is None:
            joined.append({**call, "function": dict(as_table(call.get("function")))})
            continue
        _add_function(found["function"], call.get("function"))
        found |= {name: value for name, value in call.items() if name != "function" and value}


def _call_that_goes_on(joined: list[dict[str, Any]], call: dict[str, Any]) -> dict[str, Any] | None:
    """Return the call that a part belongs to: of the same index, and of no other id. Some servers count none."""
    index, call_id = call.get("index"), call.get("id")
    of_index = [each for each in joined if index is None or each.get("index") == index]
    if call_id:
        return next((each for each in of_index if each.get("id") in (call_id, None, "")), None)
    return of_index[-1] if of_index else None


def _add_function(joined: dict[str, Any], function: object) -> None:
    for name, value in as_table(function).items():
        old = joined.get(name)
        if name == "arguments" and isinstance(old, str) and isinstance(value, str):
            joined[name] = old + value
        elif value is not None and not (value == "" and old):
            joined[name] = value
