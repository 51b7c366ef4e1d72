"""The cluster slot of a command, by its key. Only the commands that Tollbook sends are known here."""

import binascii
from collections.abc import Sequence
from typing import Final

SLOTS: Final = 16384
Argument = str | bytes | int
Command = Sequence[Argument]

_WITHOUT_KEY: Final = frozenset(
    {"ACL", "CLIENT", "CLUSTER", "CONFIG", "FUNCTION", "INFO", "PING", "TIME", "WAIT", "WAITAOF"}
)
# These have a number of keys: FCALL name 2 key key.
_COUNTED: Final = frozenset({"EVAL", "FCALL", "FCALL_RO"})
# The key comes after a second word, unless redis-py has joined the two: `XGROUP CREATE`.
_TWO_WORDS: Final = frozenset({"MEMORY", "XGROUP", "XINFO"})
# The key comes after this word.
_KEY_AFTER: Final = {"XREAD": "STREAMS", "XREADGROUP": "STREAMS", "SCAN": "MATCH"}


def slot_of(key: Argument) -> int:
    """Return the slot of a key, by its hash tag (the text in its first braces) if there is one.

    A pattern without a wildcard in its braces has the slot of all keys that it can match.
    """
    name = key if isinstance(key, bytes) else str(key).encode()
    start = name.find(b"{")
    if start >= 0:
        end = name.find(b"}", start + 1)
        if end > start + 1:
            name = name[start + 1 : end]
    # The polynomial and start of the cluster specification's CRC16.
    return binascii.crc_hqx(name, 0) % SLOTS


def key_of(command: Command) -> Argument | None:
    """Return the first key of a command, None if it has none. All its keys must be in one slot."""
    name = command[0]
    if name == "FCALL":  # By far the most frequent.
        return command[3] if int(command[2]) else None
    first, _, second = str(name).upper().partition(" ")
    if first in _WITHOUT_KEY:
        return None
    if first in _COUNTED:
        return command[3] if int(command[2]) else None
    if first in _KEY_AFTER:
        words = [each.upper() if isinstance(each, str) else each for each in command]
        word = _KEY_AFTER[first]
        place = words.index(word) if word in words else words.index(word.encode()) if word.encode() in words else -1
        return command[place + 1] if place >= 0 else None
    return command[2 if first in _TWO_WORDS and not second else 1]
