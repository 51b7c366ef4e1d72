"""Alerts in the process that folds the ledger: raised, queued and delivered while it runs.

Nothing here is in the way of calls: a receiver that cannot be used is logged and shown by `doctor`, and calls go on.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from typing import Final

import httpx
import structlog
from redis.exceptions import RedisError

from tollbook.consumers.alerts.deliveries import Deliveries
from tollbook.consumers.alerts.feeding import AlertFeed
from tollbook.consumers.alerts.queue import AlertQueue
from tollbook.consumers.alerts.receivers import receivers_of
from tollbook.inference.environment import read_variable
from tollbook.inference.providers.transport import tls_context
from tollbook.inference.routing import unpriced_routes
from tollbook.inference.runtime import LedgerHandle
from tollbook.inference.settings import Settings
from tollbook.inference.stated_policy import policy_of
from tollbook.ledger.clock import now_ms
from tollbook.ledger.errors import BaselineUnavailable, LedgerError
from tollbook.ledger.projection.store import Store
from tollbook.observability.alert_watch import AlertWatch, Spend
from tollbook.observability.process_state import ProcessState
from tollbook.schemas.policy import AlertRule

_RETRY_S: Final = 5.0
_SPEND: Final = """
    SELECT coalesce(sum(spent_usd), 0) AS settled_usd, coalesce(sum(assumed_usd), 0) AS assumed_usd
    FROM spend WHERE period = ?
"""
_log = structlog.get_logger(__name__)


@asynccontextmanager
async def open_alerts(settings: Settings, handle: LedgerHandle, state: ProcessState) -> AsyncGenerator[None]:
    """Deliver alerts for as long as this is open, to the receivers that the policy file names."""
    running = asyncio.create_task(_Alerting(settings, handle, state).run())
    try:
        yield
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running


class _Alerting:
    def __init__(self, settings: Settings, handle: LedgerHandle, state: ProcessState) -> None:
        self._settings = settings
        self._handle = handle
        self._state = state

    async def run(self) -> None:
        """Deliver until cancelled; after a fault, begin again."""
        while True:
            try:
                return await self._run()
            except Exception:  # noqa: BLE001 - alerts end with the process, not before; calls go on meanwhile.
                _log.exception("alerts.failed")
                await asyncio.sleep(_RETRY_S)

    async def _run(self) -> None:
        rule = policy_of(self._settings).alerts
        async with httpx.AsyncClient(verify=tls_context()) as http:
            receivers, unusable = receivers_of(rule, self._settings.webhook_secret, read_variable, http)
            for name, problem in unusable.items():
                _log.error("alerts.receiver_unusable", receiver=name, problem=problem)
            queue = AlertQueue(self._handle.redis, self._settings.namespace)
            deliveries = Deliveries(queue, receivers, unusable, now_ms=now_ms)
            await self._prepare(deliveries)
            if not receivers:
                return
            async with asyncio.TaskGroup() as group:
                group.create_task(deliveries.run())
                group.create_task(self._feed().run())
                group.create_task(self._watch(rule).run())

    async def _prepare(self, deliveries: Deliveries) -> None:
        while True:
            try:
                return await deliveries.prepare()
            except (RedisError, OSError) as exc:
                _log.warning("alerts.not_prepared", problem=str(exc))
                await asyncio.sleep(_RETRY_S)

    def _feed(self) -> AlertFeed:
        partitions = [keys.partition for keys in self._handle.keys]
        return AlertFeed(self._handle.redis, self._settings.namespace, partitions, self._store)

    def _watch(self, rule: AlertRule) -> AlertWatch:
        return AlertWatch(
            self._handle.redis,
            self._settings.namespace,
            rule,
            self._state.facts,
            read_spend=self._spend,
            read_unpriced=self._unpriced,
            now_ms=now_ms,
        )

    def _store(self) -> Store:
        projection = self._state.projection
        if projection is None:
            raise BaselineUnavailable("no projection is open here")
        return projection.store

    def _spend(self) -> Spend | None:
        try:
            period = self._handle.policies.newest.budgets.calendar.month_at(now_ms()).name
            (row,) = self._store().query(_SPEND, [period])
        except LedgerError:
            return None
        return Spend(row["settled_usd"], row["assumed_usd"])

    def _unpriced(self) -> list[str]:
        in_force = self._handle.policies.newest
        in_force.prices.refresh()
        return unpriced_routes(in_force.policy.tasks, in_force.prices, now_ms())
