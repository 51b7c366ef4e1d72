"""What a provider wants back of a model's reasoning: signatures and encrypted parts, packed into one opaque text.

OpenRouter streams them as `reasoning_details`. Clients of other APIs keep a text that they do not read (`signature`,
`encrypted_content`) and send it back with the next turn; there the details are unpacked as they came.
"""

import base64
import binascii
import json
from collections.abc import Iterable, Mapping
from typing import Any, Final, cast

_PREFIX: Final = "tollbook1."
_JOINED: Final = ("text", "summary")
_WANTED_BACK: Final = ("signature", "data")
Detail = dict[str, Any]


def texts_of(details: Iterable[Mapping[str, Any]]) -> str:
    """Return what details say in words."""
    return "".join(each[name] for each in details for name in _JOINED if isinstance(each.get(name), str))


def is_wanted_back(details: Iterable[Mapping[str, Any]]) -> bool:
    """Whether details hold more than words."""
    return any(each.get(name) for each in details for name in _WANTED_BACK)


def add_details(joined: list[Detail], pieces: Iterable[Mapping[str, Any]]) -> None:
    """Add the pieces of a chunk: those of the same number and type go on, their texts are joined."""
    for piece in pieces:
        same = [each for each in joined if all(each.get(name) == piece.get(name) for name in ("index", "type"))]
        if not same or piece.get("index") is None:
            joined.append(dict(piece))
            continue
        for name, value in piece.items():
            if name in _JOINED and isinstance(value, str):
                same[0][name] = (same[0].get(name) or "") + value
            elif value is not None:
                same[0][name] = value


def packed(details: list[Detail]) -> str:
    """Return details as one text; an empty one where nothing is wanted back."""
    if not is_wanted_back(details):
        return ""
    return _PREFIX + base64.urlsafe_b64encode(json.dumps(details, separators=(",", ":")).encode()).decode()


def unpacked(text: object) -> list[Detail] | None:
    """Return the details in a text; None where it is another's."""
    if not isinstance(text, str) or not text.startswith(_PREFIX):
        return None
    try:
        details: object = json.loads(base64.urlsafe_b64decode(text.removeprefix(_PREFIX)))
    except (binascii.Error, ValueError, RecursionError):
        return None
    if not isinstance(details, list) or not all(isinstance(each, dict) for each in cast("list[object]", details)):
        return None
    return cast("list[Detail]", details)
