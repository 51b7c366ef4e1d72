"""The body of a reply: bytes become a JSON object, whatever a server, a router or a proxy has put around it.

Read are: JSON with a byte-order mark, after white space or comments that kept the connection alive, or as the only
member of a list (Gemini's errors); and an event stream, asked for or not (`event_streams.py`).
"""

import json
from decimal import Decimal
from typing import Any, Final, cast

from tollbook.inference.providers.event_streams import read_stream
from tollbook.inference.providers.json_values import as_list

# Floats become Decimals, so that a cost is exact. NaN and infinities do too: they are then refused as a cost, and the
# rest of the reply is still read.
_DECODER: Final = json.JSONDecoder(parse_float=Decimal, parse_constant=Decimal)


def read_json(body: bytes) -> Any:
    """Parse JSON with exact numbers. Errors: ValueError."""
    return _parse(_text_of(body))


def read_document(body: bytes) -> tuple[dict[str, Any] | None, bool]:
    """Return the object that a reply consists of, None where it has none; and whether its stream was cut off."""
    try:
        text = _text_of(body)
    except ValueError:
        return None, False
    try:
        parsed = _parse(_without_comments(text))
    except ValueError:
        return read_stream(text, _parse)
    listed = as_list(parsed)
    parsed = listed[0] if len(listed) == 1 else parsed
    return cast(dict[str, Any], parsed) if isinstance(parsed, dict) else None, False


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
