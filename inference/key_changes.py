"""Creating, revoking and replacing keys of the HTTP gateway, each by an event with author and reason.

The step that appends the event also puts the key in force, or ends it. The key itself is returned once and never stored
(G10), so a repeated command cannot return it again.
"""

import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from pydantic import TypeAdapter, ValidationError

from tollbook.inference.api_keys import (
    KEY_ID_BYTES,
    SECRET_BYTES,
    IssuedKey,
    hash_of,
    issued_keys,
    key_id_of,
    secret_of,
)
from tollbook.inference.current_policy import CurrentPolicy
from tollbook.inference.user_ids import UserIds
from tollbook.ledger.clock import now_ms as clock_ms
from tollbook.ledger.errors import IdempotencyConflict, KeyAlreadyRevoked, KeyExpired, KeyUnknown
from tollbook.ledger.gate.ledger import Ledger
from tollbook.ledger.gate.requests import CreateKeyRequest, KeyRevocation, RevokeKeyRequest
from tollbook.ledger.signature import Signature, content_digest
from tollbook.schemas.events import KEY_ATTRIBUTES, KeyAttribute, KeyCreated, KeyRevoked, payload_json
from tollbook.schemas.identifiers import check_id
from tollbook.schemas.policy import Policy, check_plan, check_stream
from tollbook.schemas.problems import unknown_name
from tollbook.schemas.routes import resolve_model
from tollbook.schemas.tags import Tags
from tollbook.schemas.tasks import InvalidTask, ModelId

_TAGS: TypeAdapter[dict[str, str]] = TypeAdapter(Tags)
_MODEL: TypeAdapter[str] = TypeAdapter(ModelId)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyBounds:
    """What a new key is bound to, as in `ApiKey`. `expires_ms`: milliseconds since the epoch; None: never."""

    name: str | None = None
    user_id: str | None = None
    plan: str | None = None
    campaign_id: str | None = None
    tags: dict[str, str] = field(default_factory=dict[str, str])
    models: tuple[str, ...] = ()
    streams: tuple[str, ...] = ()
    allows: frozenset[KeyAttribute] = frozenset()
    is_admin: bool = False
    expires_ms: int | None = None


@dataclass(frozen=True, slots=True)
class CreatedKey:
    """A key that was created. `secret` is the key itself, or None if the same command had created it before."""

    key_id: str
    secret: str | None = field(repr=False)

    @property
    def is_new(self) -> bool:
        """Whether the key was created now."""
        return self.secret is not None


