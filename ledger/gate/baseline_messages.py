"""What is said between those who ask for baselines and the projector: requests and answers as JSON.

Pure: text to values and back. Both kinds are bounded, and what is not exactly one of them is refused: whoever may
publish on a ledger's channels can send anything. Money is a whole number of nano-dollars, of any size.

    request  {"v": 1, "asker": "host-17-a1b2c3", "number": 5, "names": ["user:u42:2026-11"]}
    answer   {"v": 1, "number": 5, "ledger": "...", "position": ["1764374400000-0", 17], "balances": [[1200, 300]]}

`balances` has one for each name, in their order: null where DuckDB has none, false where it is not as it was folded.
In place of `position` and `balances`, `refused` or `unavailable` is the projector's error.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

from tollbook.ledger.errors import BaselineUnavailable, LedgerError, LedgerRefused
from tollbook.ledger.gate.baselines import MAX_PAGE_NAMES, BaselinePage
from tollbook.ledger.gate.requests import Position
from tollbook.schemas.identifiers import EntryId

VERSION: Final = 1
MAX_REQUEST_BYTES: Final = 400_000
MAX_ANSWER_BYTES: Final = 100_000
_MAX_MESSAGE_CHARACTERS: Final = 1_000
_ASKER: Final = re.compile(r"[A-Za-z0-9-]{1,100}")
_ENTRY: Final = re.compile(r"[0-9]{1,20}-[0-9]{1,20}")
_REFUSED: Final = "refused"
_UNAVAILABLE: Final = "unavailable"


class MessageMalformed(ValueError):
    """What arrived is no request, or no answer, of this version."""


@dataclass(frozen=True, slots=True)
class BaselineRequest:
    """What one process asks: `number` tells its requests apart, `asker` names the channel of its answers."""

    asker: str
    number: int
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BaselineAnswer:
    """What the projector of a ledger says to request `number`; `page` has what it read."""

    number: int
    ledger_id: str
    fields: Mapping[str, Any]

    def page(self, names: Sequence[str], *, partition: int) -> BaselinePage:
        """Return what was read of the names that were asked for.

        Errors: the projector's own, a BaselineUnavailable or a LedgerRefused; MessageMalformed.
        """
        for kind, error in ((_REFUSED, LedgerRefused), (_UNAVAILABLE, BaselineUnavailable)):
            if kind in self.fields:
                raise error(str(self.fields[kind])[:_MAX_MESSAGE_CHARACTERS])
        balances = self.fields.get("balances")
        if not isinstance(balances, list) or len(cast("list[Any]", balances)) != len(names):
            raise MessageMalformed("it has not one balance for each name")
        by_name = dict(zip(names, cast("list[Any]", balances), strict=True))
        return BaselinePage(
            positions={partition: _position(self.fields.get("position"))},
            balances={name: _amounts(each) for name, each in by_name.items() if each is not None and each is not False},
            changed=frozenset(name for name, each in by_name.items() if each is False),
        )


def request_text(request: BaselineRequest) -> str:
    """Return a request as it is published."""
    return _text({"v": VERSION, "asker": request.asker, "number": request.number, "names": request.names})


def read_request(text: bytes) -> BaselineRequest:
    """Errors: MessageMalformed."""
    document = _document(text, MAX_REQUEST_BYTES)
    asker, names = document.get("asker"), document.get("names")
    if not isinstance(asker, str) or not _ASKER.fullmatch(asker):
        raise MessageMalformed("it names no asker")
    if not isinstance(names, list) or len(cast("list[Any]", names)) > MAX_PAGE_NAMES:
        raise MessageMalformed(f"it has no list of at most {MAX_PAGE_NAMES} names")
    return BaselineRequest(asker, _count(document, "number"), tuple(_name(each) for each in cast("list[Any]", names)))


def answer_text(request: BaselineRequest, *, ledger_id: str, partition: int, found: BaselinePage | LedgerError) -> str:
    """Return the answer to a request, as it is published; `found` may have further names and partitions."""
    answer: dict[str, Any] = {"v": VERSION, "number": request.number, "ledger": ledger_id}
    if isinstance(found, LedgerError):
        kind = _REFUSED if isinstance(found, LedgerRefused) else _UNAVAILABLE
        return _text({**answer, kind: str(found)[:_MAX_MESSAGE_CHARACTERS]})
    position = found.positions.get(partition, Position())
    balances = [False if name in found.changed else found.balances.get(name) for name in request.names]
    return _text({**answer, "position": [str(position.entry), position.seq], "balances": balances})


def read_answer(text: bytes) -> BaselineAnswer:
    """Errors: MessageMalformed."""
    document = _document(text, MAX_ANSWER_BYTES)
    ledger_id = document.get("ledger")
    if not isinstance(ledger_id, str):
        raise MessageMalformed("it names no ledger")
    return BaselineAnswer(_count(document, "number"), ledger_id, document)


def _position(value: object) -> Position:
    match value:
        case [str(entry), int(seq)] if type(seq) is int and _ENTRY.fullmatch(entry):
            return Position(EntryId.parse(entry), seq)
        case _:
            raise MessageMalformed("it has no position")


def _amounts(value: object) -> tuple[int, int]:
    match value:
        case [int(settled), int(held)] if type(settled) is int and type(held) is int:
            return settled, held
        case _:
            raise MessageMalformed("a balance is not two whole numbers")


def _name(value: object) -> str:
    # DuckDB takes any text but these; they would fail the read for everybody whose request is in the same batch.
    if not isinstance(value, str) or "\0" in value or _has_surrogates(value):
        raise MessageMalformed("a name is no text")
    return value


def _has_surrogates(text: str) -> bool:
    return not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)


def _count(document: dict[str, Any], field: str) -> int:
    value = document.get(field)
    if type(value) is not int or value < 0:
        raise MessageMalformed(f"its {field} is no number")
    return value


def _document(text: bytes, max_bytes: int) -> dict[str, Any]:
    if len(text) > max_bytes:
        raise MessageMalformed(f"it is longer than {max_bytes} bytes")
    try:
        document: Any = json.loads(text)
    except (ValueError, RecursionError):
        raise MessageMalformed("it is no JSON") from None
    if not isinstance(document, dict) or cast("dict[str, Any]", document).get("v") != VERSION:
        raise MessageMalformed(f"it is no message of version {VERSION}")
    return cast("dict[str, Any]", document)


def _text(document: dict[str, Any]) -> str:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"))
