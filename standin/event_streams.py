"""Completions as event streams: the same reply in parts, with its usage in the last part.

Other bodies (an error, a page of a proxy) are not streamed.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Final, cast

COMMENT: Final = b": PROCESSING\n\n"
DONE: Final = b"data: [DONE]\n\n"
_PART_CHARACTERS: Final = 9
_NUMBER: Final = re.compile(r'"<number ([^"<>]*)>"')
_WORD: Final = re.compile(r"\s*\S+\s*|\s+")
_TEXTS: Final = ("content", "refusal", "reasoning", "reasoning_content")
Cut = Callable[[str], Sequence[str]]
"""Cuts a text into the parts of a stream."""


def cut(text: str) -> list[str]:
    """Cut a text in two."""
    return [text[:_PART_CHARACTERS], text[_PART_CHARACTERS:]] if len(text) > _PART_CHARACTERS else [text]


def cut_into_tokens(text: str) -> list[str]:
    """Cut a text into its words, each a token of a completion."""
    return _WORD.findall(text)


def as_events(body: bytes, cut: Cut = cut) -> list[bytes] | None:
    """Return the events of a completion, with `[DONE]` at the end; None if the body is not a completion."""
    try:
        found: Any = json.loads(body, parse_float=_Literal)
    except ValueError:
        return None
    if not isinstance(found, dict) or "choices" not in found:
        return None
    document = cast("dict[str, Any]", found)
    usage: Any = document.pop("usage", None)
    events: list[Any] = [
        document | {"choices": [part]} for choice in document.pop("choices") or () for part in _parts(choice, cut)
    ]
    if usage is not None:
        events.append(document | {"choices": [], "usage": usage})
    return [*(b"data: %s\n\n" % _dumped(event) for event in events), DONE]


def _parts(choice: Any, cut: Cut) -> list[dict[str, Any]]:
    """Return a choice as parts with deltas; the last part has the finish reason."""
    ending = {name: value for name, value in choice.items() if name not in ("message", "index")}
    message: dict[str, Any] = {**(choice.get("message") or {})}
    details: list[dict[str, Any]] = message.pop("reasoning_details", None) or []
    is_in_details = message.get("reasoning") == "".join(detail.get("text") or "" for detail in details)
    if is_in_details:
        del message["reasoning"]
    deltas = [
        {"reasoning_details": [piece], **({"reasoning": piece["text"]} if is_in_details and "text" in piece else {})}
        for detail in details
        for piece in _pieces(detail, cut)
    ]
    for name in _TEXTS:
        if isinstance(text := message.get(name), str):
            deltas += [{name: part} for part in cut(text)]
            del message[name]
    calls: Any = message.pop("tool_calls", None)
    for index, call in enumerate(calls or ()):
        function: Any = call.get("function") or {}
        pieces = cut(function["arguments"]) if isinstance(function.get("arguments"), str) else None
        first = call | {"index": index} | ({"function": function | {"arguments": ""}} if pieces else {})
        deltas.append({"tool_calls": [first]})
        deltas += [{"tool_calls": [{"index": index, "function": {"arguments": piece}}]} for piece in pieces or ()]
    start = [message] if message else []
    parts = [{"index": choice.get("index", 0), "delta": delta, "finish_reason": None} for delta in [*start, *deltas]]
    return [*parts, {"index": choice.get("index", 0), "delta": {}, **ending}]


def _pieces(detail: dict[str, Any], cut: Cut) -> list[dict[str, Any]]:
    """Return a detail of reasoning in pieces, as OpenRouter streams it: its text, and then its signature."""
    text = detail.get("text")
    if not isinstance(text, str):
        return [detail]
    head = {name: value for name, value in detail.items() if name not in ("text", "signature")}
    signed = [{**head, "signature": detail["signature"]}] if detail.get("signature") else []
    return [*({**head, "text": part} for part in cut(text)), *signed]


class _Literal:
    """A number as its text in the body: a float could not hold a cost exactly."""

    def __init__(self, text: str) -> None:
        self.text = text


def _dumped(event: dict[str, Any]) -> bytes:
    text = json.dumps(event, default=lambda number: f"<number {number.text}>")
    return _NUMBER.sub(r"\1", text).encode()
