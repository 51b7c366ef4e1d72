"""The open parts of this process, which metrics and health read.

Only the composition root writes here: it adds each part when it opens and removes it when it closes. The parts
themselves do not know this module.
"""

import asyncio
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from tollbook.consumers.projection import ProjectionService
from tollbook.consumers.worker import Worker
from tollbook.inference.prices.catalogue import PriceCatalogue
from tollbook.inference.runtime import LedgerHandle
from tollbook.inference.settings import Settings
from tollbook.ledger.gate.ledger import Ledger
from tollbook.observability.broker import broker_middlewares
from tollbook.observability.facts import FactReader
from tollbook.observability.gateway_counts import GatewayCounts

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from tollbook.observability.tracing import Tracing

Part = Literal["up", "worker", "projector", "gateway"]


@dataclass(frozen=True, slots=True)
class OpenLedger:
    """A ledger that is open here, with what a budget decision needs."""

    handle: LedgerHandle
    ledger: Ledger
    prices: PriceCatalogue


@dataclass(eq=False)
class ProcessState:
    """The open parts of one process.

    `faststream` has the counts of FastStream's middleware, and `url` is where metrics are served; None if metrics are
    off. `tracing` is None if traces are off. `waiting_for` says why no ledger is open yet.
    """

    part: Part
    settings: Settings
    tracing: "Tracing | None" = None
    faststream: "CollectorRegistry | None" = None
    url: str | None = None
    open_ledger: OpenLedger | None = None
    projection: ProjectionService | None = None
    gateway: GatewayCounts | None = None
    workers: list[Worker] = field(default_factory=list[Worker])
    background: dict[str, asyncio.Task[None]] = field(default_factory=dict[str, "asyncio.Task[None]"])
    waiting_for: str = "it is starting"

    @property
    def handle(self) -> LedgerHandle | None:
        """The ledger that is open here."""
        return None if self.open_ledger is None else self.open_ledger.handle

    @cached_property
    def facts(self) -> FactReader:
        """The reader of facts that metrics and alerts share."""
        return FactReader(self)

    @property
    def middlewares(self) -> Sequence[Any]:
        """FastStream middlewares that count and trace read batches, if metrics and traces are on."""
        return broker_middlewares(self.faststream, self.tracing)

    @property
    def reads_traces(self) -> bool:
        """Whether the middlewares need the publishers' trace contexts."""
        return self.tracing is not None

    def wait(self, reason: str) -> None:
        """Record why no ledger is open yet."""
        self.waiting_for = reason

    @contextmanager
    def open(self, handle: LedgerHandle, ledger: Ledger, prices: PriceCatalogue) -> Generator[None]:
        """Show an opened ledger for as long as it is open."""
        self.open_ledger = OpenLedger(handle, ledger, prices)
        try:
            yield
        finally:
            self.open_ledger, self.waiting_for = None, "it is stopping"

    @contextmanager
    def folding(self, projection: ProjectionService, task: "asyncio.Task[None]") -> Generator[None]:
        """Show a projection for as long as it is folded here."""
        self.projection = projection
        try:
            with self._running({"projection": task}):
                yield
        finally:
            self.projection = None

    @contextmanager
    def working(self, worker: Worker, tasks: dict[str, "asyncio.Task[None]"]) -> Generator[None]:
        """Show a worker and its background tasks."""
        self.workers.append(worker)
        try:
            with self._running({f"{name} of {worker.name}": task for name, task in tasks.items()}):
                yield
        finally:
            self.workers.remove(worker)

    @contextmanager
    def _running(self, tasks: dict[str, "asyncio.Task[None]"]) -> Generator[None]:
        self.background |= tasks
        try:
            yield
        finally:
            for name in tasks:
                del self.background[name]
