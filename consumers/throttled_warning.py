"""Warnings of what comes often: of what lasts, once a minute; of what comes in a flood, the first few and a count.

A store that does not answer holds back every task; a publisher with a fault floods a stream with malformed tasks.
"""

import re
from collections import Counter
from collections.abc import Callable
from typing import Final

from tollbook.ledger.logs import LazyLogger

_EVERY_MS: Final = 60_000
_MAX_KINDS: Final = 100
_log = LazyLogger(__name__)


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


class FloodWarning:
    """Warns of each event by itself while there are few; of the others in a minute, by one line with their number."""

    def __init__(self, event: str, now_ms: Callable[[], int], *, max_lines: int = 10) -> None:
        """`max_lines` is how many lines each kind of event has in a minute, beside the one with the number."""
        self._event = event
        self._now_ms = now_ms
        self._max_lines = max_lines
        self._minute_began_ms: int | None = None
        self._seen: Counter[str] = Counter()

    def warn(self, kind: str, **fields: object) -> None:
        """Warn of one event of a kind; `fields` are shown where it has a line of its own."""
        self.flush()
        if self._minute_began_ms is None:
            self._minute_began_ms = self._now_ms()
        self._seen[kind] += 1
        if self._seen[kind] <= self._max_lines:
            _log.warning(self._event, reason=kind, **fields)

    def flush(self, *, is_last: bool = False) -> None:
        """Write the numbers of a minute that is over; with `is_last`, of the present one too."""
        began_ms = self._minute_began_ms
        if began_ms is None or (not is_last and self._now_ms() - began_ms < _EVERY_MS):
            return
        for kind, seen in sorted(self._seen.items()):
            if seen > self._max_lines:
                _log.warning(f"{self._event}_more", reason=kind, times=seen - self._max_lines)
        self._seen.clear()
        self._minute_began_ms = None
