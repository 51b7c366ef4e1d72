"""What the provider is told of a user: a keyed hash of the id, nothing, or the id itself (G10).

The hash lets the provider tell users apart, for abuse and for its cache, and says nothing of who they are. Its key is
the ledger's own: made once, kept in Redis alone, in no event and no archive.
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
    """Return the ledger's key for users' names; if it has none, `copy` or a new one, of many at once one's.

    Errors: LedgerUnavailable.
    """
    found = await stored_user_key(pipeline, keys)
    if found is None:
        made = secrets.token_bytes(_KEY_BYTES) if copy is None else copy
        await pipeline.execute("HSETNX", keys.secrets, _FIELD, made.hex())
        found = await stored_user_key(pipeline, keys)
    if found is None:
        raise LedgerUnavailable("Redis does not keep the key of the names that the provider is told")
    return found


async def stored_user_key(pipeline: CommandPipeline, keys: Keys) -> bytes | None:
    """Return the ledger's key for users' names, None where it has none. Errors: LedgerUnavailable."""
    found: bytes | None = await pipeline.execute("HGET", keys.secrets, _FIELD)
    return None if found is None else bytes.fromhex(found.decode())


def provider_user_of(form: Literal["hashed", "none", "plain"], key: bytes) -> Callable[[str], str | None]:
    """Return a function from a user's id to what the provider is told; the hash has 64 hexadecimal digits."""
    match form:
        case "hashed":
            return lambda user_id: hmac.new(key, user_id.encode(), hashlib.sha256).hexdigest()  # G10
        case "none":
            return lambda user_id: None  # noqa: ARG005 - nobody is named.
        case "plain":
            return lambda user_id: user_id
        case _:
            assert_never(form)
