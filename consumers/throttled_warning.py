"""Warnings that do not flood the log.

A problem that lasts, such as a store that does not answer, is logged once a minute. Of events that come in large
numbers, such as malformed tasks, the first few of a minute are logged, and the number of the others.
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
        """Warn, unless this kind was logged in the last minute; `times` counts the kind since its last line."""
        # The kind is the beginning of the text, since the rest may name a call, a number or an address.
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
    """Logs the first few events of a minute one by one, and the number of the others in one line."""

    def __init__(self, event: str, now_ms: Callable[[], int], *, max_lines: int = 10) -> None:
        """`max_lines` is how many events of each kind are logged per minute one by one."""
        self._event = event
        self._now_ms = now_ms
        self._max_lines = max_lines
        self._minute_began_ms: int | None = None
        self._seen: Counter[str] = Counter()

    def warn(self, kind: str, **fields: object) -> None:
        """Warn of one event of a kind; `fields` are shown if the event gets its own line."""
        self.flush()
        if self._minute_began_ms is None:
            self._minute_began_ms = self._now_ms()
        self._seen[kind] += 1
        if self._seen[kind] <= self._max_lines:
            _log.warning(self._event, reason=kind, **fields)

    def flush(self, *, is_last: bool = False) -> None:
        """Log the numbers of the last minute; with `is_last`, those of the current minute too."""
        began_ms = self._minute_began_ms
        if began_ms is None or (not is_last and self._now_ms() - began_ms < _EVERY_MS):
            return
        for kind, seen in sorted(self._seen.items()):
            if seen > self._max_lines:
                _log.warning(f"{self._event}_more", reason=kind, times=seen - self._max_lines)
        self._seen.clear()
        self._minute_began_ms = None
