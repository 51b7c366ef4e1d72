"""Telling what holds tasks back: a store that does not answer holds back every task, and is told of once a minute."""

from collections import Counter
from collections.abc import Callable
from typing import Final

import structlog

from consumers.messages import Delivery

_EVERY_MS: Final = 60_000
_log = structlog.get_logger(__name__)


class HeldBack:
    """Warns of each kind of problem at once, then once a minute while it lasts; at DEBUG, of each task."""

    def __init__(self, now_ms: Callable[[], int]) -> None:
        self._now_ms = now_ms
        self._told_at: dict[str, int] = {}
        self._times: Counter[str] = Counter()

    def tell(self, delivery: Delivery, problem: Exception) -> None:
        """Tell that a task is tried again later; `times` is how often this kind of problem came since it was told."""
        # By kind, since the text may name a call or an address.
        kind, now = type(problem).__name__, self._now_ms()
        _log.debug("task.held_back", entry_id=delivery.entry_id, stream=delivery.stream, problem=str(problem))
        self._times[kind] += 1
        told_at = self._told_at.get(kind)
        if told_at is None or now - told_at >= _EVERY_MS:
            self._told_at[kind] = now
            _log.warning("tasks.held_back", times=self._times.pop(kind), kind=kind, problem=str(problem))
