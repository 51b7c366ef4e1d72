"""Events of a `text/event-stream`, as bytes. Compact JSON has no line breaks, so each event's data is one line."""

import json
from collections.abc import Mapping
from typing import Any, Final

DONE: Final = b"data: [DONE]\n\n"
"""The last event of a chat completion."""


def data_event(data: Mapping[str, Any]) -> bytes:
    """Return one event without a name."""
    return f"data: {_line(data)}\n\n".encode()


def event_bytes(name: str, data: Mapping[str, Any]) -> bytes:
    """Return one event with its name."""
    return f"event: {name}\ndata: {_line(data)}\n\n".encode()


def _line(data: Mapping[str, Any]) -> str:
    return json.dumps(data, separators=(",", ":"))
