"""Pages about keys of the gateway: the list, one key, and changes. A new key is shown only once, and never stored."""

import secrets
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from tollbook.inference.api_keys import IssuedKey
from tollbook.inference.key_changes import CreatedKey, KeyBounds
from tollbook.ledger.errors import IdempotencyConflict, KeyAlreadyRevoked, KeyExpired, KeyUnknown
from tollbook.schemas.events import KEY_ATTRIBUTES
from tollbook.schemas.tags import read_tags
from tollbook.schemas.tasks import InvalidTask
from tollbook.views.api_keys import bounds_text, key_document, origin_text, state_text
from tollbook.views.web.parts import Cell, Fact, Field, Form, Notice, Page, Table, Tone, link, rows_of
from tollbook.views.web.spend_pages import reason_field
from tollbook.views.web.visit import Visit
from tollbook.views.web.visitors import Refused

_TONES: dict[str, Tone] = {"active": "good", "expired": "warn", "revoked": "bad"}
_DAYS = (("", "never"), ("1", "in a day"), ("30", "in 30 days"), ("90", "in 90 days"), ("365", "in a year"))
_HOURS = (("0", "at once"), ("1", "in an hour"), ("24", "in 24 hours"), ("168", "in 7 days"))
_ALLOWED = {"user": "the user", "campaign": "the campaign", "tags": "tags", "plan": "the plan"}


async def keys_page(visit: Visit) -> Page:
    """Show every key that was ever created, valid ones first."""
    documents = await _documents(visit)
    order = {"active": 0, "expired": 1, "revoked": 2}
    shown = sorted(documents, key=lambda each: (order[each["state"]], -documents.index(each)))
    rows = rows_of(
        [
            Cell(each["key_id"], "id", link("/key", id=each["key_id"])),
            Cell(each["name"] or "-"),
            Cell(each["user_id"] or "-", "id", link("/user", id=each["user_id"]) if each["user_id"] else ""),
            Cell(each["state"], "state", tone=_TONES[each["state"]]),
            Cell(bounds_text(each) or "-", details=[_end(each)] if _end(each) else []),
        ]
        for each in shown
    )
    table = Table("Keys of the gateway", ("Id", "Name", "User", "State", "Bounds"), rows, empty="There is no key yet.")
    return Page("Keys", [table, _create_form(visit)], here="/ui/keys", freshness="Read just now.")


def _end(document: dict[str, Any]) -> str:
    text = state_text(document)
    return "" if text == document["state"] else text.removeprefix("active, ")


async def key_page(visit: Visit) -> Page:
    """Show one key, with forms to replace or revoke it."""
    document = await _find(visit)
    key_id, is_active = document["key_id"], document["state"] == "active"
    user = document["user_id"]
    facts = [
        Fact("Id", Cell(key_id, "id")),
        Fact("Name", Cell(document["name"] or "-")),
        Fact("User", Cell(user or "-", "id", link("/user", id=user) if user else "")),
        Fact("State", Cell(state_text(document), "state", tone=_TONES[document["state"]])),
        Fact("Bounds", Cell(bounds_text(document) or "none beside its user")),
        Fact("History", Cell(origin_text(document))),
    ]
    notices = [Notice("The key was revoked.", "good")] if visit.asked("done") == "revoked" else []
    forms = [_rotate_form(key_id), _revoke_form(key_id)] if is_active and document["revoked_at"] is None else []
    return Page(f"Key {document['name'] or key_id}", [facts, *forms], here="/ui/keys", notices=notices)


async def create_key(visit: Visit) -> Page:
    """Create a key and show it once. Errors: Refused; LedgerUnavailable; LedgerRefused."""
    days = visit.sent("days")
    if days not in (None, *(value for value, _ in _DAYS)):
        raise Refused(400, f"{days!r} is not one of the choices of when a key expires")
    # The end of a day, so that a form that is sent twice has the same content.
    today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    expires = None if days is None else today + timedelta(days=int(days) + 1)
    bounds = KeyBounds(
        name=visit.sent("name"),
        user_id=visit.sent("user"),
        plan=visit.sent("plan"),
        campaign_id=visit.sent("campaign"),
        tags=_tags(visit.words("tags")),
        models=tuple(visit.words("models")),
        streams=tuple(visit.words("streams")),
        allows=frozenset(each for each in KEY_ATTRIBUTES if each in visit.sent_all("allows")),
        is_admin=visit.sent("admin") is not None,
        expires_ms=None if expires is None else round(expires.timestamp() * 1000),
    )
    try:
        created = await visit.sources.administration.keys.create(bounds, visit.sign())
    except (InvalidTask, ValueError, IdempotencyConflict) as exc:
        raise Refused(400, str(exc)) from None
    return _created_page("Key created", created)


