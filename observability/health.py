"""Liveness and readiness of this process: does it run, and can it make a budget decision now?

Readiness does what a call would do: it asks the gate's own `balance` with a baseline, and runs a probe that writes and
undoes the write. So a process that would refuse calls is never ready. It makes no hold and appends no event.

The answer comes within `LIMIT_S`, even if Redis or the projector hangs, and is cached for a second.
"""

import asyncio
import time
from collections.abc import Awaitable, Iterable
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any, Final

from redis.exceptions import RedisError

from tollbook.inference.current_policy import PolicyInForce
from tollbook.inference.routing import unpriced_routes
from tollbook.inference.runtime import now_ms
from tollbook.ledger.errors import (
    BaselineUnavailable,
    LedgerRefused,
    LedgerReplaced,
    LedgerUnavailable,
    PermissionsMissing,
    RedisCannotServe,
    TooFewReplicas,
)
from tollbook.ledger.gate.requests import BudgetCap
from tollbook.ledger.server.policy import ServerUnsafe
from tollbook.ledger.server.refusals import reason_of
from tollbook.observability.process_state import OpenLedger, ProcessState
from tollbook.observability.single_flight import SingleFlight
from tollbook.schemas.identifiers import budget_name, partition_of

_REDIS_LIMIT_S: Final = 0.6
_DUCKDB_LIMIT_S: Final = 1.2
LIMIT_S: Final = _REDIS_LIMIT_S + _DUCKDB_LIMIT_S
# If a ledger has more partitions, each answer checks the next few.
_PARTITIONS_AT_ONCE: Final = 4
_PROJECTOR: Final = "start `tollbook projector`, or wait until it has caught up"
_START: Final = "start the server, or correct REDIS_URL"


@dataclass(frozen=True, slots=True)
class Check:
    """One check: what was found, and `advice` if something is wrong."""

    check: str
    ok: bool
    found: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Health:
    """An answer with its checks."""

    ok: bool
    checks: tuple[Check, ...]

    def documents(self) -> list[dict[str, Any]]:
        """Return the checks as JSON objects."""
        return [{key: value for key, value in asdict(check).items() if value != ""} for check in self.checks]


def liveness(state: ProcessState) -> Health:
    """Check that the background tasks still run. That there is an answer at all shows that the event loop runs.

    A projection that is stuck or waits for Redis counts as alive, because a restart would not help.
    """
    checks = tuple(
        Check(name, ok=False, found="has ended", advice="see the log; restart the process")
        if task.done()
        else Check(name, ok=True, found="runs")
        for name, task in state.background.items()
    )
    return Health(all(check.ok for check in checks), checks)


