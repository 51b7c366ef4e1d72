"""Connections to the primary that Sentinels name.

Each new connection asks the Sentinels again, so that a reconnect after a failover reaches the promoted server.
redis-py's own pool for Sentinels (8.1, read in November 2026) is not used: FastStream does not accept it, and it trusts
a Sentinel's answer without checking the server.
"""

import asyncio
from collections import deque
from typing import Any, Final

from redis.asyncio.connection import Connection, SSLConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError

from tollbook.ledger.server.sentinel_address import SentinelAddress

_ANSWER_S: Final = 1.0


class Sentinels:
    """The Sentinels of one address. A Sentinel that is down, or does not know of a failover, is asked last."""

    def __init__(self, address: SentinelAddress, *, options: dict[str, Any]) -> None:
        """`options`: options of TLS."""
        self._address = address
        self._order = deque(address.sentinels)
        self._options = options

    async def primary(self) -> tuple[str, int]:
        """Return host and port of the primary. Errors: redis.exceptions.ConnectionError if no Sentinel names it."""
        problems = list[str]()
        for _ in self._address.sentinels:
            host, port = self._order[0]
            try:
                return await self._ask(host, port)
            except (RedisError, OSError, TimeoutError) as exc:
                problems.append(f"{host}:{port}: {exc or type(exc).__name__}")
                self.distrust()
        raise RedisConnectionError(
            f"no Sentinel leads to the primary of {self._address.service!r} ({'; '.join(problems)})"
        )

    def distrust(self) -> None:
        """Ask another Sentinel first next time: this one named no primary."""
        self._order.rotate(-1)

    async def _ask(self, host: str, port: int) -> tuple[str, int]:
        address = self._address
        kind = SSLConnection if address.server_url.startswith("rediss:") else Connection
        asking: Any = kind(
            host=host,
            port=port,
            username=address.username,
            password=address.password,
            retry=Retry(NoBackoff(), 0),
            socket_timeout=None,
            **self._options,
        )
        try:
            async with asyncio.timeout(_ANSWER_S):
                await asking.connect()
                await asking.send_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", address.service)
                found: list[bytes] | None = await asking.read_response()
        finally:
            await asking.disconnect(nowait=True)
        if found is None:
            raise RedisConnectionError("it knows no such service")
        return found[0].decode(), int(found[1])


class FollowsSentinels:
    """A connection that gets host and port from Sentinels; a subclass sets `sentinels`."""

    sentinels: Sentinels

    async def _connect(self) -> None:
        connection: Any = super()
        this: Any = self
        this.host, this.port = await self.sentinels.primary()
        try:
            await connection._connect()
        except (OSError, TimeoutError):
            self.sentinels.distrust()
            raise

    async def on_connect_check_health(self, check_health: bool = True) -> None:
        """Log in, then check that the server is a primary: a Sentinel may not know of the failover yet."""
        connection: Any = super()
        await connection.on_connect_check_health(check_health=check_health)
        this: Any = self
        await this.send_command("ROLE", check_health=False)
        try:
            role: list[bytes | str] = await this.read_response()
        except ResponseError:
            return  # This user may not use ROLE. If it is a replica, the first write fails and closes the connection.
        if role[0] not in (b"master", "master"):
            self.sentinels.distrust()
            raise RedisConnectionError("the server that the Sentinels name is a replica")
