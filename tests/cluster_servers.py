"""A Valkey Cluster on loopback, with primaries and optional replicas, made from the embedded server's program."""

import asyncio
import random
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from tests.servers import wait_until
from tollbook.ledger.server.embedded import bundled_binary
from tollbook.ledger.server.slots import SLOTS, slot_of

_NODE_TIMEOUT_MS = 2_000
"""How long a node is silent before its replica is promoted."""
# The bus of a node listens on its port plus this number.
_BUS = 10_000


@dataclass(slots=True)
class Node:
    """One server of a cluster."""

    port: int
    command: list[str]
    process: "subprocess.Popen[bytes]"
    client: Redis

    async def ask(self, *command: str | int) -> Any:
        """Return the node's own answer; redirects are not followed."""
        return await self.client.execute_command(*command)

    async def info(self, section: str) -> dict[str, Any]:
        return await self.client.info(section)

    async def node_id(self) -> str:
        return (await self.ask("CLUSTER", "MYID")).decode()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def start_again(self) -> None:
        self.process = _start(self.command)


@dataclass(slots=True)
class ClusterServers:
    """The nodes; the first ones are primaries with slots."""

    directory: Path
    fsync: str = "everysec"
    node_timeout_ms: int = _NODE_TIMEOUT_MS
    further: dict[str, str] = field(default_factory=dict[str, str])
    nodes: list[Node] = field(default_factory=list[Node])

    @property
    def url(self) -> str:
        """The address of the cluster. It names two nodes, so that one of them may be dead."""
        hosts = ",".join(f"127.0.0.1:{node.port}" for node in self.nodes[:2])
        return f"redis://{hosts}/0"

    async def start(self, primaries: int, replicas: int) -> None:
        for _ in range(primaries + replicas):
            await self.add_node()
        step = SLOTS // primaries
        for number in range(primaries):
            last = SLOTS - 1 if number == primaries - 1 else (number + 1) * step - 1
            await self.nodes[number].ask("CLUSTER", "ADDSLOTSRANGE", number * step, last)
        for number in range(primaries, primaries + replicas):
            primary = await self.nodes[number - primaries].node_id()
            await wait_until(lambda at=number, of=primary: self._replicates(self.nodes[at], of), what="a replica")
        await self.settled()

    async def add_node(self) -> Node:
        """Start a node without slots, and let the others know it."""
        port = _free_port()
        directory = self.directory / str(port)
        directory.mkdir(parents=True)
        options = {
            "port": port, "bind": "127.0.0.1", "dir": directory, "save": "", "appendonly": "yes",
            "appendfsync": self.fsync, "cluster-enabled": "yes", "cluster-node-timeout": self.node_timeout_ms,
            "logfile": directory / "log", "cluster-replica-validity-factor": 0, "cluster-require-full-coverage": "no",
            "repl-diskless-sync-delay": 0,
            **self.further,
        }  # fmt: skip
        given = (str(part) for name, value in options.items() for part in (f"--{name}", value))
        command = [str(bundled_binary()), *given]
        node = Node(port, command, _start(command), Redis(host="127.0.0.1", port=port))
        self.nodes.append(node)
        await wait_until(lambda: _answers(node), what="an answer of the node")
        await node.ask("CLUSTER", "SET-CONFIG-EPOCH", len(self.nodes))
        first = self.nodes[0]
        if node is not first:
            await node.ask("CLUSTER", "MEET", "127.0.0.1", first.port)
            await wait_until(lambda: self._know_all(), what="nodes that know each other")
        return node

    async def settled(self) -> None:
        """Return once every living node sees all slots served."""
        for node in self.alive:
            await wait_until(lambda node=node: _is_ok(node), what="a cluster that is up")

    @property
    def alive(self) -> list[Node]:
        return [node for node in self.nodes if node.process.poll() is None]

    async def owner(self, key: str) -> Node:
        """Return the primary that has a key."""
        for first, last, primary, *_ in await self.alive[0].ask("CLUSTER", "SLOTS"):
            if first <= slot_of(key) <= last:
                return next(node for node in self.nodes if node.port == primary[1])
        raise AssertionError(f"nobody has the slot of {key}")

    async def move(self, key: str, target: Node) -> None:
        """Move the slot of a key to another node, atomically; return once it is there."""
        await self.settled()  # A node that was just added refuses all commands until it knows the others' slots.
        source, slot = await self.owner(key), slot_of(key)
        await source.ask("CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", slot, slot, "NODE", await target.node_id())

        async def is_there() -> bool:
            return await self.owner(key) is target

        await wait_until(is_there, what="the slot at its new node")

    async def replica_of(self, primary: Node) -> Node:
        """Return the replica of a primary, once the primary lists it.

        A primary lists a replica only after the replica has reported its offset.
        """

        async def found() -> Node | None:
            for _, _, first, *replicas in await primary.ask("CLUSTER", "SLOTS"):
                if first[1] == primary.port and replicas:
                    return next(node for node in self.nodes if node.port == replicas[0][1])
            return None

        replica = await wait_until(found, what="a replica of the primary")
        assert replica is not None
        return replica

    async def replicate_over(self, link: str, primary: Node) -> Node:
        """Let a primary's replica replicate over another address, which can be cut; return the replica.

        Clients and the cluster bus use the old address.
        """
        port = int(link.rpartition(":")[2].partition("/")[0])
        replica = await self.replica_of(primary)
        await primary.ask("CONFIG", "SET", "cluster-announce-client-port", primary.port)
        await primary.ask("CONFIG", "SET", "cluster-announce-bus-port", primary.port + _BUS)
        await primary.ask("CONFIG", "SET", "cluster-announce-port", port)

        async def is_led_there() -> bool:
            info = await replica.info("replication")
            return info["master_port"] == port and info["master_link_status"] == "up"

        await wait_until(is_led_there, what="a replica behind the link")
        return replica

    async def fail_over(self, primary: Node) -> Node:
        """Kill a primary once its replica has all acknowledged writes; return the promoted replica."""
        replica = await self.replica_of(primary)
        # From here on, no write is acknowledged that the replica may lack.
        await primary.ask("CLIENT", "PAUSE", 60_000, "WRITE")
        offset = (await primary.info("replication"))["master_repl_offset"]

        async def is_in_step() -> bool:
            return (await replica.info("replication"))["slave_repl_offset"] >= offset

        await wait_until(is_in_step, what="a replica in step")
        primary.kill()
        await self.promoted(replica)
        await self.settled()
        return replica

    async def promoted(self, replica: Node) -> None:
        """Return once a replica is a primary, and every living node has heard of it."""

        async def is_promoted() -> bool:
            owners = [[primary[1] for _, _, primary, *_ in await node.ask("CLUSTER", "SLOTS")] for node in self.alive]
            return all(replica.port in ports for ports in owners)

        await wait_until(is_promoted, what="a promoted replica")

    async def stop(self) -> None:
        for node in self.nodes:
            await node.client.aclose()
            node.process.kill()
        for node in self.nodes:
            await asyncio.to_thread(node.process.wait)

    async def _replicates(self, node: Node, primary: str) -> bool:
        try:
            await node.ask("CLUSTER", "REPLICATE", primary)
        except RedisError:  # It does not know the primary yet.
            return False
        return await wait_until(lambda: _is_in_step(node), what="a replica in step")

    async def _know_all(self) -> bool:
        counts = [len((await node.ask("CLUSTER", "NODES")).splitlines()) for node in self.alive]
        states = [await node.ask("CLUSTER", "NODES") for node in self.alive]
        return min(counts) == len(self.alive) and not any(b"handshake" in state for state in states)


