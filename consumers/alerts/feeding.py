"""Copying budget alerts from the ledger to the queue.

Alerts are events of the ledger. The gate appends them in the step that moves the money. Once folded, they are queued in
the order of their partition. After a crash an alert may be queued twice, with the same id.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from decimal import Decimal
from typing import Any, Final, cast

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from tollbook.consumers.alerts.queue import AlertQueue
from tollbook.ledger.errors import LedgerError
from tollbook.ledger.keys import fed_alerts
from tollbook.ledger.projection.store import Store
from tollbook.schemas.alerts import Alert
from tollbook.schemas.identifiers import describe_budget
from tollbook.schemas.money import format_usd, nanousd_from_decimal

_INTERVAL_S: Final = 1.0
_PAGE: Final = 500
# `seq` rises with the rows, so that DuckDB skips those before it.
_NEW: Final = (
    'SELECT id, seq, epoch_ms(raised_at) AS at_ms, budget, name, value, "window", fraction, cap_usd, settled_usd '
    "FROM alerts WHERE partition = ? AND seq > ? ORDER BY seq LIMIT ?"
)
_OLD: Final = (
    "SELECT coalesce(max(seq), 0) AS seq FROM events WHERE partition = ? AND recorded_at < now() - INTERVAL 1 MINUTE"
)
_log = structlog.get_logger(__name__)


class AlertFeed:
    """Queues the budgets' alerts of every partition. `store` returns the projection that is open now."""

    def __init__(
        self,
        redis: Redis,
        namespace: str,
        partitions: Sequence[int],
        store: Callable[[], Store],
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._redis = redis
        self._queue = AlertQueue(redis, namespace)
        self._key = fed_alerts(namespace)
        self._partitions = tuple(partitions)
        self._store = store
        self._sleep = sleep

    async def run(self) -> None:
        """Queue the folded alerts until cancelled."""
        while True:
            try:
                for partition in self._partitions:
                    await self.feed(partition)
            except (RedisError, OSError, LedgerError) as exc:
                _log.debug("alerts.not_queued", problem=str(exc))
            await self._sleep(_INTERVAL_S)

    async def feed(self, partition: int) -> None:
        """Queue the alerts of a partition that were folded since the last time.

        The first time, queue the alerts of the last minute.

        Errors: redis.RedisError; LedgerError if the projection is not open.
        """
        stored = cast("bytes | None", await self._redis.hget(self._key, str(partition)))
        if stored is None:
            stored = str((await self._query(_OLD, [partition]))[0]["seq"]).encode()
            await self._redis.hset(self._key, str(partition), stored)
        for row in await self._query(_NEW, [partition, int(stored), _PAGE]):
            await self._queue.put(alert_of(row))
            await self._redis.hset(self._key, str(partition), row["seq"])

    async def _query(self, sql: str, parameters: list[Any]) -> list[dict[str, Any]]:
        store = self._store()
        return await asyncio.to_thread(store.query, sql, parameters)


def alert_of(row: dict[str, Any]) -> Alert:
    """Return the alert of a row of the view `alerts`."""
    cap, settled = (nanousd_from_decimal(row[name]) for name in ("cap_usd", "settled_usd"))
    fraction: Decimal = row["fraction"]
    share = f"{100 * fraction:.4f}".rstrip("0").rstrip(".")
    # The first refused call also raises the alert for 100 %, even if less is spent.
    is_refusal = fraction == 1 and (settled < cap or not cap)
    summary = "A call was refused" if is_refusal else f"{share} % is spent"
    spent, limit = (format_usd(each, places=None) for each in (settled, cap))
    return Alert(
        id=row["id"],
        kind="budget",
        text=f"{summary}: {describe_budget(row['budget'])}, {spent} of {limit}.",
        at_ms=row["at_ms"],
        budget=row["name"].partition("~")[0],
        value=row["value"],
        window=row["window"],
        fraction=fraction.normalize(),
        cap_usd=row["cap_usd"].normalize(),
        settled_usd=row["settled_usd"].normalize(),
    )
