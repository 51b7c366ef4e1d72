"""The one way in which Tollbook makes a Redis client, and what an error of it means.

Two features of redis-py (8.1, read in November 2026) are switched off, since each breaks a
guarantee: it sends a command again after a lost connection, and under Python 3.11 its
socket timeout (`asyncio.wait_for`) loses a cancellation that arrives while the command is
sent, so that a loop which was told to stop goes on. Callers set timeouts of their own.
"""

import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Final

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, RedisError, ResponseError

from tollbook.ledger.errors import LedgerUnavailable

CONNECT_TIMEOUT_S: Final = 5.0
ANSWER_TIMEOUT_S: Final = 30.0
_PASSWORD: Final = re.compile(r"(://[^:@/]*:).*@")
_PASSWORD_PARAMETER: Final = re.compile(r"(\w*password=)[^&]*", re.IGNORECASE)
# Redis explains some refusals, such as protected mode, in a page of text; the first sentence says what it is.
_MAX_TEXT: Final = 200


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
    """Return the URL without its passwords, for logs and messages."""
    # redis-py takes any option as a URL parameter too, such as the passwords of the server and of a TLS key. A password
    # that should have been quoted, with a ? or # in it, must be hidden as well.
    return _PASSWORD_PARAMETER.sub(r"\1***", _PASSWORD.sub(r"\1***@", redis_url))  # G10


def time_ms(reply: Sequence[bytes | int]) -> int:
    """Return the reply of TIME in milliseconds since the epoch."""
    seconds, microseconds = reply
    return int(seconds) * 1000 + int(microseconds) // 1000


def unavailable(exc: BaseException) -> LedgerUnavailable:
    """Return what an error of redis-py, or of the network below it, means to a caller; raise it `from exc`."""
    text = str(exc) or type(exc).__name__
    text = text if len(text) <= _MAX_TEXT else re.split(r"[.\n]\s", text)[0][:_MAX_TEXT]
    match exc:
        case AuthenticationError():
            return LedgerUnavailable(
                f"Redis refused the log-in ({text}): REDIS_URL takes a user and a password, "
                "redis://USER:PASSWORD@HOST:PORT/0"
            )
        case ResponseError():
            return LedgerUnavailable(f"Redis refused a command ({text})")
        case _:
            return LedgerUnavailable(f"Redis did not answer ({type(exc).__name__}: {text})")


@contextmanager
def translating_redis_errors() -> Generator[None]:
    """Raise LedgerUnavailable for an error of redis-py."""
    try:
        yield
    except RedisError as exc:
        raise unavailable(exc) from exc
