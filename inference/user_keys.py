"""The key of users' hashes, the hashes, and the copy of the key in the projector's data directory.

Imports nothing heavy, since light commands use it to hash user ids.
"""

import hashlib
import hmac
import json
from pathlib import Path
from typing import Final

from tollbook.ledger.logs import LazyLogger
from tollbook.ledger.private_files import make_private_folder, read_private, write_private
from tollbook.schemas.identifiers import hashed_id, is_hashed_id

KEY_FILE: Final = "user-ids.key"
"""The copy of the ledger's key in the projector's data directory."""
# Another key than for the names sent to providers: such a name must not reveal the id on the ledger (G10).
_PURPOSE: Final = b"tollbook: users' ids on the ledger"
_log = LazyLogger(__name__)


def derived_key(ledger_key: bytes) -> bytes:
    """Return the key of users' ids, made from the ledger's own."""
    return hmac.new(ledger_key, _PURPOSE, hashlib.sha256).digest()


def hash_of(user_id: str, key: bytes) -> str:
    """Return the hash of an id by a derived key; a hash is returned unchanged."""
    if is_hashed_id(user_id):
        return user_id
    return hashed_id(hmac.new(key, user_id.encode(), hashlib.sha256).digest())


def keep_key_copy(data_dir: Path, ledger_id: str, key: bytes) -> None:
    """Store a copy of the ledger's key beside the projection; if that fails, log a warning."""
    if read_key_copy(data_dir, ledger_id) == key:
        return
    try:
        make_private_folder(data_dir)
        write_private(data_dir / KEY_FILE, json.dumps({"ledger_id": ledger_id, "key": key.hex()}) + "\n")
    except OSError as exc:
        _log.warning("user_ids.key_not_kept", problem=f"{exc.filename}: {exc.strerror}")


def read_key_copy(data_dir: Path, ledger_id: str | None = None) -> bytes | None:
    """Return the copy of the key in a data directory, or None; with `ledger_id`, only that ledger's."""
    try:
        document = json.loads(read_private(data_dir / KEY_FILE))
        return bytes.fromhex(document["key"]) if ledger_id in (None, document["ledger_id"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
