"""Calls under way whose tasks other workers have taken over: those that nobody waits for any more are cut off.

A lost claim alone does not tell: who took a task over may wait for the call of the one that it was taken from. The
ledger tells: once another run has money of its own, or the call is over, an answer would be of no use.
Invariants: a call whose answer may still be the task's is not cut off (G4); nor is one whose cost could not be found
out afterwards, since its answer is the only thing that tells it (G3).
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
"""Returns what the ledger keeps of a user's call."""
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class _Running:
    """A call under way, and the task that waits for it."""

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
        """While this is open, the current task is cancelled if the call, under its hold of this number, is overtaken.

        `can_be_cut_off`: whether a request is in flight whose cost can be found out without its answer.
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
        """Look after a call whose claim was lost, until it ends or nobody waits for it any more."""
        running = self._running.get(delivery.key)
        if running is None:
            return
        watch = asyncio.create_task(self._watch(delivery, running))
        self._watches.add(watch)
        watch.add_done_callback(self._watches.discard)

    def close(self) -> None:
        """Watch nothing any more."""
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
        """Whether an answer is of no use: the call is over, or another run has money of its own."""
        try:
            record = await self._record_of(running.user_id, running.call_id)
        except LedgerError as exc:
            _log.warning("call.not_looked_up", call_id=running.call_id, problem=str(exc))
            return False
        if record is None:
            return False
        return record.state == "settled" or (record.state == "open" and record.hold.hold != running.hold)
