"""The watermark of one partition: up to where tail entries may be dropped.

Invariant (G6): the watermark never passes what is committed to DuckDB. It stays some seconds
behind, so that baselines kept by workers remain usable.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import cast

import structlog
from redis.asyncio import Redis

from tollbook.ledger.gate.requests import Position
from tollbook.ledger.keys import Keys
from tollbook.ledger.projection.fold import Folded
from tollbook.ledger.server.connection import ANSWER_TIMEOUT_S
from tollbook.schemas.identifiers import EntryId

Trim = Callable[[int, EntryId, Sequence[str]], Awaitable[object]]
"""(partition, watermark, budgets): the gate's `trim` of that partition."""

_NAMES_PER_TRIM = 500
_log = structlog.get_logger(__name__)


class Watermark:
    """Moves the watermark after the fold, and drops the tail entries of budgets that were folded."""

    def __init__(
        self, redis: Redis, keys: Keys, *, trim: Trim, keep_ms: int, now_ms: Callable[[], Awaitable[int]]
    ) -> None:
        self._redis = redis
        self._keys = keys
        self._trim = trim
        self._keep_ms = keep_ms
        self._now_ms = now_ms
        self._touched: deque[tuple[EntryId, Iterable[str]]] = deque()
        self._is_swept = False

    def note(self, folded: Folded) -> None:
        """Add the budgets of a committed fold, for the next `move`."""
        self._touched.append((folded.position.entry, folded.budgets))

    async def move(self, position: Position) -> None:
        """Trim tail entries that are folded and old enough; the first time, on every tail. `position`: the fold's.

        Errors: LedgerUnavailable; RedisError; TimeoutError.
        """
        if not self._is_swept and position.seq:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                names = [name async for name in self._tails()]
            self._touched.appendleft((self._touched[0][0] if self._touched else position.entry, names))
            self._is_swept = True
        if not self._touched:
            return
        newest_ms = await self._now_ms() - self._keep_ms
        watermark, names = None, set[str]()
        while self._touched and self._touched[0][0].ms <= newest_ms:  # G6
            watermark, touched = self._touched.popleft()
            names.update(touched)
        if watermark is None:
            return
        ordered = sorted(names)
        try:
            for start in range(0, max(1, len(ordered)), _NAMES_PER_TRIM):
                await self._trim(self._keys.partition, watermark, ordered[start : start + _NAMES_PER_TRIM])
        except BaseException:
            self._touched.appendleft((watermark, names))
            raise
        _log.debug("watermark.moved", partition=self._keys.partition, watermark=str(watermark), budgets=len(ordered))

    async def _tails(self) -> AsyncIterator[str]:
        prefix = len(self._keys.tail(""))
        pattern = self._keys.tail_pattern
        async for key in cast("AsyncIterator[bytes]", self._redis.scan_iter(match=pattern, count=1000)):  # pyright: ignore[reportUnknownMemberType]
            yield (key.decode() if isinstance(key, bytes) else key)[prefix:]  # pyright: ignore[reportUnnecessaryIsInstance]
