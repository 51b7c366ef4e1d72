"""Alerts about the system: the projector is behind, tasks are dead-lettered, spend is assumed, a price is missing.

Each is raised when its condition begins, and again only after it has ended. Raised alerts are recorded in Redis, so
that the next process does not raise them again.
"""

import asyncio
import json
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final, cast

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from tollbook.consumers.alerts.queue import AlertQueue
from tollbook.ledger.keys import raised_alerts
from tollbook.observability.facts import FactReader, Facts
from tollbook.schemas.alerts import Alert, AlertKind
from tollbook.schemas.policy import AlertRule

_INTERVAL_S: Final = 15.0
_DEAD_LETTERS_EVERY_MS: Final = 3600 * 1000
# Below this, one assumed call would be a large share.
_MIN_SETTLED_USD: Final = Decimal(1)
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Condition:
    """A possible problem. `text` is None if there is none; an alert with a `count` is raised again when it grows."""

    kind: AlertKind
    text: str | None
    count: int = 0


@dataclass(frozen=True, slots=True)
class Spend:
    """Settled spend of the current month, and its assumed part, in dollars."""

    settled_usd: Decimal
    assumed_usd: Decimal


def conditions(facts: Facts, rule: AlertRule, *, spend: Spend | None, unpriced: Iterable[str]) -> list[Condition]:
    """Return the conditions; those whose facts could not be read are left out."""
    found: list[Condition] = []
    if facts.lag is not None:
        is_behind = facts.lag.seconds > rule.projector_behind_s
        text = f"The projector is {facts.lag.seconds:.0f} s and {facts.lag.events:,} events behind the ledger."
        found.append(Condition("projector-behind", text if is_behind else None))
    if facts.dead_letters is not None and facts.dead_letters_dropped is not None:
        count = facts.dead_letters + facts.dead_letters_dropped
        text = f"{facts.dead_letters:,} tasks are dead-lettered: see `tollbook dead-letters list`."
        found.append(Condition("dead-letters", text if facts.dead_letters else None, count))
    if spend is not None:
        share = spend.assumed_usd / spend.settled_usd if spend.settled_usd >= _MIN_SETTLED_USD else Decimal(0)
        text = (
            f"{share:.0%} of this month's spend is assumed, because its cost is not known: "
            "`tollbook reconcile` asks the provider."
        )
        found.append(Condition("assumed-spend", text if share > rule.assumed_share else None))
    problems = list(unpriced)
    text = f"Calls are refused, because a price is not known: {'; '.join(problems)}."
    found.append(Condition("price-unknown", text if problems else None))
    return found


class AlertWatch:
    """Raises alerts about the system in the process that folds the ledger."""

    def __init__(
        self,
        redis: Redis,
        namespace: str,
        rule: AlertRule,
        facts: FactReader,
        *,
        read_spend: Callable[[], Spend | None],
        read_unpriced: Callable[[], list[str]],
        now_ms: Callable[[], int],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`read_spend` and `read_unpriced` may block; they run in a thread."""
        self._redis = redis
        self._queue = AlertQueue(redis, namespace)
        self._key = raised_alerts(namespace)
        self._rule = rule
        self._facts = facts
        self._read_spend = read_spend
        self._read_unpriced = read_unpriced
        self._now_ms = now_ms
        self._sleep = sleep

    async def run(self) -> None:
        """Check every 15 seconds until cancelled."""
        while True:
            try:
                await self.look()
            except (RedisError, OSError) as exc:
                _log.debug("alerts.not_raised", problem=str(exc))
            await self._sleep(_INTERVAL_S)

    async def look(self) -> None:
        """Raise alerts for conditions that have begun since the last check. Errors: redis.RedisError."""
        facts, spend, unpriced = await asyncio.gather(
            self._facts.read(), asyncio.to_thread(self._read_spend), asyncio.to_thread(self._read_unpriced)
        )
        raised = await self._raised()
        for condition in conditions(facts, self._rule, spend=spend, unpriced=unpriced):
            before = raised.get(condition.kind)
            if condition.text is None:
                if before is not None:
                    await self._redis.hdel(self._key, condition.kind)
            elif before is None or self._has_grown(condition, before):
                await self._raise(condition.kind, condition.text, condition.count)

    def _has_grown(self, condition: Condition, before: Mapping[str, int]) -> bool:
        is_pause_over = self._now_ms() - before["at_ms"] >= _DEAD_LETTERS_EVERY_MS
        return condition.count > before["count"] and is_pause_over

    async def _raise(self, kind: AlertKind, text: str, count: int) -> None:
        now = self._now_ms()
        await self._queue.put(Alert(id=str(uuid.uuid4()), kind=kind, text=text, at_ms=now))
        # Recorded after queueing: a process that dies in between causes a duplicate alert, never a missing one.
        await self._redis.hset(self._key, kind, json.dumps({"at_ms": now, "count": count}))
        _log.warning("alert.raised", kind=kind, text=text)

    async def _raised(self) -> dict[str, Any]:
        stored = cast("Mapping[bytes, bytes]", await self._redis.hgetall(self._key))
        return {kind.decode(): json.loads(value) for kind, value in stored.items()}
