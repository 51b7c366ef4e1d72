"""Sessions of the web view: of visitors who signed in with a key, or with the link that `tollbook up` prints.

They are stored in Redis, so that every gateway of the ledger can read them, and signing out ends one everywhere. Redis
has only the SHA-256 of a session's id and of a link's secret, and only the hash of a key, which the ledger has too.
"""

import hashlib
import json
import secrets
from dataclasses import dataclass
from typing import Final

from tollbook.ledger.errors import LedgerUnavailable
from tollbook.ledger.keys import web_link, web_session
from tollbook.ledger.server.address import hide_password
from tollbook.ledger.server.connection import connect
from tollbook.ledger.server.pipeline import CommandPipeline

SESSION_S: Final = 12 * 3600
LINK_S: Final = 15 * 60
_RANDOM_BYTES: Final = 32
_MAX_SECRET: Final = 100


@dataclass(frozen=True, slots=True)
class Session:
    """An open session. `key_hash`: the hash of the key; None for the link of `tollbook up`, which is an admin's."""

    session_id: str
    key_hash: str | None

    @property
    def form_token(self) -> str:
        """The token in this session's forms; only somebody who can read its pages knows it."""
        return _digest(f"form {self.session_id}")


class Sessions:
    """The sessions of one ledger. Errors of every method: LedgerUnavailable."""

    def __init__(self, pipeline: CommandPipeline, namespace: str) -> None:
        self._pipeline = pipeline
        self._namespace = namespace

    async def begin(self, key_hash: str | None) -> Session:
        """Begin a session, which ends by itself after `SESSION_S` seconds."""
        session = Session(secrets.token_urlsafe(_RANDOM_BYTES), key_hash)
        value = json.dumps({"key_hash": key_hash})
        await self._pipeline.execute("SET", self._name(session.session_id), value, "EX", SESSION_S)
        return session

    async def find(self, session_id: str) -> Session | None:
        """Return an open session; None if it has ended or never existed."""
        if not 0 < len(session_id) <= _MAX_SECRET:
            return None
        value: bytes | None = await self._pipeline.execute("GET", self._name(session_id))
        return None if value is None else Session(session_id, json.loads(value)["key_hash"])

    async def end(self, session: Session) -> None:
        """End a session."""
        await self._pipeline.execute("DEL", self._name(session.session_id))

    async def make_link(self) -> str:
        """Return the secret of a link that works once, within `LINK_S` seconds."""
        secret = secrets.token_urlsafe(_RANDOM_BYTES)
        await self._pipeline.execute("SET", web_link(self._namespace, _digest(secret)), "1", "EX", LINK_S)
        return secret

    async def use_link(self, secret: str) -> bool:
        """Use up a link; return whether it was valid. The delete is atomic, so only one of several users succeeds."""
        if not 0 < len(secret) <= _MAX_SECRET:
            return False
        return bool(await self._pipeline.execute("DEL", web_link(self._namespace, _digest(secret))))

    def _name(self, session_id: str) -> str:
        return web_session(self._namespace, _digest(session_id))


async def make_link_at(redis_url: str, namespace: str) -> str:
    """Return the secret of a new link, made over a connection of its own. Errors: LedgerUnavailable."""
    redis = connect(redis_url)
    pipeline = CommandPipeline(redis)
    try:
        return await Sessions(pipeline, namespace).make_link()
    except OSError as exc:
        raise LedgerUnavailable(f"Redis at {hide_password(redis_url)}: {exc}") from None
    finally:
        await pipeline.aclose()
        await redis.aclose()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