async def rotate_key(visit: Visit) -> Page:
    """Replace a key by one with the same rights, and show the new key once. Errors: as `create_key`."""
    key_id = (await _find(visit))["key_id"]
    try:
        created = await visit.sources.administration.keys.rotate(key_id, visit.sign(), after_ms=_after_ms(visit))
    except (KeyAlreadyRevoked, KeyExpired) as exc:
        raise Refused(409, str(exc)) from None
    return _created_page("Key replaced", created)


async def revoke_key(visit: Visit) -> str:
    """Revoke a key. Errors: as `create_key`."""
    key_id = (await _find(visit))["key_id"]
    try:
        await visit.sources.administration.keys.revoke(key_id, visit.sign(), after_ms=_after_ms(visit))
    except (KeyAlreadyRevoked, IdempotencyConflict) as exc:
        raise Refused(409, str(exc)) from None
    return link("/key", id=key_id, done="revoked")


def _created_page(title: str, created: CreatedKey) -> Page:
    if created.secret is None:
        text = (
            "This form was already sent, and the key was shown then. It cannot be shown again; revoke it if it is lost."
        )
        return Page(title, [_to_list()], here="/ui/keys", notices=[Notice(text, "warn")])
    notice = Notice("Copy the key now: it is shown only once, because only its hash is kept.", "good")
    facts = [Fact("Key", Cell(created.secret, "secret")), Fact("Id", Cell(created.key_id, "id"))]
    return Page(title, [facts, _to_list()], here="/ui/keys", notices=[notice])


def _to_list() -> list[Fact]:
    return [Fact("More", Cell("All keys", href=link("/keys")))]


async def _documents(visit: Visit) -> list[dict[str, Any]]:
    keys: Sequence[IssuedKey] = await visit.sources.keys.list()
    now_ms = await visit.sources.keys.now_ms()
    named = await visit.sources.named(each.key.user_id for each in keys if each.key.user_id)
    documents = [key_document(each, now_ms) for each in keys]
    return [each | {"user_id": each["user_id"] and named(each["user_id"])} for each in documents]


async def _find(visit: Visit) -> dict[str, Any]:
    key_id = visit.asked("id") or ""
    for each in await _documents(visit):
        if each["key_id"] == key_id:
            return each
    raise Refused(404, str(KeyUnknown(key_id)))


def _after_ms(visit: Visit) -> int:
    hours = visit.sent("hours") or "0"
    if hours not in (value for value, _ in _HOURS):
        raise Refused(400, f"{hours!r} is not one of the choices of when a key ends")
    return int(hours) * 3_600_000


def _tags(words: Sequence[str]) -> dict[str, str]:
    try:
        return read_tags(words)
    except ValueError as exc:
        raise Refused(400, str(exc)) from None


def _create_form(visit: Visit) -> Form:
    policy = visit.sources.runtime.rules
    plans = [("", "as the policy says"), *((each, each) for each in policy.plans)]
    fields = [
        Field("user", "User", hint="Who is charged for its calls."),
        Field("name", "Name", hint="A name for people."),
        Field("plan", "Plan", kind="select", choices=plans),
        Field("campaign", "Campaign"),
        Field("tags", "Tags", hint="Such as team=red tier=2."),
        Field("models", "Models and task types", hint="Separated by spaces; if empty, any."),
        Field("streams", "Task streams", hint=f"Of {', '.join(policy.streams)}; the first is the default."),
        Field("days", "Expires", hint="At the end of that day.", kind="select", choices=_DAYS),
        reason_field(),
        Field("allows", "Clients may set", kind="checks", choices=[*_ALLOWED.items()]),
        Field(
            "admin",
            "Admin",
            kind="check",
            hint="It may see everything, and change keys, credit and plans.",
        ),
    ]
    return Form("Create a key", link("/keys"), fields, "Create the key", hidden={"command": secrets.token_hex(8)})


def _rotate_form(key_id: str) -> Form:
    fields = [Field("hours", "The old key ends", "24", kind="select", choices=_HOURS), reason_field()]
    text = "Creates a key with the same rights, shows it once, and revokes this one."
    return Form("Replace it", link("/key/rotate", id=key_id), fields, "Replace the key", text=text)


def _revoke_form(key_id: str) -> Form:
    fields = [Field("hours", "It ends", "0", kind="select", choices=_HOURS), reason_field()]
    hidden = {"command": secrets.token_hex(8)}
    text = "The gateway no longer accepts it. Running calls finish. This cannot be undone."
    return Form(
        "Revoke it", link("/key/revoke", id=key_id), fields, "Revoke the key", hidden=hidden, text=text, tone="bad"
    )
