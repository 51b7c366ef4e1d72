"""How Tollbook makes its Redis clients.

Two features of redis-py (8.1, read in November 2026) are switched off, since each breaks a
guarantee: it sends a command again after a lost connection, and under Python 3.11 its
socket timeout (`asyncio.wait_for`) loses a cancellation that arrives while the command is
sent, so that a loop which was told to stop goes on. Callers set timeouts of their own.
"""

import re
from collections.abc import Sequence
from typing import Final

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

CONNECT_TIMEOUT_S: Final = 5.0
ANSWER_TIMEOUT_S: Final = 30.0
_PASSWORD: Final = re.compile(r"(://[^:@/]*:).*@")
_PASSWORD_PARAMETER: Final = re.compile(r"(\w*password=)[^&]*", re.IGNORECASE)


def connect(redis_url: str) -> Redis:
    """Return a client that never repeats a command by itself and can be cancelled at any moment."""
    return Redis.from_url(  # pyright: ignore[reportUnknownMemberType]
        redis_url,
        retry=Retry(NoBackoff(), 0),
        socket_timeout=None,
        socket_connect_timeout=CONNECT_TIMEOUT_S,
        socket_keepalive=True,
        health_check_interval=0,
    )


def hide_password(redis_url: str) -> str:
    """Return the URL without its passwords, for logs and messages."""
    # redis-py takes any option as a URL parameter too, such as the passwords of the server and of a TLS key. A password
    # that should have been quoted, with a ? or # in it, must be hidden as well.
    return _PASSWORD_PARAMETER.sub(r"\1***", _PASSWORD.sub(r"\1***@", redis_url))  # G10


def time_ms(reply: Sequence[bytes | int]) -> int:
    """Return the reply of TIME in milliseconds since the epoch."""
    seconds, microseconds = reply
    return int(seconds) * 1000 + int(microseconds) // 1000
