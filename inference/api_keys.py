"""Keys of the HTTP gateway: looked up by their hash in Redis.

A key is `tb-` and 43 URL-safe characters, made from 32 random bytes. It is shown once and never stored: events and
Redis have only its SHA-256 (G10). A slow hash would not help: it protects passwords against guessing, but 256 random
bits cannot be guessed.

A key is looked up before its user is known, so all keys are in partition 0. This module changes nothing: keys are
created and revoked by `Administration`.
"""

import asyncio
import base64
import hashlib
import hmac
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

from pydantic import BaseModel, ValidationError

from tollbook.ledger.keys import Keys
from tollbook.ledger.logs import LazyLogger
from tollbook.ledger.server.connection import as_map
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.ledger.server.refusals import translating_redis_errors
from tollbook.schemas.events import KeyCreated, KeyRevoked
from tollbook.schemas.routes import resolve_model

SECRET_BYTES: Final = 32
KEY_ID_BYTES: Final = 6
# How long a key is cached, so the longest time until every process sees a revocation.
_CACHE_S: Final = 2.0
_MAX_CACHED: Final = 1_000
_SECRET: Final = re.compile(r"tb-[A-Za-z0-9_-]{43}")
_HASH: Final = re.compile(r"[0-9a-f]{64}")
_log = LazyLogger(__name__)

KeyState = Literal["active", "expired", "revoked"]


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What a key is bound to, without the key itself. `user_id` is as on the ledger, hashed if ids are hashed.

    `models` are model ids and task types; empty allows all. The first of `streams` is the default.
    """

    key_id: str
    name: str | None
    user_id: str | None
    plan: str | None
    campaign_id: str | None
    tags: dict[str, str]
    models: tuple[str, ...]
    streams: tuple[str, ...]
    allows: frozenset[str]
    is_admin: bool
    expires_ms: int | None

    def may_call(self, model_or_task_type: str) -> bool:
        """Whether the key may be used for a model or a task type, as the client names it."""
        named = {model_or_task_type, resolve_model(model_or_task_type)}
        return not self.models or not named.isdisjoint(self.models)


@dataclass(frozen=True, slots=True)
class IssuedKey:
    """A key with its history. Moments are milliseconds since the epoch, by the clock of Redis.

    `revoked_ms` may be in the future; it is None if the key was not revoked.
    """

    key: ApiKey
    created_ms: int
    created_by: str
    reason: str
    revoked_ms: int | None = None
    revoked_by: str | None = None
    replaces: str | None = None
    replaced_by: str | None = None

    def state(self, now_ms: int) -> KeyState:
        """Return whether the key is accepted at a moment, and if not, why."""
        if self.revoked_ms is not None and self.revoked_ms <= now_ms:
            return "revoked"
        return "expired" if self.key.expires_ms is not None and self.key.expires_ms <= now_ms else "active"


@dataclass(frozen=True, slots=True)
class _CachedKey:
    """A cached key, when it ends by the clock of Redis, and how far that clock is ahead of this process's."""

    key: ApiKey
    ends_ms: int | None
    ahead_ms: float
    read_s: float


class _Stamp(BaseModel):
    """The time stamp that the gate adds to a key's payload."""

    created_ms: int


class _Entry(NamedTuple):
    """What Redis has stored for one key, under its hash."""

    created_ms: int
    created: KeyCreated
    revoked: KeyRevoked | None


