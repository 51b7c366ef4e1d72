"""Warnings of what lasts: a store that does not answer holds back every task, and is told of once a minute."""

from collections import Counter
from collections.abc import Callable
from typing import Final

import structlog

_EVERY_MS: Final = 60_000
_log = structlog.get_logger(__name__)


class SeldomWarning:
    """Warns of each kind of problem at once, and then once a minute while it lasts."""

    def __init__(self, event: str, now_ms: Callable[[], int]) -> None:
        self._event = event
        self._now_ms = now_ms
        self._told_at: dict[str, int] = {}
        self._times: Counter[str] = Counter()

    def tell(self, problem: Exception) -> None:
        """Warn, unless it was done lately; `times` is how often this kind of problem came since then."""
        # By kind, since the text may name a call or an address.
        kind, now = type(problem).__name__, self._now_ms()
        self._times[kind] += 1
        told_at = self._told_at.get(kind)
        if told_at is None or now - told_at >= _EVERY_MS:
            self._told_at[kind] = now
            _log.warning(self._event, times=self._times.pop(kind), kind=kind, problem=str(problem))
