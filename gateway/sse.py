"""Events of a `text/event-stream`, as bytes."""

import json
from collections.abc import Mapping
from typing import Any


def event_bytes(name: str, data: Mapping[str, Any]) -> bytes:
    """Return one event with its name. JSON has no line ends, so its data is one line."""
    return f"event: {name}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n".encode()
