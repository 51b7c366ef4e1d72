"""A primary with replicas, and a Sentinel that promotes one of them when it dies. All have one password."""

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from tests.servers import binary_of, wait_until
from tollbook.ledger.private_files import make_private_folder, write_private
from tollbook.ledger.server import launcher
from tollbook.ledger.server.connection import connect
from tollbook.ledger.server.embedded import EmbeddedServer, bundled_binary
from tollbook.ledger.server.process import HOST

SERVICE: Final = "books"
PASSWORD: Final = "of-all-servers"
SENTINEL_PASSWORD: Final = "of-the-sentinel"
# Below the range of ports for outgoing connections, and above that of embedded servers.
_FIRST_PORT: Final = 30_000
_PORTS: Final = 2_500


@dataclass
class Replicated:
    """The servers. `primary` is the first primary, also after a failover."""

    primary: EmbeddedServer
    replicas: list[EmbeddedServer]
    sentinel_port: int = 0

    @property
    def url(self) -> str:
        """The address that leads through the Sentinel."""
        return (
            f"redis+sentinel://default:{PASSWORD}@{HOST}:{self.sentinel_port}/{SERVICE}"
            f"?sentinel_password={SENTINEL_PASSWORD}"
        )

    async def come_back(self, server: EmbeddedServer, promoted: EmbeddedServer) -> None:
        """Start a server that was killed as a replica of the promoted one, as the Sentinel would do a while later."""
        await server.start()
        await follow(server, port_of(promoted))


async def follow(server: EmbeddedServer, port: int) -> None:
    """Make a server a replica, and wait until it has everything."""
    async with connect(server.url) as redis:
        await redis.config_set("masterauth", PASSWORD)
        await redis.config_set("repl-diskless-sync-delay", 0)
        await redis.execute_command("REPLICAOF", HOST, port)
        await wait_until(lambda: is_linked(redis), what="the replica's link")


def stop_answering(server: EmbeddedServer) -> None:
    """Freeze a server: it stops answering, as if its machine had no power."""
    assert server.pid is not None
    os.kill(server.pid, signal.SIGSTOP)


def answer_again(server: EmbeddedServer) -> None:
    assert server.pid is not None
    os.kill(server.pid, signal.SIGCONT)


async def is_linked(replica: Redis) -> bool:
    """Whether a server is a replica that has all its primary has."""
    try:
        info: dict[str, Any] = await replica.info("replication")
    except RedisConnectionError:
        return False  # A server that is made a replica ends its connections.
    return info["role"] == "slave" and info.get("master_link_status") == "up"


async def is_primary(server: Redis) -> bool:
    info: dict[str, Any] = await server.info("replication")
    return info["role"] == "master"


@asynccontextmanager
async def replicated(
    directory: Path, *, kind: str, replicas: int = 1, has_sentinel: bool = False, down_after_ms: int = 500
) -> AsyncIterator[Replicated]:
    """Start the servers, linked. The Sentinel promotes a replica once its primary is silent for `down_after_ms`."""
    async with AsyncExitStack() as stack:
        servers = [_server(directory / f"server-{number}", kind) for number in range(replicas + 1)]
        for server in servers:
            await stack.enter_async_context(server)
            async with connect(server.url) as redis:
                await redis.config_set("masterauth", PASSWORD)
                await redis.config_set("repl-diskless-sync-delay", 0)
        group = Replicated(servers[0], servers[1:])
        for server in group.replicas:
            await follow(server, port_of(group.primary))
        if has_sentinel:
            sentinel = _sentinel(directory, group.primary, kind, down_after_ms)
            group.sentinel_port = await stack.enter_async_context(sentinel)
        yield group


def port_of(server: EmbeddedServer) -> int:
    return int(server.url.rpartition(":")[2].partition("/")[0])


def _server(directory: Path, kind: str) -> EmbeddedServer:
    make_private_folder(directory)
    make_private_folder(directory / "valkey")
    write_private(directory / "valkey" / "password", PASSWORD)
    return EmbeddedServer(directory, binary=binary_of(kind))


@asynccontextmanager
async def _sentinel(directory: Path, primary: EmbeddedServer, kind: str, down_after_ms: int) -> AsyncIterator[int]:
    port = _FIRST_PORT + port_of(primary) % _PORTS
    config = directory / "sentinel.conf"
    config.write_text(
        f"port {port}\nbind {HOST}\ndir {directory}\nrequirepass {SENTINEL_PASSWORD}\n"
        f"sentinel monitor {SERVICE} {HOST} {port_of(primary)} 1\n"
        f"sentinel auth-pass {SERVICE} {PASSWORD}\n"
        f"sentinel down-after-milliseconds {SERVICE} {down_after_ms}\n"
        f"sentinel failover-timeout {SERVICE} 3000\n",
        encoding="utf-8",
    )
    binary = binary_of(kind) or bundled_binary()
    command = [sys.executable, "-I", "-S", launcher.__file__, str(os.getpid()), str(binary), str(config), "--sentinel"]
    with (directory / "sentinel.log").open("wb") as log:
        process = subprocess.Popen(  # noqa: ASYNC220 - it takes no time to begin.
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    try:
        async with connect(f"redis://:{SENTINEL_PASSWORD}@{HOST}:{port}") as sentinel:

            async def knows_the_replicas() -> bool:
                try:
                    found: Any = await sentinel.execute_command("SENTINEL", "REPLICAS", SERVICE)
                except RedisConnectionError:
                    return False  # It starts.
                return bool(found)

            await wait_until(knows_the_replicas, what="the Sentinel, with the replicas")
        yield port
    finally:
        process.terminate()
        process.wait()
