"""Cutting off running calls whose tasks other workers have taken over, once their answers are of no use.

A lost claim alone is no reason: the other worker may wait for the running call. The ledger decides: once another run
has a hold of its own, or the call is settled, the answer is of no use.
Invariants: a call whose answer may still become the task's result is not cut off (G4). A call whose cost only its
answer can tell is not cut off either (G3).
"""

import asyncio
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import structlog

from tollbook.consumers.messages import Delivery
from tollbook.ledger.errors import LedgerError
from tollbook.ledger.gate.call_record import CallRecord

_LOOK_AGAIN_S: Final = 1.0
RecordOf = Callable[[str, str], Awaitable[CallRecord | None]]
"""Returns the ledger's record of a call, by user id and call id."""
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class _Running:
    """A running call, and the asyncio task that waits for it."""

    call_id: str
    user_id: str
    hold: int
    can_be_cut_off: Callable[[], bool]
    task: asyncio.Task[Any]


class OvertakenCalls:
    """The calls that a worker makes, by their deliveries."""

    def __init__(self, record_of: RecordOf) -> None:
        self._record_of = record_of
        self._running: dict[tuple[str, str], _Running] = {}
        self._watches: set[asyncio.Task[None]] = set()

    @contextmanager
    def running(
        self, delivery: Delivery, call_id: str, *, user_id: str, hold: int, can_be_cut_off: Callable[[], bool]
    ) -> Generator[None]:
        """Register a call: until the context ends, the current task is cancelled if the call is overtaken.

        `hold` is the number of the call's hold. `can_be_cut_off` says whether a request is in flight whose cost can be
        found out without its answer.
        """
        task = asyncio.current_task()
        assert task is not None, "a call is made in a task"
        running = _Running(call_id, user_id, hold, can_be_cut_off, task)
        self._running[delivery.key] = running
        try:
            yield
        finally:
            if self._running.get(delivery.key) is running:
                del self._running[delivery.key]

    def watch(self, delivery: Delivery) -> None:
        """Watch a call whose claim was lost, until it ends or is cut off."""
        running = self._running.get(delivery.key)
        if running is None:
            return
        watch = asyncio.create_task(self._watch(delivery, running))
        self._watches.add(watch)
        watch.add_done_callback(self._watches.discard)

    def close(self) -> None:
        """Stop all watches."""
        for watch in self._watches:
            watch.cancel()

    async def _watch(self, delivery: Delivery, running: _Running) -> None:
        def may_be_cut_off() -> bool:
            return self._running.get(delivery.key) is running and running.can_be_cut_off()

        while self._running.get(delivery.key) is running:
            if may_be_cut_off() and await self._is_overtaken(running) and may_be_cut_off():
                _log.warning("call.cut_off", call_id=running.call_id, stream=delivery.stream)
                running.task.cancel()
                return
            await asyncio.wait({running.task}, timeout=_LOOK_AGAIN_S)

    async def _is_overtaken(self, running: _Running) -> bool:
        """Whether the answer is of no use: the call is settled, or another run has a hold of its own."""
        try:
            record = await self._record_of(running.user_id, running.call_id)
        except LedgerError as exc:
            _log.warning("call.not_looked_up", call_id=running.call_id, problem=str(exc))
            return False
        if record is None:
            return False
        return record.state == "settled" or (record.state == "open" and record.hold.hold != running.hold)
