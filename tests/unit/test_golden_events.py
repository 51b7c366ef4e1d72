"""Every version of every event ever written stays readable: golden files of stored entries (G7)."""

import json
import re
from pathlib import Path
from typing import Any, Final, get_args

import pytest

from tollbook.schemas.events import (
    ENVELOPE_FIELDS,
    EVENT_VERSION,
    Event,
    EventPayload,
    FallbackUsed,
    PolicyApplied,
    payload_json,
)
from tollbook.schemas.upcasters import UPCASTERS, UnreadableEvent, event_from_entry, upcast

GOLDEN: Final = Path(__file__).parents[1] / "golden" / "events"
FILES: Final = sorted(GOLDEN.glob("v*/*.json"))
TYPES: Final = tuple(payload.model_fields["type"].default for payload in get_args(get_args(EventPayload)[0]))

# Types that an older version does not have.
SINCE: Final = {
    "credit-expired": 2,
    "alert-raised": 2,
    "policy-applied": 2,
    "budget-opened": 2,
    "ledger-recovered": 2,
    "plan-cleared": 2,
    "credit-revoked": 2,
    "key-created": 2,
    "key-revoked": 2,
}
# The fields that the gate puts in front of a payload; Python writes the rest.
STAMPS: Final[dict[str, tuple[str, ...]]] = {
    "budget-reserved": ("hold", "cap_nanousd", "deadline_ms", "assigned_plan", "content_hash", "budgets"),
    "budget-denied": (
        "budget",
        "cap_nanousd",
        "settled_nanousd",
        "held_nanousd",
        "reason",
        "assigned_plan",
        "content_hash",
    ),
    "cost-recorded": (
        "hold",
        "hold_nanousd",
        "overage_nanousd",
        "is_final",
        "assigned_plan",
        "content_hash",
        "budgets",
    ),
    "cost-adjusted": ("hold", "assumed_nanousd", "is_final", "budgets"),
    "plan-assigned": ("content_hash",),
    "plan-cleared": ("content_hash",),
    "credit-granted": ("budget", "cap_nanousd", "settled_nanousd", "held_nanousd", "content_hash"),
    "credit-revoked": ("budget", "cap_nanousd", "settled_nanousd", "held_nanousd", "content_hash"),
    "credit-expired": ("budget", "cap_nanousd", "settled_nanousd", "held_nanousd", "content_hash"),
    "alert-raised": ("kind", "budget", "window", "fraction", "cap_nanousd", "settled_nanousd", "cause"),
    "key-created": ("content_hash",),
    "key-revoked": ("at_ms", "content_hash"),
}


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _event(path: Path) -> Event:
    stored = _read(path)
    return event_from_entry(stored["id"], stored["fields"])


def _good() -> dict[str, str]:
    return _read(GOLDEN / "v1" / "budget-reserved.json")["fields"]


@pytest.mark.parametrize("version", range(1, EVENT_VERSION + 1))
def test_every_type_and_version_has_a_golden_file(version: int) -> None:
    found = {_read(path)["fields"]["type"] for path in FILES if path.parent.name == f"v{version}"}
    assert found == {kind for kind in TYPES if SINCE.get(kind, 1) <= version}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_stored_event_is_read_as_the_golden_file_says(path: Path) -> None:
    stored = _read(path)
    event = _event(path)
    assert event.model_dump(mode="json", exclude_defaults=True) == stored["event"]
    assert event.type == stored["fields"]["type"] == path.stem.split(".")[0]
    assert f"v{event.v}" == path.parent.name


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_stored_event_of_this_version_is_written_back_to_the_same_bytes(path: Path) -> None:
    fields, event = _read(path)["fields"], _event(path)
    assert list(fields) == list(ENVELOPE_FIELDS)
    if event.v < EVENT_VERSION:
        return  # It was upcast on reading; nothing writes the old version any more.
    assert json.loads(payload_json(event.payload)) == json.loads(fields["payload"])
    stamps = STAMPS.get(event.type, ())
    written = event.payload.model_dump_json(exclude={"type", *stamps}, exclude_none=True, exclude_defaults=True)
    stamped, own = fields["payload"][: -len(written) + 1], fields["payload"][-len(written) + 1 :]
    assert own == written[1:]
    assert set(json.loads(stamped.rstrip(",") + "}")) <= set(stamps)
    numbers = {"v": event.v, "seq": event.seq, "attempt": event.attempt, "amount": event.amount}
    assert {name: fields[name] for name in numbers} == {name: str(number) for name, number in numbers.items()}
    assert fields["committed"] == ("" if event.committed is None else str(event.committed))
    assert (fields["user_id"], fields["period"], fields["call_id"]) == (event.user_id, event.period, event.call_id)


