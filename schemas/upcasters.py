"""Reading ledger entries of every version ever written.

Each upcaster converts a payload to the next version; an entry passes through all that it needs. An entry is never
changed once it is written (G7): it is converted each time it is read.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, Final, cast

from pydantic import ValidationError

from tollbook.schemas.events import ENVELOPE_FIELDS, EVENT_VERSION, Event
from tollbook.schemas.problems import as_text, problems_of, shown

Upcaster = Callable[[dict[str, Any]], dict[str, Any]]

# (type, version) -> a function that converts the payload to version + 1. Version 1 is the first.
UPCASTERS: Final[dict[tuple[str, int], Upcaster]] = {}


class UnreadableEvent(ValueError):
    """A ledger entry is not an event of any known version. It is never skipped: reading stops here."""

    def __init__(self, entry_id: str, problem: str) -> None:
        super().__init__(f"ledger entry {entry_id} cannot be read: {problem}")
        self.entry_id = entry_id


def needs_upcast(event_type: str, version: int) -> bool:
    """Whether upcasters change such a payload. Errors: ValueError for a version that this program does not know."""
    if not 1 <= version <= EVENT_VERSION:
        raise ValueError(f"its version is {version}, and this program knows 1 to {EVENT_VERSION}: install a newer one")
    return any((event_type, step) in UPCASTERS for step in range(version, EVENT_VERSION))


def upcast(event_type: str, version: int, payload: dict[str, Any]) -> dict[str, Any]:
    """Convert a payload to the current version. Errors: ValueError for a version that this program does not know."""
    if not needs_upcast(event_type, version):
        return payload
    for step in range(version, EVENT_VERSION):
        upcaster = UPCASTERS.get((event_type, step))
        payload = upcaster(payload) if upcaster else payload
    return payload


def event_from_entry(entry_id: str, fields: Mapping[str, str]) -> Event:
    """Read one stream entry as an event.

    Errors: UnreadableEvent, which names the entry and what is wrong with it.
    """
    missing = [name for name in ENVELOPE_FIELDS if name not in fields]
    if missing:
        raise UnreadableEvent(entry_id, f"it has no {', '.join(missing)}")
    try:
        columns: dict[str, Any] = {**fields, "id": entry_id}
        columns |= {name: _integer(name, fields[name]) for name in ("v", "seq", "attempt", "amount")}
        columns["committed"] = _integer("committed", fields["committed"]) if fields["committed"] else None
        payload = upcast(fields["type"], columns["v"], payload_object(fields["payload"]))
    except ValueError as exc:
        raise UnreadableEvent(entry_id, str(exc)) from exc
    return event_from_columns(columns, payload)


def event_from_columns(columns: Mapping[str, Any], payload: Mapping[str, Any]) -> Event:
    """Make an event from its envelope, by column, and its payload of the current version. Errors: UnreadableEvent."""
    try:
        return Event.model_validate({**columns, "payload": {**payload, "type": columns["type"]}})
    except ValidationError as exc:
        raise UnreadableEvent(str(columns["id"]), as_text(problems_of(exc, Event))) from exc


def payload_object(text: str) -> dict[str, Any]:
    """Parse the JSON of a payload. Errors: ValueError."""
    try:
        payload = json.loads(text)
    except (TypeError, ValueError):
        raise ValueError("its payload is not JSON") from None
    if not isinstance(payload, dict):
        raise ValueError("its payload must be a JSON object")  # noqa: TRY004 - its callers translate a ValueError.
    return cast(dict[str, Any], payload)


def _integer(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"'{name}' must be a whole number, not {shown(text)}") from None
