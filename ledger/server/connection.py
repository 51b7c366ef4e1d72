"""Redis clients: all of Tollbook's are made here, for one server or for a cluster.

Two features of redis-py (8.1, read in November 2026) are switched off, since each breaks a
guarantee. It retries a command after a lost connection. And under Python 3.11 its socket
timeout (`asyncio.wait_for`) loses a cancellation that arrives while the command is sent, so
that a cancelled loop continues. Callers set their own timeouts.

On a cluster a command goes to the node that has its key (see cluster.py). Code that sends commands in another way gets
the right server from servers.py.
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final, TypeVar, cast
from urllib.parse import urlsplit, urlunsplit

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline, PubSub
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
from redis.exceptions import NoPermissionError, ReadOnlyError, RedisError, ResponseError

from tollbook.ledger.errors import LedgerUnavailable
from tollbook.ledger.server.address import check_address, database_of, each_server, hide_password
from tollbook.ledger.server.cluster import Address, Cluster, ask_on
from tollbook.ledger.server.sentinel_address import names_sentinels, read_sentinel_address
from tollbook.ledger.server.sentinels import FollowsSentinels, Sentinels

CONNECT_TIMEOUT_S: Final = 5.0
ANSWER_TIMEOUT_S: Final = 30.0
_Client = TypeVar("_Client", bound=Redis)


class ServerClient(Redis):
    """A client of one server, or of a cluster: the first command finds out which.

    `urls` are the configured addresses: several for a cluster. Errors of every command: those of redis-py;
    LedgerUnavailable for a cluster that cannot be used.
    """

    urls: tuple[str, ...]
    _cluster: Cluster | None = None
    _is_known = False
    _detecting: asyncio.Lock | None = None

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        """Send a command, on a cluster to the node that has its key."""
        cluster = self._cluster if self._is_known else await self.cluster()
        if cluster is None:
            return await self._execute_here(*args, **options)

        async def send(address: Address, is_asking: bool) -> Any:
            return await ask_on(cluster.client(address), args, options, is_asking=is_asking)

        return await cluster.follow(args, send)

    async def _execute_here(self, *args: Any, **options: Any) -> Any:
        return await super().execute_command(*args, **options)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]

    async def cluster(self) -> Cluster | None:
        """Return the cluster behind the address; None for one server. Errors: RedisError; LedgerUnavailable."""
        if self._is_known:
            return self._cluster
        if self._detecting is None:
            self._detecting = asyncio.Lock()
        async with self._detecting:
            if not self._is_known:
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    self._cluster = await self._detect_cluster()
                self._is_known = True
        return self._cluster

    async def _detect_cluster(self) -> Cluster | None:
        """Return the cluster, or None for one server. Errors: RedisError; LedgerUnavailable for an unusable cluster."""
        first, *others = self.urls
        is_direct = not first.startswith("unix:") and not names_sentinels(first)
        cluster = Cluster(self._open_node, [_address_of(url) for url in self.urls] if is_direct else ())
        if others:
            await self._find_slots(cluster)
        else:
            try:
                reply: list[Any] = await self._execute_here("CLUSTER", "SLOTS")
            except ResponseError:
                # The server is not in a cluster. If this user may not ask, one server is assumed too.
                return None
            if not reply:
                raise LedgerUnavailable(
                    f"the cluster at {self._shown} has no slots: assign them (redis-cli --cluster fix)"
                )
            if not is_direct:
                raise LedgerUnavailable(
                    f"{self._shown} is a node of a cluster, whose other nodes cannot be reached over a socket or "
                    "Sentinels: write redis://HOST:PORT/0"
                )
            cluster.use(reply, _address_of(first))
        if database_of(first):
            raise LedgerUnavailable(f"{self._shown} is a cluster, which has only database 0: write redis://HOST:PORT/0")
        return cluster

    async def _find_slots(self, cluster: Cluster) -> None:
        try:
            await cluster.refresh()
        except LedgerUnavailable as exc:
            await cluster.aclose()
            if isinstance(exc.__cause__, NoPermissionError):
                raise LedgerUnavailable(
                    f"the Redis user may not use CLUSTER SLOTS at {self._shown}: allow it with ACL SETUSER"
                ) from exc
            if isinstance(exc.__cause__, ResponseError):
                raise LedgerUnavailable(
                    f"{self._shown} names several servers that are not a cluster: give the address of one primary"
                ) from exc
            raise

    def _open_node(self, address: Address) -> Redis:
        parts = urlsplit(self.urls[0])
        login, at, _ = parts.netloc.rpartition("@")
        return _open(Redis, urlunsplit(parts._replace(netloc=f"{login}{at}{address}")))

    def note_problem(self, problem: Exception) -> None:
        """Apply a node's redirect, or read again where the slots are."""
        if self._cluster is not None:
            self._cluster.note_problem(problem)

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> Pipeline:
        """Return redis-py's pipeline, for one server only; `read_together` and CommandPipeline also serve a cluster."""
        assert self._cluster is None, "commands of several slots cannot go over one connection"
        return super().pipeline(transaction, shard_hint)

    def pubsub(self, **options: Any) -> PubSub:
        """Return a subscription; on a cluster at any node, since nodes forward messages to each other."""
        if self._cluster is not None:
            return self._cluster.next_client().pubsub(**options)  # pyright: ignore[reportUnknownMemberType]
        return super().pubsub(**options)  # pyright: ignore[reportUnknownMemberType]

    @property
    def _shown(self) -> str:
        return ", ".join(map(hide_password, self.urls))

    async def leave(self) -> None:
        """Close every connection. On a cluster, only read again where the slots are: other nodes are still right."""
        if self._cluster is not None:
            self._cluster.refresh_soon()
        else:
            await self.connection_pool.disconnect(inuse_connections=True)

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        """Close this client and the clients of all nodes."""
        if self._cluster is not None:
            await self._cluster.aclose()
        await super().aclose(close_connection_pool)


