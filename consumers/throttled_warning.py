"""Warnings of what lasts: a store that does not answer holds back every task, and is warned of once a minute."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Final

import structlog

_EVERY_MS: Final = 60_000
_MAX_KINDS: Final = 100
_log = structlog.get_logger(__name__)


class ThrottledWarning:
    """Warns of each kind of problem at once, and then once a minute while it lasts."""

    def __init__(self, event: str, now_ms: Callable[[], int]) -> None:
        self._event = event
        self._now_ms = now_ms
        self._warned_at_ms: dict[str, int] = {}
        self._times: Counter[str] = Counter()

    def warn(self, problem: Exception) -> None:
        """Warn, unless it was done lately; `times` is how often this kind of problem came since then."""
        # By how its text begins, since the rest may name a call, a number or an address.
        name, now = type(problem).__name__, self._now_ms()
        kind = name + re.split(r"[\d'\"(:/]", str(problem), maxsplit=1)[0]
        if len(self._warned_at_ms) >= _MAX_KINDS:
            self._warned_at_ms.clear()
            self._times.clear()
        self._times[kind] += 1
        warned_at_ms = self._warned_at_ms.get(kind)
        if warned_at_ms is None or now - warned_at_ms >= _EVERY_MS:
            self._warned_at_ms[kind] = now
            _log.warning(self._event, times=self._times.pop(kind), kind=name, problem=str(problem))
