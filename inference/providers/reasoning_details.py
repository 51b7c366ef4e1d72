"""Reading reasoning details, which a provider wants back in later turns: whole, or in pieces that are passed on.

Invariant: the pieces that are passed on, joined, equal the details of the result; a text and its signature are in one
detail. Anthropic's own API has blocks instead; they are converted to details as OpenRouter does it.
"""

from collections.abc import Mapping
from typing import Any, Final

from tollbook.inference.providers.json_values import plain, storable, tables_of
from tollbook.inference.providers.tool_call_parts import TextParts
from tollbook.schemas.reasoning_details import TEXTS, Detail, Details

_OF_ANTHROPIC: Final = "anthropic-claude-v1"
_NAMES: Final = ("type", "index", "id")
"""Fields that identify a detail; each piece has them."""
_WITHOUT_CONTENT: Final = (*_NAMES, "format")


def details_in(value: object) -> tuple[Detail, ...]:
    """Return the details in a list, without empty fields and details without content."""
    joined = (_joined(_cleaned(each), _texts(each)) for each in tables_of(value))
    return tuple(detail for detail in joined if _has_content(detail))


def thinking_detail(index: int, block: Mapping[str, Any]) -> Detail:
    """Return one of Anthropic's thinking blocks, or a delta of it, as a detail or a piece of one."""
    members = {"text": block.get("thinking"), "signature": block.get("signature")}
    return {"type": "reasoning.text", "index": index, "format": _OF_ANTHROPIC, **members}


def redacted_detail(index: int, block: Mapping[str, Any]) -> Detail:
    """Return one of Anthropic's blocks of encrypted thinking as a detail."""
    return {"type": "reasoning.encrypted", "index": index, "format": _OF_ANTHROPIC, "data": block.get("data")}


class DetailParts:
    """Joins the pieces of the details of one answer."""

    def __init__(self) -> None:
        self._details = Details()
        self._parts: list[_Parts] = []

    def add(self, piece: Mapping[str, Any]) -> Detail | None:
        """Add a piece; return the piece to pass on, or None."""
        fields, texts = _cleaned(piece), _texts(piece)
        place = self._details.place_of({**fields, **texts})
        if place is None:
            place = self._details.begin({**fields})
            self._parts.append(_Parts(self._details.known[place]))
        return self._parts[place].add(fields, texts)

    def end(self) -> list[Detail]:
        """Return the last pieces to pass on: withheld halves of surrogate pairs."""
        return [part for parts in self._parts if (part := parts.end()) is not None]

    def joined(self) -> list[Detail]:
        """Return the complete details."""
        return [detail for parts in self._parts if _has_content(detail := parts.joined())]


class _Parts:
    """The pieces of one detail, with its fields so far."""

    def __init__(self, fields: Detail) -> None:
        self._fields = fields
        self._texts: dict[str, TextParts] = {}
        self._passed: Detail = {}

    def add(self, fields: Detail, texts: Mapping[str, str]) -> Detail | None:
        self._fields.update(fields)
        return self._pass({name: self._texts.setdefault(name, TextParts()).add(text) for name, text in texts.items()})

    def end(self) -> Detail | None:
        return self._pass({name: text.end() for name, text in self._texts.items()})

    def joined(self) -> Detail:
        return _joined(self._fields, {name: str(text) for name, text in self._texts.items()})

    def _pass(self, texts: Mapping[str, str]) -> Detail | None:
        """Return the new fields, if they have content. If a text continues after its signature, both are passed on."""
        repeated = (*_NAMES, "signature") if any(texts.values()) else _NAMES
        new_fields = {
            name: value
            for name, value in self._fields.items()
            if name in repeated or name not in self._passed or self._passed[name] != value
        }
        new_texts = {name: text for name in self._texts if (text := texts.get(name, "")) or name not in self._passed}
        piece = {**new_fields, **new_texts}
        if not _has_content(piece):
            return None
        self._passed |= piece
        return piece


def _cleaned(detail: Mapping[str, Any]) -> Detail:
    """Return the fields that are no texts in pieces, without empty ones."""
    members = {storable(name): plain(value) for name, value in detail.items() if name not in TEXTS}
    return {name: value for name, value in members.items() if value is not None and value != ""}


def _texts(detail: Mapping[str, Any]) -> dict[str, str]:
    return {name: text for name in TEXTS if isinstance(text := detail.get(name), str)}


def _joined(fields: Detail, texts: Mapping[str, str]) -> Detail:
    return {**fields, **{name: storable(text) for name, text in texts.items()}}


def _has_content(detail: Mapping[str, Any]) -> bool:
    return any(value not in ("", None) for name, value in detail.items() if name not in _WITHOUT_CONTENT)
