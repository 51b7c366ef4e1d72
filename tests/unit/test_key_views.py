"""Keys of the gateway as people see them: in a table, and as events of an audit."""

from io import StringIO
from typing import Any

import pytest

from tollbook.inference.api_keys import ApiKey, IssuedKey
from tollbook.schemas.events import Event, KeyCreated, KeyRevoked
from tollbook.views.api_keys import key_document, print_keys
from tollbook.views.audit.texts import event_text, movement_text
from tollbook.views.tables import Printer

NOON_MS = 1_795_521_600_000  # 2026-11-24T12:00:00Z
DAY_MS = 86_400_000
WIDE: dict[str, Any] = {
    "name": "the web shop", "user_id": "customer-4711", "plan": "growth", "campaign_id": "spring:sale",
    "tags": {"team": "red", "env": "prod"}, "models": ("generate_draft", "openai/gpt-4o-mini"),
    "streams": ("generation",), "allows": frozenset({"tags", "plan"}), "is_admin": True,
}  # fmt: skip
BARE: dict[str, Any] = {
    "name": None, "user_id": None, "plan": None, "campaign_id": None, "tags": {}, "models": (), "streams": (),
    "allows": frozenset(), "is_admin": False,
}  # fmt: skip


def issued(bounds: dict[str, Any], *, expires_ms: int | None = None, **history: Any) -> IssuedKey:
    key = ApiKey(key_id="key-0123456789ab", expires_ms=expires_ms, **bounds)
    return IssuedKey(**{"key": key, "created_ms": NOON_MS, "created_by": "ann", "reason": "the shop"} | history)


def shown(*keys: IssuedKey, width: int = 80) -> str:
    file = StringIO()
    print_keys([key_document(each, NOON_MS) for each in keys], Printer(file, width=width))
    return file.getvalue()


def test_the_table_fits_a_terminal_of_80_columns() -> None:
    text = shown(
        issued(WIDE, expires_ms=NOON_MS + 30 * DAY_MS, replaces="key-ba9876543210"),
        issued(BARE, revoked_ms=NOON_MS, revoked_by="bob", replaced_by="key-ba9876543210"),
    )
    assert max(map(len, text.splitlines())) <= 80
    whole = " ".join(text.split())
    for words in (
        "key-0123456789ab the web shop customer-4711 active, expires 2026-12-24T12:00:00Z",
        "admin; plan growth; campaign spring:sale; tags team=red, env=prod; for generate_draft, openai/gpt-4o-mini; "
        "on generation; clients may give plan, tags",
        "created 2026-11-24T12:00:00Z by ann: the shop; replaces key-ba9876543210",
        "key-0123456789ab - - revoked 2026-11-24T12:00:00Z",
        "replaced by key-ba9876543210; revoked by bob",
    ):
        assert words in whole


@pytest.mark.parametrize(
    ("history", "state"),
    [
        ({}, "active"),
        ({"expires_ms": NOON_MS}, "expired 2026-11-24T12:00:00Z"),
        ({"expires_ms": NOON_MS, "revoked_ms": NOON_MS + DAY_MS}, "expired 2026-11-24T12:00:00Z"),
        ({"expires_ms": NOON_MS + 2 * DAY_MS, "revoked_ms": NOON_MS + DAY_MS}, "active, ends 2026-11-25T12:00:00Z"),
        ({"expires_ms": NOON_MS + DAY_MS, "revoked_ms": NOON_MS + 2 * DAY_MS}, "active, expires 2026-11-25T12:00:00Z"),
        ({"revoked_ms": NOON_MS - DAY_MS}, "revoked 2026-11-23T12:00:00Z"),
    ],
)
def test_the_state_of_a_key_names_its_first_end(history: dict[str, Any], state: str) -> None:
    lines = shown(issued(BARE, **history)).splitlines()
    (line,) = (line for line in lines if line.startswith(" key-"))
    assert line.endswith(f"  {state}")


def test_text_of_people_cannot_control_the_terminal() -> None:
    assert "\x1b" not in shown(issued(BARE, reason="\x1b[2J", created_by="\x1b[31mann"))


def event(payload: KeyCreated | KeyRevoked) -> Event:
    return Event(
        id=f"{NOON_MS}-0", v=2, seq=1, user_id="", period="", call_id="key 1", attempt=0, amount=0, committed=None,
        payload=payload,
    )  # fmt: skip


def test_the_events_of_a_key_are_described_without_its_hash() -> None:
    signed: dict[str, Any] = {"key_id": "key-0123456789ab", "author": "ann", "reason": "the shop"}
    created = event(
        KeyCreated(
            hash="5e" * 32, name="shop", user_id="u42", tags={"team": "red"}, models=("a/b",), allows=("tags",),
            is_admin=True, expires_ms=NOON_MS, **signed,
        )
    )  # fmt: skip
    headline, details = event_text(created)
    assert headline == "key key-0123456789ab created"
    assert details[:2] == [
        "an admin's key",
        "called shop, for user u42, tags team=red, for a/b, clients may give tags, expires 2026-11-24 12:00:00",
    ]
    assert "ann" in details[2]
    assert "5e5e" not in f"{details}{movement_text(created)}"
    assert event_text(event(KeyCreated(hash="5e" * 32, **signed)))[1] == [details[2]]
    assert event_text(event(KeyRevoked(at_ms=NOON_MS, **signed)))[0] == "key key-0123456789ab revoked"
    later = event_text(event(KeyRevoked(at_ms=NOON_MS + DAY_MS, **signed)))[0]
    assert later == "key key-0123456789ab revoked from 2026-11-25 12:00:00 on"
