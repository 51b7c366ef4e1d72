"""Reasoning details: the reasoning that must be sent back to a provider, in OpenRouter's form (November 2026).

A detail is an object with a `type`: `reasoning.text` (with `text` and `signature`), `reasoning.summary` or
`reasoning.encrypted` (with `data`). A streamed detail comes in pieces: parts of its text, then its signature.
"""

from collections.abc import Mapping
from typing import Any, Final

Detail = dict[str, Any]
TEXTS: Final = ("text", "summary")
"""The members whose text comes in pieces."""
SIGNED: Final = ("signature", "data")
"""A detail with one of these members must be sent back unchanged."""


class Details:
    """The details of one answer in their order, with an index that finds the detail to which a piece belongs."""

    def __init__(self, known: list[Detail] | None = None) -> None:
        """Keep the details in `known`, which must be empty."""
        self.known: list[Detail] = [] if known is None else known
        self._last_of: dict[str, int] = {}

    def place_of(self, piece: Mapping[str, Any]) -> int | None:
        """Return the place of the detail that a piece continues; None if the piece begins a new detail.

        A piece continues the last detail of its type and index. Without an index, it can continue only the very last
        detail.
        """
        place = self._last_of.get(_kind_of(piece))
        if place is None or (piece.get("index") is None and place != len(self.known) - 1):
            return None
        return place if _continues(self.known[place], piece) else None

    def begin(self, detail: Detail) -> int:
        """Add a detail, and return its place."""
        self.known.append(detail)
        self._last_of[_kind_of(detail)] = len(self.known) - 1
        return len(self.known) - 1


def _kind_of(piece: Mapping[str, Any]) -> str:
    return repr((piece.get("index"), piece.get("type")))


def _continues(known: Mapping[str, Any], piece: Mapping[str, Any]) -> bool:
    """Whether a piece can belong to a detail: parallel calls were seen to share an index, each with its own data."""
    if any(known.get(name) and piece.get(name) and known[name] != piece[name] for name in ("id", *SIGNED)):
        return False
    # A signature signs the text before it.
    has_text = any(piece.get(name) for name in TEXTS)
    return not (has_text and known.get("signature") and not piece.get("signature"))
