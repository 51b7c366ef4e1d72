"""The body of a reply: bytes become a JSON object, whatever a server, a router or a proxy has put around it.

Read are: JSON with a byte-order mark, after white space or comments that kept the connection alive, or as the only
member of a list (Gemini's errors); and an event stream that nobody asked for, whose parts are put together.
"""

import json
from collections.abc import Iterable, Iterator
from decimal import Decimal
from typing import Any, Final, cast

from tollbook.inference.providers.json_values import as_list, as_table, tables_of

# Floats become Decimals, so that a cost is exact. NaN and infinities do too: they are then refused as a cost, and the
# rest of the reply is still read.
_DECODER: Final = json.JSONDecoder(parse_float=Decimal, parse_constant=Decimal)
_JOINED: Final = ("content", "refusal", "reasoning", "reasoning_content")


def read_json(body: bytes) -> Any:
    """Parse JSON with exact numbers. Errors: ValueError."""
    return _parse(_text_of(body))


def read_document(body: bytes) -> dict[str, Any] | None:
    """Return the object that a reply consists of, None where it has none."""
    try:
        text = _text_of(body)
    except ValueError:
        return None
    try:
        parsed = _parse(_without_comments(text))
    except ValueError:
        events = tables_of(list(_events(text)))
        return _joined(events) if events else None
    listed = as_list(parsed)
    parsed = listed[0] if len(listed) == 1 else parsed
    return cast(dict[str, Any], parsed) if isinstance(parsed, dict) else None


def _text_of(body: bytes) -> str:
    # A byte that is no text must not lose the rest of a reply that was paid for.
    return body.decode(json.detect_encoding(body), "replace").lstrip("\ufeff")


def _parse(text: str) -> Any:
    try:
        return _DECODER.decode(text.strip(" \t\r\n\0"))
    except (RecursionError, ArithmeticError) as exc:
        raise ValueError("the body is not JSON") from exc


def _without_comments(text: str) -> str:
    """Leave out the comments of an event stream before the JSON: `: OPENROUTER PROCESSING`."""
    text = text.lstrip()
    while text.startswith(":"):
        _, _, text = text.partition("\n")
        text = text.lstrip()
    return text


def _events(text: str) -> Iterator[Any]:
    """Yield the data of an event stream, parsed; what is not JSON, such as `[DONE]`, is left out."""
    lines: list[str] = []
    for line in [*text.splitlines(), ""]:
        if line.startswith("data:"):
            lines.append(line[5:].strip())
        elif not line.strip() and lines:
            data = "\n".join(lines)
            # Some servers leave out the empty line between two events.
            for part in (data,) if _is_json(data) else lines:
                if _is_json(part):
                    yield _parse(part)
            lines.clear()


def _is_json(text: str) -> bool:
    try:
        _parse(text)
    except ValueError:
        return False
    return True


def _joined(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return the completion that the parts of a stream make up."""
    document: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    for event in events:
        document |= {name: value for name, value in event.items() if name != "choices" and value is not None}
        for choice in tables_of(event.get("choices")):
            index = choice.get("index")
            _add_choice(choices.setdefault(index if type(index) is int else 0, {"message": {}}), choice)
    if choices:
        document["choices"] = [choices[index] for index in sorted(choices)]
    return document


def _add_choice(joined: dict[str, Any], choice: dict[str, Any]) -> None:
    joined |= {name: value for name, value in choice.items() if name not in ("delta", "message") and value is not None}
    message: dict[str, Any] = joined["message"]
    for part in (choice.get("delta"), choice.get("message")):
        for name, value in as_table(part).items():
            if name == "tool_calls":
                _add_tool_calls(message.setdefault("tool_calls", []), value)
            elif _can_be_joined(name, message.get(name), value):
                message[name] += value
            elif value is not None:
                message[name] = value


def _can_be_joined(name: str, old: object, new: object) -> bool:
    is_text = name in _JOINED and isinstance(old, str) and isinstance(new, str)
    return is_text or (isinstance(old, list) and isinstance(new, list))


def _add_tool_calls(joined: list[dict[str, Any]], calls: object) -> None:
    for position, call in enumerate(tables_of(calls)):
        index = call.get("index", position)
        found = next((each for each in joined if each.get("index", 0) == index), None)
        if found is None:
            joined.append({"index": index, **call, "function": dict(call.get("function") or {})})
            continue
        for name, value in as_table(call.get("function")).items():
            old = found["function"].get(name)
            found["function"][name] = old + value if isinstance(old, str) and isinstance(value, str) else value
        found.update({name: call[name] for name in ("id", "type") if call.get(name)})