@asynccontextmanager
async def cluster_servers(
    directory: Path,
    *,
    primaries: int = 3,
    replicas: int = 0,
    fsync: str = "everysec",
    node_timeout_ms: int = _NODE_TIMEOUT_MS,
    **further: str,
) -> AsyncIterator[ClusterServers]:
    """Run a cluster for as long as this is open; `further` are options of its servers."""
    cluster = ClusterServers(directory, fsync, node_timeout_ms, further)
    try:
        await cluster.start(primaries, replicas)
        yield cluster
    finally:
        await cluster.stop()


async def _answers(node: Node) -> bool:
    assert node.process.poll() is None, "the server ended"
    try:
        return bool(await node.ask("PING"))
    except (RedisError, OSError):
        return False


async def _is_ok(node: Node) -> bool:
    # Without full coverage, a node reports `ok` even if it does not know all slots yet.
    state = await node.ask("CLUSTER", "INFO")
    return b"cluster_state:ok" in state and b"cluster_slots_ok:%d" % SLOTS in state


async def _is_in_step(node: Node) -> bool:
    return (await node.info("replication")).get("master_link_status") == "up"


def _start(command: list[str]) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)


def _free_port() -> int:
    # Below the range from which kernels take ports for outgoing connections; the bus too.
    for port in random.sample(range(11_000, 20_000), 200):
        with socket.socket() as probe, socket.socket() as bus:
            try:
                probe.bind(("127.0.0.1", port))
                bus.bind(("127.0.0.1", port + _BUS))
            except OSError:
                continue
            return port
    raise AssertionError("no two ports are free")
