"""Tidying the task streams: finished tasks are removed, so that a stream does not grow for ever.

Invariant: an entry is removed only if every consumer group on its stream has read and acknowledged it. The streams are
the user's: another program's group keeps its entries as long as it needs them. An entry in doubt is kept.
The server decides and removes in one step (`trim_tasks` in the gate's library), at most a page at a time.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

import structlog
from redis.exceptions import ResponseError

from tollbook.consumers.dead_letters import DeadLetters
from tollbook.ledger.errors import LedgerError
from tollbook.ledger.gate.functions import function
from tollbook.ledger.keys import GROUP, tidying_lease
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.ledger.stream_owners import read_owners

_INTERVAL_S: Final = 60.0
# Shorter than the interval: the next round is done by the first worker that takes the lease.
_LEASE_MS: Final = 50_000
_PAGE: Final = 1_000
_log = structlog.get_logger(__name__)


class StreamTidying:
    """Removes finished tasks and surplus dead letters once a minute, in only one of several workers.

    `keep_s` is how long finished tasks are kept; None keeps them all.
    """

    def __init__(
        self,
        pipeline: CommandPipeline,
        dead_letters: DeadLetters,
        *,
        namespace: str,
        keep_s: float | None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._pipeline = pipeline
        self._dead_letters = dead_letters
        self._namespace = namespace
        self._keep_s = keep_s
        self._sleep = sleep
        self._blockers: dict[str, str] = {}

    async def run(self) -> None:
        """Tidy until cancelled."""
        while True:
            self._dead_letters.flush()
            try:
                if await self._may_tidy():
                    await self.tidy()
            except (LedgerError, ResponseError) as exc:
                _log.warning("streams.not_tidied", problem=str(exc))
            await self._sleep(_INTERVAL_S)

    async def tidy(self) -> int:
        """Tidy all streams of this Tollbook now; return how many finished tasks were removed."""
        await self._dead_letters.tidy()
        if self._keep_s is None:
            return 0
        owners = await read_owners(self._pipeline)
        removed = 0
        for stream, owner in owners.items():
            if owner == self._namespace:
                removed += await self._trim(stream, self._keep_s)
        return removed

    async def _may_tidy(self) -> bool:
        key = tidying_lease(self._namespace)
        return await self._pipeline.execute("SET", key, "1", "NX", "PX", _LEASE_MS) is not None

    async def _trim(self, stream: str, keep_s: float) -> int:
        removed = 0
        while True:
            try:
                page, blocker = await self._pipeline.execute(
                    "FCALL", function("trim_tasks"), 1, stream, GROUP, round(1000 * keep_s), _PAGE
                )
            except ResponseError as exc:
                # The key is no stream, or the Redis user may not do this. The other streams are still tidied.
                _log.warning("stream.not_trimmed", stream=stream, problem=str(exc))
                return removed
            removed += page
            if not page:
                break
        self._warn_about_blocker(stream, blocker.decode())
        if removed:
            _log.info("stream.trimmed", stream=stream, entries=removed)
        return removed

    def _warn_about_blocker(self, stream: str, group: str) -> None:
        """Warn once that another group keeps old entries: if nobody uses the group, the stream grows for ever."""
        if group not in ("", GROUP, self._blockers.get(stream)):
            _log.warning("stream.kept_for_group", stream=stream, group=group)
        self._blockers[stream] = group
