"""The pipelines of a cluster, one for each node; they follow a key that has moved."""

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

from redis.asyncio import Redis

from tollbook.ledger.errors import LedgerUnavailable
from tollbook.ledger.server.cluster import Address, Cluster
from tollbook.ledger.server.slots import Argument, Command, slot_of


class NodePipeline(Protocol):
    """The pipeline of one node: the part of CommandPipeline that is used here. CommandPipeline uses NodePipelines."""

    @property
    def batches(self) -> int:
        """How many batches were sent."""
        ...

    @property
    def commands(self) -> int:
        """How many commands were sent."""
        ...

    @property
    def unconfirmed(self) -> LedgerUnavailable | None:
        """Why replicas have not confirmed the last batch; None if they have, or are not waited for."""
        ...

    def enqueue(self, *command: Argument) -> asyncio.Future[Any]:
        """Put one command into the next batch."""
        ...

    def end_within(self, seconds: float) -> None:
        """Stop waiting for answers after this time."""
        ...

    async def aclose(self) -> None:
        """Send what is queued, then close."""
        ...


class NodePipelines:
    """The pipelines of all nodes of a cluster, each made when it is needed.

    Errors of every method: as those of one pipeline; RedisCannotServe if a key is not found on any node.
    """

    def __init__(self, cluster: Cluster, open_pipeline: Callable[[Redis], NodePipeline]) -> None:
        self._cluster = cluster
        self._open_pipeline = open_pipeline
        self._pipelines: dict[Address, NodePipeline] = {}
        self._is_closed = False

    @property
    def batches(self) -> int:
        """How many batches were sent."""
        return sum(pipeline.batches for pipeline in self._pipelines.values())

    @property
    def commands(self) -> int:
        """How many commands were sent."""
        return sum(pipeline.commands for pipeline in self._pipelines.values())

    @property
    def unconfirmed(self) -> LedgerUnavailable | None:
        """Why replicas of a current primary have not confirmed its last batch; None if all have."""
        present = self._cluster.known_primaries
        found = (each.unconfirmed for address, each in self._pipelines.items() if address in present)
        return next((problem for problem in found if problem is not None), None)

    def unconfirmed_at(self, key: str) -> LedgerUnavailable | None:
        """The same for the primary that has a key, as far as is known."""
        address = self._cluster.known_place_of(slot_of(key))
        pipeline = None if address is None else self._pipelines.get(address)
        return None if pipeline is None else pipeline.unconfirmed

    async def execute(self, command: Command, *, at: str | None = None) -> Any:
        """Send a command to the node that has its key, or the key `at`."""
        return await self._cluster.follow(
            command, lambda address, is_asking: self._send(address, command, is_asking=is_asking), at=at
        )

    async def execute_on_primaries(self, command: Command) -> list[Any]:
        """Send a command to every primary."""
        addresses = await self._cluster.primaries()
        return await asyncio.gather(*(self._send(address, command, is_asking=False) for address in addresses))

    def end_within(self, seconds: float) -> None:
        """As that of one pipeline."""
        for pipeline in self._pipelines.values():
            pipeline.end_within(seconds)

    async def aclose(self) -> None:
        """Send what is queued, then close."""
        self._is_closed = True
        await asyncio.gather(*(pipeline.aclose() for pipeline in self._pipelines.values()))

    async def _send(self, address: Address, command: Command, *, is_asking: bool) -> Any:
        if self._is_closed:
            raise LedgerUnavailable("the connection to Redis is closed")
        pipeline = self._pipelines.get(address)
        if pipeline is None:
            pipeline = self._pipelines[address] = self._open_pipeline(self._cluster.client(address))
        if is_asking:
            # ASKING counts for the next command of the connection. If the connection is lost between, the node refuses.
            pipeline.enqueue("ASKING").add_done_callback(lambda reply: reply.cancelled() or reply.exception())
        return await pipeline.enqueue(*command)
