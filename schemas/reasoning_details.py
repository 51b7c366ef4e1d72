"""What a provider wants back of a model's reasoning, in OpenRouter's form (`reasoning_details`, November 2026).

A detail is an object with a `type`: `reasoning.text` (with `text` and `signature`), `reasoning.summary` or
`reasoning.encrypted` (with `data`). Streamed, it comes in pieces: texts go on, and a signature is the last of it.
"""

from collections.abc import Mapping
from typing import Any, Final

Detail = dict[str, Any]
TEXTS: Final = ("text", "summary")
"""The members that go on from piece to piece."""
WANTED_BACK: Final = ("signature", "data")
"""The members for which a detail must come back as it was."""


class Details:
    """The details of one answer in their order; which of them a piece goes on is found without looking through them."""

    def __init__(self, known: list[Detail] | None = None) -> None:
        """Keep them in a list, which is empty."""
        self.known: list[Detail] = [] if known is None else known
        self._last_of: dict[str, int] = {}

    def place_of(self, piece: Mapping[str, Any]) -> int | None:
        """Return the place of the detail that a piece goes on; None where it begins a new one.

        It goes on the last of its type and index. Without an index, it goes on the last detail of all, if at all.
        """
        place = self._last_of.get(_kind_of(piece))
        if place is None or (piece.get("index") is None and place != len(self.known) - 1):
            return None
        return place if _goes_on(self.known[place], piece) else None

    def begin(self, detail: Detail) -> int:
        """Add a detail, and return its place."""
        self.known.append(detail)
        self._last_of[_kind_of(detail)] = len(self.known) - 1
        return len(self.known) - 1


def _kind_of(piece: Mapping[str, Any]) -> str:
    return repr((piece.get("index"), piece.get("type")))


def _goes_on(known: Mapping[str, Any], piece: Mapping[str, Any]) -> bool:
    """Whether a piece can be of a detail: parallel calls were seen to share a number, each with data of its own."""
    if any(known.get(name) and piece.get(name) and known[name] != piece[name] for name in ("id", *WANTED_BACK)):
        return False
    # A signature is of the text before it.
    has_text = any(piece.get(name) for name in TEXTS)
    return not (has_text and known.get("signature") and not piece.get("signature"))
