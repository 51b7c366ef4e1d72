"""Deliveries: each alert goes to each receiver at least once, and alerts about one budget go in their order.

A delivery that fails is retried after a pause that doubles. It delays no calls, no other receivers and no alerts about
other budgets. After a day of failures an alert is given up, so that newer alerts are delivered.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Final

import structlog
from redis.exceptions import RedisError

from tollbook.consumers.alerts.queue import AlertQueue, Queued, ReceiverState
from tollbook.consumers.alerts.receivers import NotDelivered, Receiver
from tollbook.schemas.alerts import Alert

_GIVE_UP_MS: Final = 24 * 3600 * 1000
_FIRST_PAUSE_S: Final = 1.0
_MAX_PAUSE_S: Final = 300.0
_PAGE: Final = 100
_BLOCK_MS: Final = 1_000
_log = structlog.get_logger(__name__)


class Deliveries:
    """Serves receivers from the queue. Clock and sleep are parameters."""

    def __init__(
        self,
        queue: AlertQueue,
        receivers: Sequence[Receiver],
        unusable: Mapping[str, str] = MappingProxyType({}),
        *,
        now_ms: Callable[[], int],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        max_open: int = 1_000,
    ) -> None:
        """`unusable` has, by receiver name, why it cannot be used; `max_open` limits a receiver's alerts in flight."""
        self._queue = queue
        self._receivers = tuple(receivers)
        self._unusable = dict(unusable)
        self._now_ms = now_ms
        self._sleep = sleep
        self._max_open = max_open

    async def prepare(self) -> None:
        """Register the receivers: each gets the alerts raised from now on. Errors: redis.RedisError."""
        await self._queue.keep_receivers({receiver.name for receiver in self._receivers} | self._unusable.keys())
        for name, problem in self._unusable.items():
            await self._queue.write_state(ReceiverState(name, problem=problem, failing_since_ms=self._now_ms()))
        for receiver in self._receivers:
            await self._queue.add_receiver(receiver.name)

    async def run(self) -> None:
        """Deliver until cancelled."""
        async with asyncio.TaskGroup() as group:
            for receiver in self._receivers:
                group.create_task(_DeliveryLoop(receiver, self._queue, self._now_ms, self._sleep, self._max_open).run())


class _DeliveryLoop:
    """Serves one receiver."""

    def __init__(
        self,
        receiver: Receiver,
        queue: AlertQueue,
        now_ms: Callable[[], int],
        sleep: Callable[[float], Awaitable[None]],
        max_open: int,
    ) -> None:
        self._receiver = receiver
        self._queue = queue
        self._now_ms = now_ms
        self._sleep = sleep
        self._room = asyncio.Semaphore(max_open)
        self._tasks: set[asyncio.Task[None]] = set()
        self._last: dict[str, asyncio.Task[None]] = {}
        self._open: set[str] = set()
        """Ids of the entries in flight."""
        self._failing: dict[str, int] = {}
        """By subject, since when its alerts fail, in milliseconds since the epoch."""
        self._state = ReceiverState(receiver.name)

    async def run(self) -> None:
        try:
            await self._read()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _read(self) -> None:
        """Read the alerts that this receiver was given before and did not acknowledge, then the new ones."""
        after = "0"
        while True:
            try:
                if after == "0":
                    await self._load_state()
                is_new = after == ">"
                found = await self._queue.read(
                    self._receiver.name, after=after, count=_PAGE, block_ms=_BLOCK_MS if is_new else None
                )
            except (RedisError, OSError) as exc:
                _log.warning("alerts.not_read", receiver=self._receiver.name, problem=str(exc))
                await self._sleep(_FIRST_PAUSE_S)
                after = "0"  # A lost reply may have contained alerts: Redis counts them as given to this receiver.
                continue
            for queued in found:
                if queued.entry_id not in self._open:
                    await self._start(queued)
            if not is_new:
                after = found[-1].entry_id if found else ">"

    async def _load_state(self) -> None:
        for state in await self._queue.states():
            if state.name == self._receiver.name:
                self._state = state

    async def _start(self, queued: Queued) -> None:
        """Start delivering an alert; it waits until the earlier alert about the same subject is done."""
        await self._room.acquire()
        self._open.add(queued.entry_id)
        subject = queued.alert.subject if queued.alert else ""
        before = self._last.get(subject)
        task = self._last[subject] = asyncio.create_task(self._deliver(queued, before))
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._end(queued, subject, done))

    def _end(self, queued: Queued, subject: str, done: asyncio.Task[None]) -> None:
        self._room.release()
        self._tasks.discard(done)
        self._open.discard(queued.entry_id)
        if self._last.get(subject) is done:
            del self._last[subject]
        if not done.cancelled() and (problem := done.exception()) is not None:
            _log.error("alert.not_delivered", receiver=self._receiver.name, problem=repr(problem))

    async def _deliver(self, queued: Queued, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait([before])
        if queued.alert is not None:
            await self._deliver_with_retries(queued.alert)
        await self._retry_until_redis_answers(lambda: self._queue.take(self._receiver.name, queued.entry_id))

    async def _deliver_with_retries(self, alert: Alert) -> None:
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                await self._receiver.deliver(alert)
            except NotDelivered as exc:
                problem, asked_s = str(exc), exc.pause_s
            except Exception as exc:  # noqa: BLE001 - a fault in somebody's library must not end the deliveries.
                problem, asked_s = type(exc).__name__, None
            else:
                self._failing.pop(alert.subject, None)
                await self._update_state(None, delivered=self._state.delivered + 1, delivered_at_ms=self._now_ms())
                return
            is_given_up = self._now_ms() - alert.at_ms > _GIVE_UP_MS
            self._failing.setdefault(alert.subject, self._now_ms())
            await self._update_state(problem, dropped=self._state.dropped + is_given_up)
            _log.warning(
                "alert.given_up" if is_given_up else "alert.not_taken",
                receiver=self._receiver.name,
                alert_id=alert.id,
                problem=problem,
            )
            if is_given_up:
                return
            await self._sleep(max(pause_s, asked_s or 0))
            pause_s = min(2 * pause_s, _MAX_PAUSE_S)

    async def _update_state(self, problem: str | None, **changes: int) -> None:
        """Write the receiver's state. The receiver has a problem while alerts about any subject fail."""
        self._state = replace(
            self._state,
            problem=(problem or self._state.problem) if self._failing else None,
            failing_since_ms=min(self._failing.values(), default=None),
            **changes,
        )
        try:
            await self._queue.write_state(self._state)
        except (RedisError, OSError) as exc:
            _log.debug("alerts.state_not_written", problem=str(exc))

    async def _retry_until_redis_answers(self, step: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                return await step()
            except (RedisError, OSError) as exc:
                _log.warning("alerts.not_noted", receiver=self._receiver.name, problem=str(exc))
                await self._sleep(_FIRST_PAUSE_S)
