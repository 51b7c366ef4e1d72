"""Removing old entries from the record of raised alerts, so that the record does not grow for ever.

An alert belongs to a window. Its entry keeps the alert from being raised twice, so it is needed until no cost can be
booked in the window any more.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, date, datetime, time, timedelta
from typing import Final

import structlog
from redis.exceptions import ResponseError

from tollbook.ledger.errors import LedgerError
from tollbook.ledger.gate.gate import Gate

_EVERY_S: Final = 3600.0
_PAGE: Final = 1_000
# A month may begin on its 28th, in any time zone.
_MARGIN: Final = timedelta(days=30)
_WEEK: Final = re.compile(r"(\d{4})-W(\d\d)")
_log = structlog.get_logger(__name__)


class AlertTidying:
    """Forgets alerts of windows that ended more than `keep_s` seconds ago.

    Until then, the cost of a call in the window can still be corrected.
    """

    def __init__(
        self, gates: Sequence[Gate], *, keep_s: float, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        self._gates = gates
        self._keep = timedelta(seconds=keep_s)
        self._sleep = sleep

    async def run(self) -> None:
        """Tidy every hour until cancelled."""
        while True:
            await self._sleep(_EVERY_S)
            try:
                await self.tidy()
            except (LedgerError, ResponseError) as exc:
                _log.debug("alerts.not_tidied", problem=str(exc))

    async def tidy(self) -> int:
        """Tidy now; return how many were forgotten. Errors: LedgerUnavailable."""
        forgotten = 0
        for gate in self._gates:
            oldest = datetime.fromtimestamp(await gate.now_ms() / 1000, UTC) - self._keep
            fields = [field for field in await gate.raised_alerts() if is_over(field.rsplit(" ", 1)[0], oldest)]
            for start in range(0, len(fields), _PAGE):
                forgotten += await gate.forget_alerts(fields[start : start + _PAGE])
        if forgotten:
            _log.info("alerts.tidied", alerts=forgotten)
        return forgotten


def is_over(budget: str, moment: datetime) -> bool:
    """Whether a budget's window was over at a moment in every time zone. The window of a total never ends."""
    label = budget.rsplit(":", 1)[1]
    try:
        if week := _WEEK.fullmatch(label):
            begins = date.fromisocalendar(int(week[1]), int(week[2]), 1)
        else:
            begins = date.fromisoformat(label if len(label) > len("2026-11") else f"{label}-01")
    except ValueError:
        return False
    return datetime.combine(begins, time.min, UTC) + timedelta(days=31) + _MARGIN < moment
