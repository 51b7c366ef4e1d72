"""What a provider wants back of a model's reasoning, in OpenRouter's form (`reasoning_details`, November 2026).

A detail is an object with a `type`: `reasoning.text` (with `text` and `signature`), `reasoning.summary` or
`reasoning.encrypted` (with `data`). Streamed, it comes in pieces: texts go on, and a signature is the last of it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

Detail = dict[str, Any]
TEXTS: Final = ("text", "summary")
"""The members that go on from piece to piece."""
WANTED_BACK: Final = ("signature", "data")
"""The members for which a detail must come back as it was."""


def place_of(known: Sequence[Mapping[str, Any]], piece: Mapping[str, Any]) -> int | None:
    """Return which of the known details a piece goes on; None where it begins a new one.

    It goes on the last of its type and index. Without an index, it goes on the last detail of all, if at all.
    """
    index = piece.get("index")
    places = range(len(known) - 1, -1, -1) if index is not None else range(len(known) - 1, len(known) - 2, -1)
    same = (
        place
        for place in places
        if place >= 0 and all(known[place].get(name) == piece.get(name) for name in ("index", "type"))
    )
    place = next(same, None)
    return place if place is not None and _goes_on(known[place], piece) else None


def _goes_on(known: Mapping[str, Any], piece: Mapping[str, Any]) -> bool:
    """Whether a piece can be of a detail: parallel calls were seen to share a number, each with data of its own."""
    if any(known.get(name) and piece.get(name) and known[name] != piece[name] for name in ("id", *WANTED_BACK)):
        return False
    # A signature is of the text before it.
    has_text = any(piece.get(name) for name in TEXTS)
    return not (has_text and known.get("signature") and not piece.get("signature"))
