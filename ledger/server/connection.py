"""The one way in which Tollbook makes a Redis client.

Two features of redis-py (8.1, read in November 2026) are switched off, since each breaks a
guarantee: it sends a command again after a lost connection, and under Python 3.11 its
socket timeout (`asyncio.wait_for`) loses a cancellation that arrives while the command is
sent, so that a loop which was told to stop goes on. Callers set timeouts of their own.
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final, cast

from redis.asyncio import Redis
from redis.asyncio.connection import (
    AbstractConnection,
    Connection,
    ConnectionPool,
    SSLConnection,
    UnixDomainSocketConnection,
    parse_url,
)
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ReadOnlyError, RedisError

from tollbook.ledger.errors import LedgerUnavailable
from tollbook.ledger.server.address import check_address, hide_password
from tollbook.ledger.server.sentinel_address import names_sentinels, read_sentinel_address
from tollbook.ledger.server.sentinels import FollowsSentinels, Sentinels

CONNECT_TIMEOUT_S: Final = 5.0
ANSWER_TIMEOUT_S: Final = 30.0


def connect(redis_url: str) -> Redis:
    """Return a client that never repeats a command by itself and can be cancelled at any moment.

    Errors: LedgerUnavailable for an address that cannot be used. Nothing is sent yet.
    """
    options: dict[str, Any] = {
        "retry": Retry(NoBackoff(), 0),
        "socket_timeout": None,
        "socket_connect_timeout": CONNECT_TIMEOUT_S,
        "health_check_interval": 0,
        # A Unix socket has no keep-alive, and redis-py refuses to be told of one.
        **({} if redis_url.startswith("unix:") else {"socket_keepalive": True}),
    }
    try:
        check_address(redis_url)
        if names_sentinels(redis_url):
            options |= {**parse_url(server_url(redis_url)), "connection_class": connection_class(redis_url)}
            redis = Redis.from_pool(ConnectionPool(**options))
        else:
            redis = Redis.from_url(redis_url, **options)  # pyright: ignore[reportUnknownMemberType]
        # What is wrong with the address is otherwise found by the first command, as a TypeError.
        redis.connection_pool.make_connection()
    except (TypeError, ValueError, RedisError) as exc:
        raise LedgerUnavailable(f"{hide_password(redis_url)} cannot be used as REDIS_URL: {exc}") from exc
    return redis


async def leave_server(redis: Redis) -> None:
    """Close every connection of a client to a server that is no longer the right one.

    Each is made again when it is next used, and its address resolved anew: after a failover it leads to the promoted
    server. Who waits for a reply or an announcement gets a connection error.
    """
    with suppress(RedisError, OSError):
        await redis.connection_pool.disconnect(inuse_connections=True)


class _LeavesDemotedServer:
    """A connection that closes where the server has become a replica, and says that it is lost."""

    async def read_response(self, *args: Any, **options: Any) -> Any:
        connection: Any = super()
        try:
            return await connection.read_response(*args, **options)
        except ReadOnlyError as exc:
            await connection.disconnect(nowait=True)
            raise RedisConnectionError(f"{exc}; the address is resolved anew") from exc


class _TcpConnection(_LeavesDemotedServer, Connection):
    pass


class _TlsConnection(_LeavesDemotedServer, SSLConnection):
    pass


class _SocketConnection(_LeavesDemotedServer, UnixDomainSocketConnection):
    def __init__(self, *, path: str, **options: Any) -> None:
        # FastStream gives it what only a network connection takes.
        for name in ("host", "port", "socket_keepalive", "socket_keepalive_options", "socket_type"):
            options.pop(name, None)
        super().__init__(path=path, **options)  # pyright: ignore[reportUnknownMemberType]


class _TcpByName(FollowsSentinels, _TcpConnection):
    pass


class _TlsByName(FollowsSentinels, _TlsConnection):
    pass


def server_url(redis_url: str) -> str:
    """Return an address that redis-py reads; where Sentinels are named, with the class of `connection_class` alone."""
    return read_sentinel_address(redis_url).server_url if names_sentinels(redis_url) else redis_url


def connection_class(redis_url: str) -> type[AbstractConnection]:
    """Return the class for a client that is not made by `connect`, such as FastStream's."""
    if names_sentinels(redis_url):
        address = read_sentinel_address(redis_url)
        options = {name: value for name, value in parse_url(address.server_url).items() if name.startswith("ssl_")}
        kind = _TlsByName if address.server_url.startswith("rediss:") else _TcpByName
        made = type(kind.__name__, (kind,), {"sentinels": Sentinels(address, options=options)})
        return cast("type[AbstractConnection]", made)
    scheme = redis_url.partition(":")[0]
    return {"unix": _SocketConnection, "rediss": _TlsConnection}.get(scheme, _TcpConnection)


def as_map(reply: Any) -> dict[bytes, Any]:
    """Return a reply of names and values as a dictionary: Redis sends a map, or by its older protocol a flat list."""
    if isinstance(reply, list):
        parts = cast("list[Any]", reply)
        return dict(zip(parts[::2], parts[1::2], strict=True))
    return reply


def time_ms(reply: Sequence[bytes | int]) -> int:
    """Return the reply of TIME in milliseconds since the epoch."""
    seconds, microseconds = reply
    return int(seconds) * 1000 + int(microseconds) // 1000
