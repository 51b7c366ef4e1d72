"""Verification of the gateway's keys: what Redis has of them, compared with the events (G10: never a key).

A key that was put into Redis by hand would allow calls that nobody is responsible for; a removed one locks out its
owner, and a missing revocation makes a lost key valid again.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final, NamedTuple, cast

_REVOKED: Final = " revoked"


class KeyValue(NamedTuple):
    """What the events give for a field of the hash: JSON, of a key with when it was created; or a text."""

    key_id: str
    field: str
    document: str | None
    created_ms: int | None
    text: str | None

    @property
    def value(self) -> Any:
        """The value, decoded."""
        if self.document is None:
            return self.text
        stamp = {} if self.created_ms is None else {"created_ms": self.created_ms}
        return stamp | json.loads(self.document)


def changed_keys(found: Mapping[str, str], given: Iterable[KeyValue], *, without: Collection[str]) -> list[str]:
    """Describe each difference between Redis and the events, except for the keys with the ids in `without`."""
    expected = {each.field: each for each in given}
    problems: dict[str, None] = {}
    for name in sorted(found.keys() | expected.keys()):
        value = expected.get(name)
        key_id = value.key_id if value is not None else _key_id(found, name)
        if key_id in without:
            continue
        if value is None:
            problems[f"key {key_id or repr(name)}: {_what(name)} in Redis, and no event gives it"] = None
        elif name not in found:
            problems[f"key {key_id}: {_what(name)} by the events, and is missing in Redis"] = None
        elif _decoded(found[name]) != value.value:
            problems[f"key {key_id}: {_what(name)} otherwise in Redis than by the events"] = None
    return list(problems)


def _what(field: str) -> str:
    if field.endswith(_REVOKED):
        return "is revoked"
    return "has its hash" if field.startswith("key-") else "stands"


def _key_id(found: Mapping[str, str], field: str) -> str | None:
    """Return the id of the key that a field is about, as far as Redis shows it."""
    if field.startswith("key-"):
        return field
    document = _decoded(found[field])
    key_id = cast("dict[str, Any]", document).get("key_id") if isinstance(document, dict) else None
    return key_id if isinstance(key_id, str) else None


def _decoded(value: str) -> Any:
    try:
        return json.loads(value) if value.startswith("{") else value
    except ValueError:
        return value
