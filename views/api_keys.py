"""Shows keys of the HTTP gateway as documents and as a table."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from tollbook.inference.api_keys import IssuedKey
from tollbook.views.tables import Printer, Row, printable


def key_document(issued: IssuedKey, now_ms: int) -> dict[str, Any]:
    """Return a key's attributes and history; times in UTC. The key's secret is never in it."""
    key = issued.key
    return {
        "key_id": key.key_id,
        "name": key.name,
        "user_id": key.user_id,
        "state": issued.state(now_ms),
        "plan": key.plan,
        "campaign_id": key.campaign_id,
        "tags": key.tags,
        "models": list(key.models),
        "streams": list(key.streams),
        "allows": sorted(key.allows),
        "is_admin": key.is_admin,
        "created_at": _utc(issued.created_ms),
        "created_by": issued.created_by,
        "reason": issued.reason,
        "expires_at": _utc(key.expires_ms),
        "revoked_at": _utc(issued.revoked_ms),
        "revoked_by": issued.revoked_by,
        "replaces": issued.replaces,
        "replaced_by": issued.replaced_by,
    }


def print_keys(documents: Sequence[dict[str, Any]], printer: Printer | None = None) -> None:
    """Print documents of `key_document` as a table."""
    rows = [
        Row(
            [
                each["key_id"],
                printable(each["name"] or "-"),
                printable(each["user_id"] or "-"),
                state_text(each),
            ],
            [text for text in (bounds_text(each), origin_text(each)) if text],
        )
        for each in documents
    ]
    (printer or Printer()).table(("id", "name", "user", "state"), rows, "Keys of the gateway")


def state_text(document: dict[str, Any]) -> str:
    """Return whether a key is valid, and when it ends."""
    expires, revoked = document["expires_at"], document["revoked_at"]
    match document["state"]:
        case "revoked":
            return f"revoked {revoked}"
        case "expired":
            return f"expired {expires}"
        case _:
            # The earlier end applies; times in this format sort as text.
            ends = [(at, verb) for at, verb in ((revoked, "ends"), (expires, "expires")) if at]
            return "active" + "".join(f", {verb} {at}" for at, verb in sorted(ends)[:1])


def bounds_text(document: dict[str, Any]) -> str:
    """Return a key's rights and attributes, without its user."""
    facts = {
        "plan": document["plan"],
        "campaign": document["campaign_id"],
        "tags": ", ".join(f"{name}={value}" for name, value in document["tags"].items()),
        "for": ", ".join(document["models"]),
        "on": ", ".join(document["streams"]),
        "clients may give": ", ".join(document["allows"]),
    }
    texts = ["admin"] * document["is_admin"] + [f"{name} {value}" for name, value in facts.items() if value]
    return printable("; ".join(texts))


def origin_text(document: dict[str, Any]) -> str:
    """Return who created and revoked a key, and why."""
    texts = [f"created {document['created_at']} by {document['created_by']}: {document['reason']}"]
    texts += [f"{verb} {document[name]}" for name, verb in _LINKS.items() if document[name]]
    texts += [f"revoked by {document['revoked_by']}"] * bool(document["revoked_by"])
    return printable("; ".join(texts))


_LINKS = {"replaces": "replaces", "replaced_by": "replaced by"}


def _utc(at_ms: int | None) -> str | None:
    return None if at_ms is None else f"{datetime.fromtimestamp(at_ms / 1000, UTC):%Y-%m-%dT%H:%M:%SZ}"
