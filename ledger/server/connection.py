"""The one way in which Tollbook makes a Redis client, and what an error of it means.

Two habits of redis-py (8.1, read in November 2026) are put off, since each breaks a
promise: it sends a command again after a lost connection, and under Python 3.11 its
socket time-out (`asyncio.wait_for`) loses a cancellation that comes as the command goes
out, so that a loop which was told to stop goes on. Whoever waits sets a time of its own.
"""

import re
from collections.abc import Generator
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
    """Return the URL as it may be logged."""
    # redis-py takes any option as a parameter too, the passwords of the server and of a TLS key among them. And
    # a password that should have been quoted, with a ? or # in it, must not be told because it is wrong.
    return _PASSWORD_PARAMETER.sub(r"\1***", _PASSWORD.sub(r"\1***@", redis_url))


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