class ApiKeys:
    """The keys of one ledger.

    Errors of every method: LedgerUnavailable, also if Redis refuses the command (G8).
    """

    def __init__(self, pipeline: CommandPipeline, keys: Keys, *, monotonic: Callable[[], float]) -> None:
        """`keys` are those of partition 0; `monotonic` is a clock in seconds that never goes back."""
        self._pipeline = pipeline
        self._name = keys.api_keys
        self._monotonic = monotonic
        self._cached: dict[str, _CachedKey] = {}

    async def find(self, secret: str) -> ApiKey | None:
        """Return what a key is bound to; None if it is unknown, revoked or expired.

        A key is cached for two seconds at most. A known end of a key is applied at once, by the clock of Redis.
        """
        return await self.find_by_hash(hash_of(secret)) if is_secret(secret) else None

    async def find_by_hash(self, digest: str) -> ApiKey | None:
        """Do as `find`, but by the key's hash, for a client that has shown its key before."""
        cached = self._cached.get(digest)
        if cached is None or self._monotonic() - cached.read_s >= _CACHE_S:
            self._cached.pop(digest, None)
            cached = await self._read(digest)
        if cached is None:
            return None
        now_ms = self._monotonic() * 1000 + cached.ahead_ms
        return cached.key if cached.ends_ms is None or now_ms < cached.ends_ms else None

    async def list(self) -> tuple[IssuedKey, ...]:
        """Return every key that was ever created, oldest first."""
        with translating_redis_errors():
            found: Any = as_map(await self._pipeline.execute("HGETALL", self._name))
        return issued_keys({field.decode(): value.decode(errors="replace") for field, value in found.items()})

    async def now_ms(self) -> int:
        """Return the time by the clock of Redis, in milliseconds since the epoch."""
        return await self._pipeline.now_ms(self._name)

    async def _read(self, digest: str) -> _CachedKey | None:
        begun_s = self._monotonic()
        # In one batch. Redis reads its clock after `begun_s`, so that a key ends slightly too early, never too late.
        with translating_redis_errors():
            now_ms, (created, revoked) = await asyncio.gather(
                self.now_ms(), self._pipeline.execute("HMGET", self._name, digest, f"{digest} revoked")
            )
        entry = _entry(digest, created, revoked)
        if entry is None:
            return None
        ends = [each for each in (entry.created.expires_ms, entry.revoked and entry.revoked.at_ms) if each is not None]
        ends_ms = min(ends, default=None)
        if ends_ms is not None and ends_ms <= now_ms:
            return None
        cached = _CachedKey(_api_key(entry.created), ends_ms, now_ms - begun_s * 1000, begun_s)
        if len(self._cached) >= _MAX_CACHED:
            del self._cached[next(iter(self._cached))]
        self._cached[digest] = cached
        return cached


def is_secret(text: str) -> bool:
    """Whether a text has the form of a key, so that it must not be shown."""
    return _SECRET.fullmatch(text) is not None


def hash_of(secret: str) -> str:
    """Return the hash of a key, as the ledger has it."""
    return hashlib.sha256(secret.encode()).hexdigest()


def secret_of(random: bytes) -> str:
    """Return the key made from `SECRET_BYTES` random bytes."""
    return "tb-" + base64.urlsafe_b64encode(random).rstrip(b"=").decode()


def key_id_of(random: bytes) -> str:
    """Return the public id of a key, made from `KEY_ID_BYTES` random bytes other than the key's own."""
    return f"key-{random.hex()}"


def issued_keys(fields: dict[str, str]) -> tuple[IssuedKey, ...]:
    """Return the keys in the fields of the Redis hash, oldest first."""
    entries = [
        entry
        for field, value in fields.items()
        if (entry := _entry(field, value, fields.get(f"{field} revoked"))) is not None
    ]
    replaced_by = {entry.created.replaces: entry.created.key_id for entry in entries}
    keys = [
        IssuedKey(
            _api_key(entry.created),
            entry.created_ms,
            entry.created.author,
            entry.created.reason,
            revoked_ms=entry.revoked.at_ms if entry.revoked else None,
            revoked_by=entry.revoked.author if entry.revoked else None,
            replaces=entry.created.replaces,
            replaced_by=replaced_by.get(entry.created.key_id),
        )
        for entry in entries
    ]
    return tuple(sorted(keys, key=lambda each: (each.created_ms, each.key.key_id)))


def _entry(digest: str, created: bytes | str | None, revoked: bytes | str | None) -> _Entry | None:
    """Parse what Redis has stored under a key's hash; None if it is no key's, or was changed by hand."""
    if created is None or not _HASH.fullmatch(digest):
        return None
    try:
        entry = _Entry(
            _Stamp.model_validate_json(created).created_ms,
            KeyCreated.model_validate_json(created),
            None if revoked is None else KeyRevoked.model_validate_json(revoked),
        )
    except ValidationError:
        _log.error("api_key.unreadable", key_hash=digest)  # The key is not accepted, and `verify` reports it.
        return None
    return entry if hmac.compare_digest(entry.created.hash, digest) else None  # G8


def _api_key(created: KeyCreated) -> ApiKey:
    return ApiKey(
        key_id=created.key_id,
        name=created.name,
        user_id=created.user_id,
        plan=created.plan,
        campaign_id=created.campaign_id,
        tags=dict(created.tags or {}),
        models=created.models,
        streams=created.streams,
        allows=frozenset(created.allows),
        is_admin=created.is_admin,
        expires_ms=created.expires_ms,
    )