class KeyChanges:
    """Changes keys.

    Errors of every method: LedgerUnavailable; LedgerRefused.
    """

    def __init__(
        self,
        ledger: Ledger,
        policies: CurrentPolicy,
        user_ids: UserIds,
        *,
        now_ms: Callable[[], int] = clock_ms,
        random: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        """`random` returns the given number of secure random bytes."""
        self._ledger = ledger
        self._policies = policies
        self._user_ids = user_ids
        self._now_ms = now_ms
        self._random = random

    async def list(self) -> tuple[IssuedKey, ...]:
        """Return every key that was ever created, oldest first."""
        return issued_keys(await self._ledger.api_keys())

    async def find(self, key_id: str) -> IssuedKey:
        """Return a key by its public id. Errors: KeyUnknown."""
        for each in await self.list():
            if each.key.key_id == key_id:
                return each
        raise KeyUnknown(key_id)

    async def find_secret(self, secret: str) -> IssuedKey:
        """Return a key by its secret, for example to revoke a leaked key. Errors: KeyUnknown, without the secret."""
        digest = hash_of(secret)
        fields = await self._ledger.api_keys()
        found = issued_keys({name: value for name, value in fields.items() if name.startswith(digest)})
        if not found:
            raise KeyUnknown("of this secret")
        return found[0]

    async def create(self, bounds: KeyBounds, signature: Signature) -> CreatedKey:
        """Create a key, which is in force at once.

        Errors: InvalidTask for a plan, task type or stream that the policy does not have; ValueError for invalid
            bounds; IdempotencyConflict if the signature's key was used before for another command.
        """
        checked = check_bounds(bounds, self._policies.newest.policy, now_ms=self._now_ms())
        if checked.user_id is not None:
            checked = replace(checked, user_id=await self._user_ids.keep(checked.user_id))  # G10
        return await self._create(checked, signature, None)

    async def revoke(self, key_id: str, signature: Signature, *, after_ms: int = 0) -> KeyRevocation:
        """End a key, now or after `after_ms` milliseconds.

        Errors: KeyUnknown; KeyAlreadyRevoked if it is already revoked for that moment or earlier; IdempotencyConflict.
        """
        payload = KeyRevoked(key_id=key_id, author=signature.author, reason=signature.reason)
        request = RevokeKeyRequest(
            command_id=signature.command_id("key-revoked"),
            content_hash=content_digest("key-revoked", key_id, str(after_ms), signature.author, signature.reason),
            key_id=key_id,
            payload=payload_json(payload),
            after_ms=after_ms,
        )
        try:
            return await self._ledger.revoke_key(request)
        except IdempotencyConflict as exc:
            raise IdempotencyConflict(signature.key or request.command_id, kind="key") from exc

    async def rotate(self, key_id: str, signature: Signature, *, after_ms: int = 0) -> CreatedKey:
        """Create a key with the bounds of an old key, then revoke the old key, now or after `after_ms` milliseconds.

        After a crash in between, both keys are in force, and the list of keys shows the old one as replaced: revoke it.
        The signature's idempotency key is ignored. Errors: KeyUnknown; KeyAlreadyRevoked; KeyExpired.
        """
        old = await self.find(key_id)
        if old.revoked_ms is not None:
            raise KeyAlreadyRevoked(key_id, old.revoked_ms)
        if old.state(self._now_ms()) == "expired":
            raise KeyExpired(key_id)
        key, signature = old.key, replace(signature, key=None)
        bounds = KeyBounds(
            name=key.name,
            user_id=key.user_id,
            plan=key.plan,
            campaign_id=key.campaign_id,
            tags=key.tags,
            models=key.models,
            streams=key.streams,
            allows=frozenset(each for each in KEY_ATTRIBUTES if each in key.allows),
            is_admin=key.is_admin,
            expires_ms=key.expires_ms,
        )
        created = await self._create(bounds, signature, key_id)
        await self.revoke(key_id, signature, after_ms=after_ms)
        return created

    async def _create(self, bounds: KeyBounds, signature: Signature, replaces: str | None) -> CreatedKey:
        secret, key_id = secret_of(self._random(SECRET_BYTES)), key_id_of(self._random(KEY_ID_BYTES))
        payload = KeyCreated(
            key_id=key_id,
            hash=hash_of(secret),
            name=bounds.name,
            user_id=bounds.user_id,
            plan=bounds.plan,
            campaign_id=bounds.campaign_id,
            tags=bounds.tags or None,
            models=bounds.models,
            streams=bounds.streams,
            allows=tuple(sorted(bounds.allows)),
            is_admin=bounds.is_admin,
            expires_ms=bounds.expires_ms,
            replaces=replaces,
            author=signature.author,
            reason=signature.reason,
        )
        # A repeat generates another key with the same bounds.
        content = payload.model_dump(mode="json", exclude={"key_id", "hash"})
        request = CreateKeyRequest(
            command_id=signature.command_id("key-created"),
            content_hash=content_digest(json.dumps(content, sort_keys=True)),
            key_id=key_id,
            key_hash=payload.hash,
            payload=payload_json(payload),
        )
        try:
            done = await self._ledger.create_key(request)
        except IdempotencyConflict as exc:
            raise IdempotencyConflict(signature.key or request.command_id, kind="key") from exc
        return CreatedKey(key_id, None if done == "other" else secret)


def check_bounds(bounds: KeyBounds, policy: Policy, *, now_ms: int) -> KeyBounds:
    """Return bounds in the form in which they are stored.

    Errors: InvalidTask for names that the policy does not have; ValueError for invalid bounds.
    """
    if bounds.user_id is None and "user" not in bounds.allows and not bounds.is_admin:
        raise ValueError("a key needs a user whose budgets its calls count in: give one, or let clients name it")
    if bounds.expires_ms is not None and bounds.expires_ms <= now_ms:
        raise ValueError("a key must expire in the future")
    if bounds.plan is not None:
        check_plan(bounds.plan, policy)
    return replace(
        bounds,
        name=_checked_id("the name", bounds.name),
        user_id=_checked_id("the user", bounds.user_id),
        campaign_id=_checked_id("the campaign", bounds.campaign_id),
        tags=_checked_tags(bounds.tags),
        models=tuple(dict.fromkeys(_checked_model(each, policy) for each in bounds.models)),
        streams=tuple(dict.fromkeys(check_stream(each, policy) for each in bounds.streams)),
    )


def _checked_id(what: str, value: str | None) -> str | None:
    try:
        return None if value is None else check_id(value)
    except ValueError as exc:
        raise ValueError(f"{what} {exc}") from None


def _checked_tags(tags: dict[str, str]) -> dict[str, str]:
    try:
        return _TAGS.validate_python(tags)
    except ValidationError as exc:
        problem = str(exc.errors(include_url=False)[0]["msg"]).removeprefix("Value error, ")
        raise ValueError(f"tags {problem}") from None


def _checked_model(name: str, policy: Policy) -> str:
    """Return a task type or a model id. A model need not be in the policy, since prices may come from elsewhere."""
    if name in policy.task_types:
        return name
    known = [target.model for route in policy.tasks.values() for target in route.targets]
    known += [*policy.models, *policy.prices]
    model = resolve_model(name)
    # A model id begins with its maker, like `openai/gpt-5`. A word without a slash is more likely a misspelt task type.
    if model not in known and "/" not in model:
        raise InvalidTask(unknown_name("task type or model", name, (*policy.task_types, *dict.fromkeys(known))))
    try:
        return _MODEL.validate_python(model)
    except ValidationError:
        raise ValueError(f"{name!r:.80} is not a valid model id") from None
