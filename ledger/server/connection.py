"""The one way in which Tollbook makes a Redis client.

Two habits of redis-py (8.1, read in November 2026) are put off, since each breaks a
promise: it sends a command again after a lost connection, and under Python 3.11 its
socket time-out (`asyncio.wait_for`) loses a cancellation that comes as the command goes
out, so that a loop which was told to stop goes on. Whoever waits sets a time of its own.
"""

import re
from typing import Final

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from tollbook.ledger.errors import LedgerUnavailable

CONNECT_TIMEOUT_S: Final = 5.0
ANSWER_TIMEOUT_S: Final = 30.0
_PASSWORD: Final = re.compile(r"(://[^:@/]*:).*@")
_PASSWORD_PARAMETER: Final = re.compile(r"(\w*password=)[^&]*", re.IGNORECASE)


def connect(redis_url: str) -> Redis:
    """Return a client that never repeats a command by itself and can be cancelled at any moment.

    Errors: LedgerUnavailable for an address that redis-py cannot use. Nothing is sent yet.
    """
    # A Unix socket has no keep-alive, and redis-py refuses to be told of one.
    network = {} if redis_url.startswith("unix:") else {"socket_keepalive": True}
    try:
        redis = Redis.from_url(  # pyright: ignore[reportUnknownMemberType]
            redis_url,
            retry=Retry(NoBackoff(), 0),
            socket_timeout=None,
            socket_connect_timeout=CONNECT_TIMEOUT_S,
            health_check_interval=0,
            **network,
        )
        # What is wrong with the address is otherwise found by the first command, as a TypeError.
        redis.connection_pool.make_connection()
    except (TypeError, ValueError, RedisError) as exc:
        raise LedgerUnavailable(f"{hide_password(redis_url)} cannot be used as REDIS_URL: {exc}") from exc
    return redis


def hide_password(redis_url: str) -> str:
    """Return the URL as it may be logged."""
    # redis-py takes any option as a parameter too, the passwords of the server and of a TLS key among them. And
    # a password that should have been quoted, with a ? or # in it, must not be told because it is wrong.
    return _PASSWORD_PARAMETER.sub(r"\1***", _PASSWORD.sub(r"\1***@", redis_url))
