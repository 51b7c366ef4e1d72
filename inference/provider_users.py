"""The user name that is sent to a provider: a keyed hash of the user id, nothing, or the id itself (G10).

With the hash, the provider can tell users apart, against abuse and for its cache, but cannot identify them. The key of
the hash belongs to the ledger: it is made once and stored only in Redis, in no event and no archive.
"""

import hashlib
import hmac
import secrets
from collections.abc import Callable
from typing import Final, Literal, assert_never

from tollbook.ledger.errors import LedgerUnavailable
from tollbook.ledger.keys import Keys
from tollbook.ledger.server.pipeline import CommandPipeline

_FIELD: Final = "provider_user_key"
_KEY_BYTES: Final = 32


async def ledger_user_key(pipeline: CommandPipeline, keys: Keys, copy: bytes | None = None) -> bytes:
    """Return the ledger's key for users' names; if there is none, store `copy` or a new key.

    If several processes do so at once, all get the same key. Errors: LedgerUnavailable.
    """
    found = await stored_user_key(pipeline, keys)
    if found is None:
        new = secrets.token_bytes(_KEY_BYTES) if copy is None else copy
        await pipeline.execute("HSETNX", keys.secrets, _FIELD, new.hex())
        found = await stored_user_key(pipeline, keys)
    if found is None:
        raise LedgerUnavailable("Redis has lost the key for the users' names that providers get; try again")
    return found


async def stored_user_key(pipeline: CommandPipeline, keys: Keys) -> bytes | None:
    """Return the ledger's key for users' names, or None. Errors: LedgerUnavailable."""
    found: bytes | None = await pipeline.execute("HGET", keys.secrets, _FIELD)
    return None if found is None else bytes.fromhex(found.decode())


def provider_user_of(form: Literal["hashed", "none", "plain"], key: bytes) -> Callable[[str], str | None]:
    """Return a function from a user's id to the name for the provider; the hash has 64 hexadecimal digits."""
    match form:
        case "hashed":
            return lambda user_id: hmac.new(key, user_id.encode(), hashlib.sha256).hexdigest()  # G10
        case "none":
            return lambda user_id: None  # noqa: ARG005 - no user is named.
        case "plain":
            return lambda user_id: user_id
        case _:
            assert_never(form)
