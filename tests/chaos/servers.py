"""The servers of a run: one, a cluster with replicas, or two with a Sentinel. They have faults as a Program has.

With replicas, a fault ends only when each primary has an up-to-date replica again. So a primary and its replica are
never down together, in which case calls would stop.
"""

import asyncio
import os
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from redis.asyncio import Redis
from redis.exceptions import RedisError

from tests.chaos.processes import Downtime
from tests.chaos.scenario import STREAMS
from tests.cluster_servers import ClusterServers, Node, cluster_servers
from tests.deployments import CLUSTER, ONE, PARTITIONS, SENTINEL
from tests.replicated import Replicated, answer_again, is_linked, is_primary, replicated, stop_answering
from tests.servers import EMBEDDED as KIND
from tests.servers import wait_until
from tollbook.ledger.keys import Keys
from tollbook.ledger.server.connection import connect
from tollbook.ledger.server.embedded import EmbeddedServer

# Long, so that a Sentinel does not fail over from a server that is only slow on a busy machine.
_DOWN_AFTER_MS: Final = 2_000


class Servers(ABC):
    """The servers of a run's ledger. `replicas` is how many replicas must confirm a write."""

    partitions = 1
    replicas = 0

    def __init__(self) -> None:
        self.outages: list[Downtime] = []

    @property
    @abstractmethod
    def url(self) -> str:
        """The address."""

    @property
    def keys(self) -> tuple[Keys, ...]:
        """The keys of every partition."""
        return tuple(Keys(partition=number) for number in range(self.partitions))

    @property
    def settings(self) -> Mapping[str, str]:
        """The settings that every process needs beside the address."""
        return {"TOLLBOOK_PARTITIONS": str(self.partitions), "TOLLBOOK_MIN_REPLICAS": str(self.replicas)}

    async def inject(self, kind: str, for_s: float) -> None:
        """Make a fault of this kind; restart or resume the server after `for_s` seconds."""
        outage = Downtime(0, _now_ms())
        self.outages.append(outage)
        await self._inject(kind, for_s)
        outage.to_ms = _now_ms()

    @abstractmethod
    async def _inject(self, kind: str, for_s: float) -> None: ...


class OneServer(Servers):
    """The embedded Valkey."""

    def __init__(self, server: EmbeddedServer) -> None:
        super().__init__()
        self.embedded = server

    @property
    def url(self) -> str:
        return self.embedded.url

    async def _inject(self, kind: str, for_s: float) -> None:
        pid = self.embedded.pid
        assert pid is not None, f"the server has died: {self.embedded.problem}"
        if kind == "stop":
            os.kill(pid, signal.SIGSTOP)
            try:
                await asyncio.sleep(for_s)
            finally:
                os.kill(pid, signal.SIGCONT)
            return
        url = self.embedded.url
        await self.embedded.kill()
        await asyncio.sleep(for_s)
        await self.embedded.start()
        assert self.embedded.url == url, "the server has come back elsewhere"


class ClusterOfServers(Servers):
    """Three primaries with a replica each. Each fault is at the node of the next partition or task stream."""

    partitions = PARTITIONS
    replicas = 1

    def __init__(self, cluster: ClusterServers) -> None:
        super().__init__()
        self._cluster = cluster
        self._turn = 0

    @property
    def url(self) -> str:
        return self._cluster.url

    async def _inject(self, kind: str, for_s: float) -> None:
        await wait_until(self._is_whole, what="a cluster in which each primary has its replica")
        places = [*(keys.meta for keys in self.keys), *STREAMS]
        key = places[self._turn % len(places)]
        self._turn += 1
        primary = await self._cluster.owner(key)
        match kind:
            case "kill":
                replica = await self._cluster.replica_of(primary)
                primary.kill()
                await self._cluster.promoted(replica)
                await asyncio.sleep(for_s)
                primary.start_again()
            case "move":
                others = [node for node in await self._primaries() if node is not primary]
                await self._cluster.move(key, others[self._turn % len(others)])
            case _:
                replica = await self._cluster.replica_of(primary)
                replica.process.send_signal(signal.SIGSTOP)
                try:
                    await asyncio.sleep(for_s)
                finally:
                    replica.process.send_signal(signal.SIGCONT)
        await wait_until(self._is_whole, what="a cluster in which each primary has its replica")

    async def _primaries(self) -> list[Node]:
        return [node for node in self._cluster.nodes if (await node.info("replication"))["role"] == "master"]

    async def _is_whole(self) -> bool:
        """Whether every node is up and sees all slots served, and half of them are replicas in step."""
        try:
            infos = [await node.info("replication") for node in self._cluster.nodes]
            states = [await node.ask("CLUSTER", "INFO") for node in self._cluster.nodes]
        except (RedisError, OSError):
            return False
        linked = [info for info in infos if info["role"] == "slave" and info["master_link_status"] == "up"]
        followed = {info["master_port"] for info in linked}
        return 2 * len(followed) == len(infos) and all(
            b"cluster_slots_ok:16384" in state and b"cluster_state:ok" in state for state in states
        )


class WatchedServers(Servers):
    """A primary, its replica, and a Sentinel that promotes it."""

    replicas = 1

    def __init__(self, group: Replicated) -> None:
        super().__init__()
        self._group = group

    @property
    def url(self) -> str:
        return self._group.url

    async def _inject(self, kind: str, for_s: float) -> None:
        roles = await wait_until(self._roles, what="a primary with a replica in step")
        assert roles is not None
        primary, replica = roles
        if kind == "kill":
            await primary.kill()
            async with connect(replica.url) as promoted:
                # A server that is promoted closes its connections.
                await wait_until(lambda: _says(promoted, is_primary), what="a promoted replica")
            await asyncio.sleep(for_s)
            await self._group.come_back(primary, replica)
        else:
            stop_answering(replica)
            try:
                await asyncio.sleep(for_s)
            finally:
                answer_again(replica)
        await wait_until(self._roles, what="a primary with a replica in step")

    async def _roles(self) -> tuple[EmbeddedServer, EmbeddedServer] | None:
        """Return primary and replica; None while the replica is not linked."""
        servers = (self._group.primary, *self._group.replicas)
        for primary, replica in (servers, servers[::-1]):
            async with connect(primary.url) as first, connect(replica.url) as second:
                if await _says(first, is_primary) and await _says(second, is_linked):
                    return primary, replica
        return None


async def _says(server: Redis, what: Any) -> bool:
    try:
        return await what(server)
    except (RedisError, OSError):
        return False


@asynccontextmanager
async def open_servers(kind: str, directory: Path) -> AsyncIterator[Servers]:
    """Start the servers of a kind. A single server is in the data directory, as that of `tollbook up` is."""
    if kind == ONE:
        async with EmbeddedServer(directory / "data", fsync="always") as embedded:
            yield OneServer(embedded)
    elif kind == CLUSTER:
        async with cluster_servers(directory / "cluster", replicas=3, fsync="always") as cluster:
            yield ClusterOfServers(cluster)
    else:
        assert kind == SENTINEL, f"there is no store {kind!r}: one, cluster or sentinel"
        async with replicated(directory, kind=KIND, has_sentinel=True, down_after_ms=_DOWN_AFTER_MS) as group:
            yield WatchedServers(group)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
