"""The kinds of servers for a ledger: one server, a cluster with replicas, or two servers with a Sentinel."""

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.cluster_servers import cluster_servers
from tests.replicated import port_of, replicated
from tests.servers import EMBEDDED
from tollbook.ledger.server.connection import connect
from tollbook.ledger.server.servers import primaries

ONE: Final = "one"
CLUSTER: Final = "cluster"
SENTINEL: Final = "sentinel"
REPLICATED: Final = (CLUSTER, SENTINEL)
PARTITIONS: Final = 6
# A machine that is busy with other tests is not a dead one.
_DOWN_AFTER_MS: Final = 15_000


@dataclass(frozen=True, slots=True)
class Deployment:
    """The address of a ledger, the settings that go with it, and the ports of all servers that it leads to."""

    url: str
    ports: Sequence[int]
    settings: dict[str, Any] = field(default_factory=dict[str, Any])

    async def empty(self) -> None:
        """Remove all keys, and the gate's functions."""
        async with connect(self.url) as redis:
            for server in await primaries(redis):
                await asyncio.gather(server.flushall(), server.function_flush())


def one_server(url: str) -> Deployment:
    """Return the deployment that is one server."""
    return Deployment(url, ports_in(url))


@asynccontextmanager
async def deployed(kind: str, directory: Path) -> AsyncIterator[Deployment]:
    """Run three primaries with a replica each, or two servers with a Sentinel. No replica is promoted by itself."""
    if kind == CLUSTER:
        async with cluster_servers(directory, replicas=3, node_timeout_ms=_DOWN_AFTER_MS) as cluster:
            settings = {"min_replicas": 1, "partitions": PARTITIONS}
            yield Deployment(cluster.url, [node.port for node in cluster.nodes], settings)
    else:
        assert kind == SENTINEL
        async with replicated(directory, kind=EMBEDDED, has_sentinel=True, down_after_ms=_DOWN_AFTER_MS) as group:
            ports = [group.sentinel_port, *map(port_of, (group.primary, *group.replicas))]
            yield Deployment(group.url, ports, {"min_replicas": 1})


def ports_in(url: str) -> list[int]:
    """Return the ports of an address: of several servers where it names several."""
    return [int(port) for port in re.findall(r"127\.0\.0\.1:(\d+)", url)]