def connect(redis_url: str) -> ServerClient:
    """Return a client that never retries a command by itself and can be cancelled at any time.

    Errors: LedgerUnavailable for an address that cannot be used. Nothing is sent yet.
    """
    try:
        check_address(redis_url)
        urls = (redis_url,) if names_sentinels(redis_url) else each_server(redis_url)
        redis = _open(ServerClient, urls[0])
        # Without this, the first command would find a wrong address, as a TypeError.
        redis.connection_pool.make_connection()
    except (TypeError, ValueError, RedisError) as exc:
        raise LedgerUnavailable(f"{hide_password(redis_url)} cannot be used as REDIS_URL: {exc}") from exc
    redis.urls = urls
    return redis


def _open(kind: type[_Client], url: str) -> _Client:
    options: dict[str, Any] = {
        "retry": Retry(NoBackoff(), 0),
        "socket_timeout": None,
        "socket_connect_timeout": CONNECT_TIMEOUT_S,
        "health_check_interval": 0,
        # A Unix socket has no keep-alive, and redis-py refuses the option.
        **({} if url.startswith("unix:") else {"socket_keepalive": True}),
    }
    if names_sentinels(url):
        options |= {**parse_url(server_url(url)), "connection_class": connection_class(url)}
        return cast("_Client", kind.from_pool(ConnectionPool(**options)))
    return cast("_Client", kind.from_url(url, **options))  # pyright: ignore[reportUnknownMemberType]


async def leave_server(redis: Redis) -> None:
    """Close every connection of a client to a server that is no longer the primary.

    Each connection reconnects at its next use and resolves its address again: after a failover, it reaches the promoted
    server. Code that waits for a reply or a message gets a connection error.
    """
    with suppress(RedisError, OSError):
        if isinstance(redis, ServerClient):
            await redis.leave()
        else:
            await redis.connection_pool.disconnect(inuse_connections=True)


class _LeavesDemotedServer:
    """A connection that closes with a connection error if its server has become a replica."""

    async def read_response(self, *args: Any, **options: Any) -> Any:
        connection: Any = super()
        try:
            return await connection.read_response(*args, **options)
        except ReadOnlyError as exc:
            await connection.disconnect(nowait=True)
            raise RedisConnectionError(f"{exc}; the address is resolved again") from exc


class _TcpConnection(_LeavesDemotedServer, Connection):
    pass


class _TlsConnection(_LeavesDemotedServer, SSLConnection):
    pass


class _SocketConnection(_LeavesDemotedServer, UnixDomainSocketConnection):
    def __init__(self, *, path: str, **options: Any) -> None:
        # FastStream passes options that only network connections accept.
        for name in ("host", "port", "socket_keepalive", "socket_keepalive_options", "socket_type"):
            options.pop(name, None)
        super().__init__(path=path, **options)  # pyright: ignore[reportUnknownMemberType]


class _TcpByName(FollowsSentinels, _TcpConnection):
    pass


class _TlsByName(FollowsSentinels, _TlsConnection):
    pass


def server_url(redis_url: str) -> str:
    """Return an address for redis-py; if it names Sentinels, it needs the class of `connection_class` too."""
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
    """Return a reply of names and values as a dictionary: RESP3 has a map, RESP2 a flat list."""
    if isinstance(reply, list):
        parts = cast("list[Any]", reply)
        return dict(zip(parts[::2], parts[1::2], strict=True))
    return reply


def time_ms(reply: Sequence[bytes | int]) -> int:
    """Return the reply of TIME in milliseconds since the epoch."""
    seconds, microseconds = reply
    return int(seconds) * 1000 + int(microseconds) // 1000


def _address_of(url: str) -> Address:
    parts = urlsplit(url)
    return Address(parts.hostname or "localhost", parts.port or 6379)
