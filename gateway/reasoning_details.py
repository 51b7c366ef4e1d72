"""Packs the parts of a model's reasoning that its provider wants back (signatures, encrypted parts) into one text.

Results and deltas have them as `reasoning_details`. Clients of other APIs keep an opaque text (`signature`,
`encrypted_content`) and send it back with the next turn. Then the details are unpacked unchanged.
"""

import base64
import binascii
import json
from collections.abc import Iterable, Mapping
from typing import Any, Final, cast

from tollbook.schemas.reasoning_details import SIGNED, TEXTS, Detail, Details

_PREFIX: Final = "tollbook1."


def texts_of(details: Iterable[Mapping[str, Any]]) -> str:
    """Return the readable text of details."""
    return "".join(each[name] for each in details for name in TEXTS if isinstance(each.get(name), str))


def is_wanted_back(details: Iterable[Mapping[str, Any]]) -> bool:
    """Whether details contain parts that the provider wants back."""
    return any(each.get(name) for each in details for name in SIGNED)


def add_details(joined: Details, pieces: Iterable[Mapping[str, Any]]) -> None:
    """Add the pieces of a chunk; the text of a continued detail is appended."""
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


def with_earlier_parts(earlier: Details, piece: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a piece together with the earlier parts of its detail, because a signature is useless without its text."""
    place = earlier.place_of(piece)
    if place is None or not is_wanted_back([piece]):
        return piece
    whole = Details()
    whole.begin(dict(earlier.known[place]))
    add_details(whole, [piece])
    return whole.known[0]


def pack(details: list[Detail]) -> str:
    """Return details as one text; '' if the provider wants nothing back."""
    if not is_wanted_back(details):
        return ""
    return _PREFIX + base64.urlsafe_b64encode(json.dumps(details, separators=(",", ":")).encode()).decode()


def unpack(text: object) -> list[Detail] | None:
    """Return the details in a text; None if `pack` did not make the text."""
    if not isinstance(text, str) or not text.startswith(_PREFIX):
        return None
    try:
        details: object = json.loads(base64.urlsafe_b64decode(text.removeprefix(_PREFIX)))
    except (binascii.Error, ValueError, RecursionError):
        return None
    if not isinstance(details, list) or not all(isinstance(each, dict) for each in cast("list[object]", details)):
        return None
    return cast("list[Detail]", details)
