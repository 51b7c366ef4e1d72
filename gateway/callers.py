"""Authentication: the key of a request, and the attributes that a client may set on its call.

Each wrong key from one address is answered later than the one before, against guessing.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, cast

from tollbook.gateway.problems import Problem, invalid
from tollbook.inference.api_keys import ApiKey
from tollbook.observability.gateway_counts import GatewayCounts
from tollbook.schemas.problems import shown
from tollbook.schemas.tags import read_tags

_MAX_KEY: Final = 200
_FIRST_DELAY_S: Final = 0.1
_MAX_DELAY_S: Final = 5.0
_MAX_ADDRESSES: Final = 10_000
_MAX_DELAYED: Final = 200
"""Wrong keys that are delayed at the same time; more are answered at once, so that they take no memory."""
USER_HEADER: Final = "x-tollbook-user"
_ATTRIBUTE_HEADERS: Final = {
    "user": USER_HEADER, "plan": "x-tollbook-plan", "campaign": "x-tollbook-campaign", "tags": "x-tollbook-tags",
}  # fmt: skip
STREAM_HEADER: Final = "x-tollbook-stream"


CALLER_HEADERS: Final = (*_ATTRIBUTE_HEADERS.values(), STREAM_HEADER)
"""Headers by which a client sets who is charged for a call, and what it counts under."""


class Keys(Protocol):
    """Finds keys, as `inference.api_keys.ApiKeys` does."""

    async def find(self, secret: str) -> ApiKey | None:
        """Return the key if it is valid now. Errors: LedgerUnavailable."""
        ...


@dataclass(frozen=True, slots=True)
class Attributes:
    """Who is charged for a call, and what it counts under."""

    user_id: str
    plan: str | None = None
    campaign_id: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict[str, str])
    stream: str | None = None


class Callers:
    """Authenticates requests by their keys, and counts wrong keys."""

    def __init__(self, keys: Keys, counts: GatewayCounts) -> None:
        self._counts = counts
        self._keys = keys
        self._failures: OrderedDict[str, int] = OrderedDict()
        self._delayed = 0

    async def admit(self, headers: Mapping[str, str], address: str) -> ApiKey:
        """Return the key of a request. Errors: Problem (401) without a valid key; LedgerUnavailable."""
        secret = secret_in(headers)
        key = await self._keys.find(secret) if secret else None
        if key is not None:
            self._failures.pop(address, None)
            return key
        await self._delay(address)
        what = "this key is unknown, has expired or was revoked" if secret else "a key is missing"
        raise Problem(
            401,
            "invalid_api_key",
            f"{what}: send a key of `tollbook keys create`, as `Authorization: Bearer tb-...` or `x-api-key`",
            kind="authentication_error",
            should_retry=False,
        )

    async def _delay(self, address: str) -> None:
        self._counts.wrong_keys += 1
        failures = self._failures.pop(address, 0)
        self._failures[address] = failures + 1
        if len(self._failures) > _MAX_ADDRESSES:
            self._failures.popitem(last=False)
        if self._delayed >= _MAX_DELAYED:
            return
        self._delayed += 1
        try:
            await asyncio.sleep(min(_FIRST_DELAY_S * 2 ** min(failures, 16), _MAX_DELAY_S))
        finally:
            self._delayed -= 1


def secret_in(headers: Mapping[str, str]) -> str:
    """Return the key in a request's headers; '' if there is none."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    secret = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "").strip()
    return secret if len(secret) <= _MAX_KEY and secret.isascii() else ""


def attributes_of(
    key: ApiKey, headers: Mapping[str, str], body: Mapping[str, Any], tag_names: frozenset[str]
) -> Attributes:
    """Return a call's attributes: those of the key, and those that the key lets the client set.

    A header is set on purpose, so it is refused if the key does not allow it. The body's `user` and `metadata` have
    other meanings in the APIs too, so they are ignored if the key does not allow them.
    Errors: Problem (403).
    """
    said = {name: _text_in(headers, header) for name, header in _ATTRIBUTE_HEADERS.items() if headers.get(header)}
    for name in said:
        if name not in key.allows:
            raise Problem(
                403,
                "attribute_not_allowed",
                f"this key does not allow its client to set {_ATTRIBUTE_HEADERS[name]!r}: "
                f"create one that does with `tollbook keys create --allow {name}`",
                kind="permission_error",
                should_retry=False,
            )
    user = said.get("user") or (_user_in(body) if "user" in key.allows else None) or key.user_id
    if not user:
        raise Problem(
            403,
            "no_user",
            "this key has no user, so nobody can be charged"
            + (f": name a user in `user` or {USER_HEADER}" if "user" in key.allows else ""),
            kind="permission_error",
            should_retry=False,
        )
    tags = _tags_in(said.get("tags", ""))
    if "tags" in key.allows and isinstance(metadata := body.get("metadata"), dict):
        given = cast("dict[str, object]", metadata)
        tags = {name: str(value) for name, value in given.items() if name in tag_names} | tags
    return Attributes(
        user_id=user,
        plan=said.get("plan") or key.plan,
        campaign_id=said.get("campaign") or key.campaign_id,
        tags={**tags, **key.tags},
        stream=_stream_of(key, headers.get(STREAM_HEADER)),
    )


def _text_in(headers: Mapping[str, str], header: str) -> str:
    """Return a header's text as UTF-8, so that it names the same user as the same text in a body.

    Errors: Problem (400).
    """
    try:
        # The server has decoded it as Latin-1, as HTTP says.
        return headers[header].encode("latin-1").decode()
    except UnicodeDecodeError:
        raise invalid(f"{header!r} must be in UTF-8") from None


def _user_in(body: Mapping[str, Any]) -> str | None:
    """Return the user that a body names. Errors: Problem (400)."""
    user = body.get("user")
    if user is not None and (isinstance(user, bool) or not isinstance(user, str | int)):
        raise invalid(f"'user' must be text, not {shown(user)}", param="user")
    return None if user is None else str(user)


def _tags_in(text: str) -> dict[str, str]:
    """Parse `team=red, tier=2`. Errors: Problem (400)."""
    try:
        return read_tags(filter(None, (each.strip() for each in text.split(","))))
    except ValueError as exc:
        raise invalid(f"{_ATTRIBUTE_HEADERS['tags']!r} must be like 'team=red, tier=2': {exc}") from None


def _stream_of(key: ApiKey, said: str | None) -> str | None:
    if said and said not in key.streams:
        raise Problem(
            403,
            "stream_not_allowed",
            f"this key does not allow the stream {said!r}",
            kind="permission_error",
            should_retry=False,
        )
    return said or (key.streams[0] if key.streams else None)


def check_model(key: ApiKey, model: str) -> None:
    """Refuse a model or task type that the key does not allow. Errors: Problem (403)."""
    if not key.may_call(model):
        raise Problem(
            403,
            "model_not_allowed",
            f"this key does not allow {model!r}; it allows {', '.join(key.models)}",
            kind="permission_error",
            param="model",
            should_retry=False,
        )