@pytest.mark.parametrize("name", ENVELOPE_FIELDS)
def test_an_entry_without_a_field_is_not_skipped(name: str) -> None:
    fields = _good()
    del fields[name]
    with pytest.raises(UnreadableEvent, match=f"ledger entry 7-0 cannot be read: it has no {name}"):
        event_from_entry("7-0", fields)


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("type", "budget-reserved2", "'payload' has the unknown type 'budget-reserved2'"),
        ("v", "0", "its version is 0"),
        ("v", str(EVENT_VERSION + 1), "install a newer one"),
        ("v", "one", "'v' must be a whole number, not 'one'"),
        ("seq", "-1", "'seq' must be a whole number of at least 0, not -1"),
        ("seq", "", "'seq' must be a whole number, not ''"),
        ("period", "2026-13", "'period' must be a month such as '2026-11', not '2026-13'"),
        ("attempt", "-1", "'attempt' must be a whole number of at least 0, not -1"),
        ("attempt", "1.0", "'attempt' must be a whole number, not '1.0'"),
        ("amount", "", "'amount' must be a whole number, not ''"),
        ("amount", "1e3", "'amount' must be a whole number, not '1e3'"),
        ("amount", str(1_000_000 * 1_000_000_000 + 1), "must be a whole number from -10{15} to 10{15}, not 10{14}1"),
        ("committed", "much", "'committed' must be a whole number, not 'much'"),
        ("payload", "", "its payload is not JSON"),
        ("payload", "[]", "its payload must be a JSON object"),
        ("payload", "{}", "'payload.task_type' is missing"),
        ("payload", '{"hold":"1"}', "'payload.hold' must be a whole number of at least 0, not '1'"),
    ],
)
def test_an_entry_that_is_no_event_is_not_skipped(name: str, value: str, problem: str) -> None:
    with pytest.raises(UnreadableEvent, match="ledger entry 7-0 cannot be read") as refused:
        event_from_entry("7-0", _good() | {name: value})
    assert refused.value.entry_id == "7-0"
    assert re.search(problem, str(refused.value))


def test_an_event_of_a_newer_program_says_so() -> None:
    with pytest.raises(
        UnreadableEvent, match=f"version is {EVENT_VERSION + 1}, and this program knows 1 to {EVENT_VERSION}"
    ):
        event_from_entry("7-0", _good() | {"v": str(EVENT_VERSION + 1)})


def test_unknown_members_of_an_event_are_ignored() -> None:
    fields = _good()
    fields["payload"] = '{"invented":1,' + fields["payload"][1:]
    assert event_from_entry("7-0", fields).payload == event_from_entry("7-0", _good()).payload


def test_upcasters_lead_from_known_versions_to_the_next() -> None:
    assert all(kind in TYPES and 1 <= version < EVENT_VERSION for kind, version in UPCASTERS)
    assert upcast("budget-reserved", EVENT_VERSION, {"a": 1}) == {"a": 1}


def test_events_have_no_field_for_what_is_private() -> None:
    """G10: no prompt, completion, message or key has a place in an event."""
    # The content of a policy is configuration, which holds no secret.
    payloads = [payload for payload in get_args(get_args(EventPayload)[0]) if payload is not PolicyApplied]
    names = {name for payload in payloads for name in payload.model_fields}
    names |= PolicyApplied.model_fields.keys() - {"content"}
    private = ("prompt", "content", "completion", "message", "system", "text", "api_key", "token")
    assert not [name for name in names if name in private or name.endswith("_key")]


def test_empty_fields_are_not_written() -> None:
    payload = FallbackUsed(from_model="a", to_model="b", reason="timeout")
    assert payload_json(payload) == '{"from_model":"a","to_model":"b","reason":"timeout"}'


def test_the_time_of_an_event_is_that_of_its_id() -> None:
    assert event_from_entry("1795504509378-3", _good()).at_ms == 1_795_504_509_378
