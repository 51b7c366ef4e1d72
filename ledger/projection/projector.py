"""The projector: folds every partition of the ledger into DuckDB as it grows.

Its only state is the position in DuckDB, committed with the rows. An event that cannot be
folded stops the projector, and `failure` says why; no event is skipped.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import structlog
from redis.asyncio import Redis

from tollbook.ledger.errors import LedgerUnavailable
from tollbook.ledger.keys import Keys
from tollbook.ledger.projection.follower import Follower, Lag, ProjectorSettings
from tollbook.ledger.projection.store import Store
from tollbook.ledger.projection.watermark import Trim
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.schemas.identifiers import EntryId

__all__ = ["Lag", "Projector", "ProjectorSettings", "Trim"]

_log = structlog.get_logger(__name__)


class Projector:
    """Folds all partitions of one ledger.

    `failure` is why a partition is no longer folded; None while all are.
    """

    def __init__(
        self,
        store: Store,
        redis: Redis,
        keys: Sequence[Keys],
        *,
        trim: Trim,
        pipeline: CommandPipeline | None = None,
        settings: ProjectorSettings | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`pipeline`: if it waits for replicas, it is asked whether they have an event before it is folded."""
        self.failure: Exception | None = None
        self._running = asyncio.Event()
        self._running.set()
        self._followers = {
            key.partition: Follower(
                store,
                redis,
                key,
                trim=trim,
                pipeline=pipeline,
                settings=settings or ProjectorSettings(),
                sleep=sleep,
                running=self._running,
            )
            for key in keys
        }

    async def run(self) -> None:
        """Follow the ledger until cancelled, or until something cannot be folded.

        Errors: the error in `failure`, raised once every partition has stopped.
        """
        reason: Exception = LedgerUnavailable("the projector has stopped")
        try:
            async with asyncio.TaskGroup() as group:
                for follower in self._followers.values():
                    group.create_task(follower.run())
        except* Exception as problems:  # noqa: BLE001 - folding has stopped, and the reason must be known in any case.
            self.failure = reason = _first(problems)  # G8
            _log.error("projection.stopped", problem=str(reason), kind=type(reason).__name__)
        finally:
            for follower in self._followers.values():
                follower.fail(reason)
        if self.failure is not None:
            raise self.failure

    async def check(self) -> None:
        """Check that the projection belongs to the ledger as it is now, before it is served.

        Errors: LedgerUnavailable; LedgerReplaced; LedgerAhead; LedgerRewritten.
        """
        for follower in self._followers.values():
            await follower.check()

    @property
    def has_folded(self) -> bool:
        """Whether anything was folded since the start."""
        return any(follower.has_folded for follower in self._followers.values())

    def pause(self) -> None:
        """Stop folding after the current batch, until `resume`."""
        self._running.clear()

    def resume(self) -> None:
        """Continue to fold."""
        self._running.set()

    async def wait_for(self, partition: int, entry: EntryId) -> None:
        """Return once the entry is folded. Errors: what stopped the projector."""
        if self.failure is not None:
            raise self.failure
        await self._followers[partition].wait_for(entry)

    async def catch_up(self) -> None:
        """Return once everything on the ledger now is folded.

        Errors: LedgerUnavailable; what stopped the projector.
        """
        for partition, head in (await self.heads()).items():
            await self.wait_for(partition, head)

    async def heads(self) -> dict[int, EntryId]:
        """Return the newest entry on the ledger now, by partition. Errors: LedgerUnavailable."""
        return {partition: await follower.newest() for partition, follower in self._followers.items()}

    async def lag(self) -> Lag:
        """Measure the lag over all partitions. Errors: LedgerUnavailable."""
        lags = [await follower.lag() for follower in self._followers.values()]
        return Lag(sum(lag.events for lag in lags), max((lag.seconds for lag in lags), default=0.0))


def _first(problems: BaseExceptionGroup[Exception]) -> Exception:
    problem = problems.exceptions[0]
    return _first(problem) if isinstance(problem, BaseExceptionGroup) else problem
