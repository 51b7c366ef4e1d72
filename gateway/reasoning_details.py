"""What a provider wants back of a model's reasoning: signatures and encrypted parts, packed into one opaque text.

Results and deltas have them as `reasoning_details`. Clients of other APIs keep a text that they do not read
(`signature`, `encrypted_content`) and send it back with the next turn; there the details are unpacked as they came.
"""

import base64
import binascii
import json
from collections.abc import Iterable, Mapping
from typing import Any, Final, cast

from tollbook.schemas.reasoning_details import SIGNED, TEXTS, Detail, Details

_PREFIX: Final = "tollbook1."


def texts_of(details: Iterable[Mapping[str, Any]]) -> str:
    """Return what details say in words."""
    return "".join(each[name] for each in details for name in TEXTS if isinstance(each.get(name), str))


def is_wanted_back(details: Iterable[Mapping[str, Any]]) -> bool:
    """Whether details hold more than words."""
    return any(each.get(name) for each in details for name in SIGNED)


def add_details(joined: Details, pieces: Iterable[Mapping[str, Any]]) -> None:
    """Add the pieces of a chunk: the texts of those that go on are joined."""
    for piece in pieces:
        place = joined.place_of(piece)
        if place is None:
            joined.begin(dict(piece))
            continue
        known = joined.known[place]
        for name, value in piece.items():
            if name in TEXTS and isinstance(value, str):
                known[name] = (known.get(name) or "") + value
            elif value is not None:
                known[name] = value


def continued(earlier: Details, piece: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a piece with what came of its detail before: a signature is worth nothing without its text."""
    place = earlier.place_of(piece)
    if place is None or not is_wanted_back([piece]):
        return piece
    whole = Details()
    whole.begin(dict(earlier.known[place]))
    add_details(whole, [piece])
    return whole.known[0]


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