class Readiness:
    """Checks whether a budget decision can be made."""

    def __init__(self, state: ProcessState) -> None:
        self._state = state
        self._now_ms = now_ms
        self._monotonic = time.monotonic
        self._rounds = count()
        self._flight = SingleFlight(self._check)

    async def get(self) -> Health:
        """Return an answer that is at most a second old."""
        return await self._flight.get()

    async def _check(self) -> Health:
        opened = self._state.open_ledger
        if opened is None:
            return Health(ok=False, checks=(Check("process", ok=False, found=self._state.waiting_for),))
        # Concurrently, so that a check that hangs does not delay the others.
        found = await asyncio.gather(self._stores(opened), self._prices(opened))
        checks = tuple(check for part in found for check in part)
        return Health(all(check.ok for check in checks), checks)

    async def _stores(self, opened: OpenLedger) -> list[Check]:
        problem = await _problem_of(self._ping(opened), "redis", _START, within_s=_REDIS_LIMIT_S)
        if problem is not None:
            return [problem]
        partitions = len(opened.handle.keys)
        first = next(self._rounds) * _PARTITIONS_AT_ONCE
        chosen = {(first + number) % partitions for number in range(min(partitions, _PARTITIONS_AT_ONCE))}
        # A server that answers may still refuse writes: a replica, full memory, a missing permission.
        writing = asyncio.gather(*(self._write(opened, partition) for partition in chosen))
        decisions = asyncio.gather(*(self._decide(opened, partition) for partition in chosen))
        policy = opened.handle.server.policy
        is_kept = "" if policy.is_synced else f"; accepted by TOLLBOOK_ALLOW_UNSYNCED: {policy.unsynced_reason()}"
        redis = Check("redis", ok=True, found=f"answers, and accepts writes{is_kept}")
        problems = await asyncio.gather(
            _problem_of(writing, "redis", _START, within_s=_DUCKDB_LIMIT_S),
            _problem_of(decisions, "baseline", _PROJECTOR, within_s=_DUCKDB_LIMIT_S),
        )
        if problems[0] is not None:
            return [problems[0]]
        if problems[1] is not None:
            return [redis, problems[1]]
        ledger = Check("ledger", ok=True, found=f"{opened.handle.ledger_id}, with its functions")
        return [redis, ledger, self._baseline(opened, chosen)]

    def _baseline(self, opened: OpenLedger, partitions: Iterable[int]) -> Check:
        """Describe the baseline that was just used."""
        since = [opened.ledger.baselines[partition].failing_since for partition in partitions]
        failing = [moment for moment in since if moment is not None]
        if not failing:
            return Check("baseline", ok=True, found="usable")
        problem = self._state.projection.problem if self._state.projection is not None else None
        why = f" ({problem})" if problem else ""
        return Check(
            "baseline",
            ok=True,
            found=f"only cached ones, DuckDB has not answered for {self._monotonic() - min(failing):.0f} s: "
            f"calls of users not seen lately wait{why}",
            advice=_PROJECTOR,
        )

    async def _ping(self, opened: OpenLedger) -> None:
        opened.handle.server.check()  # First, because a server that waits for replicas is slow to answer.
        await opened.handle.pipeline.execute("PING")

    async def _write(self, opened: OpenLedger, partition: int) -> None:
        await opened.ledger.probe(partition)

    async def _decide(self, opened: OpenLedger, partition: int) -> None:
        """Weigh a call as the gate would, for a user id that no task can have."""
        user = _probe_user(partition, len(opened.handle.keys))

        async def weigh(policy: PolicyInForce) -> None:
            period = policy.budgets.calendar.month_at(self._now_ms()).name
            cap_nanousd = policy.cap_nanousd(user, policy.policy.default_plan)
            budget = BudgetCap(budget_name("user", user, period), cap_nanousd)
            await opened.ledger.balance(user_id=user, period=period, budgets=[budget], policy_version=policy.version)

        await opened.handle.policies.decide(user, weigh)

    async def _prices(self, opened: OpenLedger) -> list[Check]:
        in_force = opened.handle.policies.newest
        routes, prices = in_force.policy.tasks, in_force.prices
        prices.refresh()
        # In a thread: the first lookup loads the catalogue, which takes half a second.
        looking = asyncio.to_thread(unpriced_routes, routes, prices, self._now_ms())
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
    """Return a failed check if the awaitable fails or times out; otherwise None."""
    try:
        async with asyncio.timeout(within_s):
            await looking
    except TimeoutError:
        return Check(name, ok=False, found=f"no answer within {within_s:g} s", advice=advice)
    except LedgerReplaced as exc:
        return Check("ledger", ok=False, found=str(exc), advice="restore the data of Redis")
    except (PermissionsMissing, ServerUnsafe) as exc:
        return Check("redis", ok=False, found=str(exc))  # The message says what to do.
    except LedgerRefused as exc:
        return Check("ledger", ok=False, found=str(exc), advice="`tollbook doctor` and `tollbook verify` say more")
    except BaselineUnavailable as exc:
        return Check("baseline", ok=False, found=str(exc), advice=advice)
    except (RedisCannotServe, TooFewReplicas) as exc:
        return Check("redis", ok=False, found=str(exc))  # The message says what to do.
    except (LedgerUnavailable, OSError) as exc:
        return Check("redis", ok=False, found=str(exc), advice=_START)
    except RedisError as exc:
        return Check("redis", ok=False, found=reason_of(exc))
    return None


def _probe_user(partition: int, partitions: int) -> str:
    """Return a user id of the partition. It has a space, so no real user has it."""
    return next(name for name in (f"health {n}" for n in count()) if partition_of(name, partitions) == partition)
