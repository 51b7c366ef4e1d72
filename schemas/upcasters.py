"""Reading ledger entries of every version ever written.

Each upcaster lifts a payload by one version; an entry passes through all that it needs.
A written entry is never changed: it is lifted each time it is read.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, Final

from pydantic import ValidationError

from tollbook.schemas.events import ENVELOPE_FIELDS, EVENT_VERSION, Event, parse_payload

Upcaster = Callable[[dict[str, Any]], dict[str, Any]]

# (type, version) -> a function that lifts the payload to version + 1. Version 1 is the first.
UPCASTERS: Final[dict[tuple[str, int], Upcaster]] = {}


class UnreadableEvent(ValueError):
    """A ledger entry is not an event of any known version. Never skipped: reading stops here."""

    def __init__(self, entry_id: str, problem: str) -> None:
        super().__init__(f"ledger entry {entry_id} cannot be read: {problem}")
        self.entry_id = entry_id


def upcast(event_type: str, version: int, payload: dict[str, Any]) -> dict[str, Any]:
    """Lift a payload to the current version. Errors: ValueError for a version newer than this program."""
    if not 1 <= version <= EVENT_VERSION:
        raise ValueError(f"version {version} is not one of 1 to {EVENT_VERSION}; a newer program wrote it")
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
        raise UnreadableEvent(entry_id, f"missing {', '.join(missing)}")
    try:
        version = int(fields["v"])
        document = upcast(fields["type"], version, json.loads(fields["payload"]))
        return Event(
            id=entry_id,
            v=version,
            seq=int(fields["seq"]),
            user_id=fields["user_id"],
            period=fields["period"],
            call_id=fields["call_id"],
            attempt=int(fields["attempt"]),
            amount=int(fields["amount"]),
            committed=int(fields["committed"]) if fields["committed"] else None,
            payload=parse_payload(fields["type"], document),
        )
    except ValidationError as exc:
        raise UnreadableEvent(entry_id, f"{exc.error_count()} fields do not validate") from exc
    except (TypeError, ValueError) as exc:
        raise UnreadableEvent(entry_id, str(exc)) from exc
