"""The one way in which Tollbook makes a Redis client.

Two habits of redis-py (8.1, read in November 2026) are put off, since each breaks a
promise: it sends a command again after a lost connection, and under Python 3.11 its
socket time-out (`asyncio.wait_for`) loses a cancellation that comes as the command goes
out, so that a loop which was told to stop goes on. Whoever waits sets a time of its own.
"""

from typing import Final
from urllib.parse import urlsplit, urlunsplit

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

CONNECT_TIMEOUT_S: Final = 5.0
ANSWER_TIMEOUT_S: Final = 30.0


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
    parts = urlsplit(redis_url)
    if parts.password is None:
        return redis_url
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{parts.username or ''}:***@{host}"))
