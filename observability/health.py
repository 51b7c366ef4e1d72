"""Whether this process lives, and whether a budget decision can be taken here now.

Ready is asked as a call would ask, by the gate's own `balance` with a baseline, so that
nothing is called ready that would be refused; it holds and appends nothing. The answer
comes within `LIMIT_S`, also from a Redis or a projector that hangs, and is kept for a second.
"""

import asyncio
import time
from collections.abc import Awaitable, Iterable
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any, Final

from redis.exceptions import RedisError

from tollbook.inference.routing import routing_with, unpriced_routes
from tollbook.inference.runtime import now_ms
from tollbook.ledger.errors import BaselineUnavailable, LedgerRefused, LedgerReplaced, LedgerUnavailable
from tollbook.ledger.gate.requests import BudgetCap
from tollbook.observability.process_state import OpenLedger, ProcessState
from tollbook.observability.single_flight import SingleFlight
from tollbook.schemas.identifiers import budget_name, month_at, partition_of
from tollbook.schemas.plans import CAPS_NANOUSD, DEFAULT_PLAN

_REDIS_S: Final = 0.6
_DUCKDB_S: Final = 1.2
LIMIT_S: Final = _REDIS_S + _DUCKDB_S
# Of a ledger with more partitions, each answer looks at the next few.
_PARTITIONS_AT_ONCE: Final = 4
_PROJECTOR: Final = "start `tollbook projector`, or wait until it has caught up"
_START: Final = "start the server, or correct REDIS_URL"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at; `advice` where it is not well."""

    check: str
    ok: bool
    found: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Health:
    """An answer: well or not, and why."""

    ok: bool
    checks: tuple[Check, ...]

    def documents(self) -> list[dict[str, Any]]:
        """Return the checks as what is sent."""
        return [{key: value for key, value in asdict(check).items() if value != ""} for check in self.checks]


def liveness(state: ProcessState) -> Health:
    """Whether what runs in the background still runs; that there is an answer shows that the event loop turns.

    A projection that is stuck, or waits for Redis, is not dead: to start it again would not help.
    """
    checks = tuple(
        Check(name, ok=False, found="has ended", advice="see the log; start the process again")
        if task.done()
        else Check(name, ok=True, found="runs")
        for name, task in state.background.items()
    )
    return Health(all(check.ok for check in checks), checks)


class Readiness:
    """Answers whether a budget decision can be taken."""

    def __init__(self, state: ProcessState) -> None:
        self._state = state
        self._now_ms = now_ms
        self._monotonic = time.monotonic
        self._rounds = count()
        self._flight = SingleFlight(self._look)

    async def get(self) -> Health:
        """Return an answer that is at most a second old."""
        return await self._flight.get()

    async def _look(self) -> Health:
        opened = self._state.open_ledger
        if opened is None:
            return Health(ok=False, checks=(Check("process", ok=False, found=self._state.waiting_for),))
        # Side by side, so that what hangs takes no more than its own time.
        found = await asyncio.gather(self._stores(opened), self._prices(opened))
        checks = tuple(check for part in found for check in part)
        return Health(all(check.ok for check in checks), checks)

    async def _stores(self, opened: OpenLedger) -> list[Check]:
        problem = await _problem_of(self._redis(opened), "redis", _START, within_s=_REDIS_S)
        if problem is not None:
            return [problem]
        partitions = len(opened.handle.keys)
        first = next(self._rounds) * _PARTITIONS_AT_ONCE
        chosen = {(first + number) % partitions for number in range(min(partitions, _PARTITIONS_AT_ONCE))}
        decisions = asyncio.gather(*(self._decide(opened, partition) for partition in chosen))
        problem = await _problem_of(decisions, "baseline", _PROJECTOR, within_s=_DUCKDB_S)
        redis = Check("redis", ok=True, found="answers")
        if problem is not None:
            return [redis, problem]
        ledger = Check("ledger", ok=True, found=f"{opened.handle.ledger_id}, with its functions")
        return [redis, ledger, self._baseline(opened, chosen)]

    def _baseline(self, opened: OpenLedger, partitions: Iterable[int]) -> Check:
        """Say how good the baseline is that has just served."""
        since = [opened.ledger.baselines[partition].failing_since for partition in partitions]
        failing = [moment for moment in since if moment is not None]
        if not failing:
            return Check("baseline", ok=True, found="usable")
        return Check(
            "baseline",
            ok=True,
            found=f"kept ones only, DuckDB has not answered for {self._monotonic() - min(failing):.0f} s: "
            "calls of users not seen lately wait",
            advice=_PROJECTOR,
        )

    async def _redis(self, opened: OpenLedger) -> None:
        await opened.handle.pipeline.execute("PING")

    async def _decide(self, opened: OpenLedger, partition: int) -> None:
        """Weigh a call as the gate would, for a user whom no task can name."""
        user = _probe_user(partition, len(opened.handle.keys))
        period = month_at(self._now_ms()).name
        budget = BudgetCap(budget_name("user", user, period), CAPS_NANOUSD[DEFAULT_PLAN])
        await opened.ledger.balance(user_id=user, period=period, budgets=[budget])

    async def _prices(self, opened: OpenLedger) -> list[Check]:
        routes = routing_with(self._state.settings.routes)
        # In a thread: the first look-up loads the catalogue, which takes half a second.
        looking = asyncio.to_thread(unpriced_routes, routes, opened.prices, self._now_ms())
        try:
            unknown = await asyncio.wait_for(looking, LIMIT_S)
        except TimeoutError:
            unknown = ["the price catalogue is still being loaded"]
        if unknown:
            return [
                Check("prices", ok=False, found="; ".join(unknown), advice="set TOLLBOOK_PRICES or TOLLBOOK_ROUTES")
            ]
        return [Check("prices", ok=True, found=f"known for {len(routes)} routes")]


async def _problem_of(looking: Awaitable[Any], name: str, advice: str, *, within_s: float) -> Check | None:
    """Return what is wrong, or None."""
    try:
        async with asyncio.timeout(within_s):
            await looking
    except TimeoutError:
        return Check(name, ok=False, found=f"no answer within {within_s:g} s", advice=advice)
    except LedgerReplaced as exc:
        return Check("ledger", ok=False, found=str(exc), advice="restore the data of Redis")
    except LedgerRefused as exc:
        return Check("ledger", ok=False, found=str(exc), advice="`tollbook doctor` and `tollbook verify` say more")
    except BaselineUnavailable as exc:
        return Check("baseline", ok=False, found=str(exc), advice=advice)
    except (LedgerUnavailable, OSError) as exc:
        return Check("redis", ok=False, found=str(exc), advice=_START)
    except RedisError as exc:
        # What the server answers to a user who may not do what Tollbook needs.
        return Check("functions", ok=False, found=str(exc), advice="let the Redis user load and call functions")
    return None


def _probe_user(partition: int, partitions: int) -> str:
    """A user id of the partition; with a space in it, so that it is nobody's."""
    return next(name for name in (f"health {n}" for n in count()) if partition_of(name, partitions) == partition)
