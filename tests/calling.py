"""A whole system in the test's process, the stand-in behind it, and what tests ask of both.

The outcome of a call is read from the ledger's stream and added up here. Of the code under test,
only the parser of single events is used for that.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tollbook.app.processes import open_system
from tollbook.inference.calls.call import Call, RunId
from tollbook.inference.calls.holds import Hold
from tollbook.inference.calls.reservations import Reservations, WaitLimits
from tollbook.inference.calls.retry import RetryPolicy
from tollbook.inference.calls.runner import CallRunner
from tollbook.inference.policy_changes import start_policy
from tollbook.inference.providers.client import ProviderClient
from tollbook.inference.providers.clients import ProviderClients
from tollbook.inference.runtime import InferenceRuntime, build_gates, now_ms, open_ledger, open_runtime
from tollbook.inference.settings import Settings, load_settings
from tollbook.inference.stated_policy import policy_sources
from tollbook.ledger.gate.ledger import Ledger
from tollbook.ledger.gate.requests import AssignRequest, OpenCall, Waiting
from tollbook.ledger.gate.wait_queue import BudgetWaitQueue
from tollbook.ledger.projection.projector import Projector, ProjectorSettings
from tollbook.ledger.projection.store import Store
from tollbook.schemas.events import BudgetReserved, CostAdjusted, CostRecorded, Event, PlanAssigned, payload_json
from tollbook.schemas.identifiers import EntryId, budget_name, month_at
from tollbook.schemas.results import InferenceResult
from tollbook.schemas.tasks import Task
from tollbook.schemas.upcasters import event_from_entry
from tollbook.standin import FaultPlan, StandIn, StandInConfig

API_KEY = "sk-or-v1-very-secret"
# "Tell me [[completion_tokens=40]]" has 32 bytes. The stand-in counts a quarter of them as tokens
# and adds 4 for the message; the bound counts all of them and adds 32 for the message and 128 for the request.
PROMPT = "Tell me [[completion_tokens=40]]"
PROMPT_TOKENS, COMPLETION_TOKENS = 8 + 4, 40
PROMPT_BOUND = 32 + 32 + 128


@dataclass(frozen=True, slots=True)
class SingleTry:
    """Reserves once, and makes the call if it gets money; returns `Waiting` if it would have to wait."""

    reservations: Reservations
    runner: CallRunner

    async def run(
        self, call: Call, *, is_final: bool = False, max_attempts: int | None = None
    ) -> InferenceResult | Waiting | OpenCall:
        """Run a call; with `max_attempts` by way of `acquire`, which waits."""
        if max_attempts is not None:
            acquired = await self.reservations.acquire(call, WaitLimits(hold_wait_s=0.0, max_attempts=max_attempts))
            if acquired.hold is None:
                assert acquired.result is not None
                return acquired.result
            return await self.runner.run(call, acquired.hold, give_up=acquired.give_up)
        reply = await self.reserve(call, is_final=is_final)
        return await self.runner.run(call, reply) if isinstance(reply, Hold) else reply

    async def reserve(self, call: Call, *, is_final: bool = False) -> Hold | InferenceResult | Waiting | OpenCall:
        """Do only the first half of a run, as if the reply of Redis were lost."""
        return await self.reservations.reserve(call, is_final=is_final)

    async def take_over(self, call: Call, found: OpenCall, *, give_up: str | None = None) -> None:
        """Settle the hold of a run that is dead."""
        await self.reservations.take_over(call, found, give_up=give_up)


@dataclass(frozen=True, slots=True)
class Calling:
    """A running system and its provider."""

    runtime: InferenceRuntime
    store: Store
    projector: Projector
    provider: StandIn

    def script(self, *faults: str | None) -> None:
        """Set the faults of the next requests, in order; None is an answer without a fault."""
        self.provider.faults = FaultPlan(script=faults)

    def call(self, call_id: str = "t1", *, run_id: str = "run-1", task: str = "generate_draft", **fields: Any) -> Call:
        """Make a call of the task's route; a model named in `fields` has no fallback."""
        content = {"user_id": "u1", "prompt": PROMPT, **fields}
        read = Task.model_validate({"task": task, "task_id": call_id, **content})
        policy = self.runtime.policies.of(read.user_id)
        return Call.of_task(read, call_id=call_id, run_id=RunId("test", run_id), policy=policy)

    @asynccontextmanager
    async def runner(
        self,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
        base_url: str | None = None,
        ledger: Ledger | None = None,
    ) -> AsyncGenerator[tuple[SingleTry, list[float]]]:
        """Yield a runner like the system's own, and the list of its pauses: it records them instead of sleeping.

        With its own `transport`, a test decides when answers come.
        """
        runtime, pauses = self.runtime, list[float]()
        attempt_timeout_s = runtime.settings.attempt_timeout_s if transport is None else 30.0

        async def sleep(seconds: float) -> None:
            pauses.append(seconds)

        async with ProviderClient(
            api_key=runtime.settings.openrouter_api_key,
            base_url=base_url or runtime.settings.openrouter_base_url,
            dialect="compatible",
            attempt_timeout_s=attempt_timeout_s,
            transport=transport,
        ) as provider:
            retry = RetryPolicy.from_settings(runtime.settings)
            shared: dict[str, Any] = {
                "ledger": ledger or runtime.ledger,
                "results": runtime.handle.results,
                "policies": runtime.policies,
                "now_ms": now_ms,
            }
            reservations = Reservations(
                queue=BudgetWaitQueue(runtime.handle.redis, []),
                max_call_s=retry.max_call_s(attempt_timeout_s),
                **shared,
            )
            yield (
                SingleTry(
                    reservations,
                    CallRunner(
                        providers=ProviderClients(provider), retry=retry, sleep=sleep, provider_user=str, **shared
                    ),
                ),
                pauses,
            )

    async def set_cap(self, cap_nanousd: int, user_id: str = "u1") -> None:
        """Set a user's cap on the ledger."""
        name = period()
        await self.runtime.ledger.assign(
            AssignRequest(
                command_id=f"cap-{user_id}-{cap_nanousd}",
                user_id=user_id,
                period=name,
                content_hash="",
                type="plan-assigned",
                plan="trial",
                amount_nanousd=cap_nanousd,
                payload=payload_json(PlanAssigned(plan="trial", cap_nanousd=cap_nanousd, author="test", reason="test")),
                budget=budget_name("user", user_id, name),
            )
        )

    async def raw_events(self) -> list[tuple[bytes, dict[bytes, bytes]]]:
        """Return the ledger as it is in Redis."""
        entries: Any = await self.runtime.handle.redis.xrange(self.runtime.handle.keys[0].ledger)
        return entries

    async def events(self, call_id: str | None = None) -> list[Event]:
        """Return the ledger's events, or those of one call."""
        events = [
            event_from_entry(entry_id.decode(), {name.decode(): value.decode() for name, value in fields.items()})
            for entry_id, fields in await self.raw_events()
        ]
        return [event for event in events if call_id in (None, event.call_id)]

    async def spent(self, user_id: str = "u1") -> int:
        """Return what the ledger has charged a user, in nano-dollars."""
        moved = [event for event in await self.events() if isinstance(event.payload, CostRecorded | CostAdjusted)]
        return sum(event.amount for event in moved if event.user_id == user_id)

    async def assumed(self, user_id: str = "u1") -> int:
        """Return the assumed part of what the ledger has charged a user."""
        payloads = [event.payload for event in await self.events() if event.user_id == user_id]
        return sum(each.assumed_nanousd for each in payloads if isinstance(each, CostRecorded | CostAdjusted))

    def booked(self, user_id: str = "u1") -> int:
        """Return what the provider charged a user, by its own book."""
        return self.provider.book.totals().get(user_id, 0)

    async def folded(self) -> None:
        """Return once DuckDB has everything that is on the ledger now."""
        entries = await self.raw_events()
        if entries:
            await self.projector.wait_for(0, EntryId.parse(entries[-1][0].decode()))

    async def query(self, sql: str, params: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """Ask DuckDB."""
        return await asyncio.to_thread(self.store.query, sql, params)

    async def check_guarantees(self, *, is_exact: bool = True) -> None:
        """Assert what must be true of every ledger on which no call is open.

        Not `is_exact`: the numbers of a usage disagreed and the higher cost was charged, or another provider charged.
        """
        await self.folded()
        opened, closed = list[tuple[str, int]](), list[tuple[str, int]]()
        spent, assumed = Counter[str](), Counter[str]()
        for event in await self.events():
            match event.payload:
                case BudgetReserved() as payload:
                    # G1
                    assert event.committed is not None
                    assert event.committed <= payload.cap_nanousd
                    if payload.kind == "hold":
                        opened.append((event.call_id, payload.hold))
                case CostRecorded() | CostAdjusted() as payload:
                    spent[event.user_id] += event.amount
                    assumed[event.user_id] += payload.assumed_nanousd
                    if isinstance(payload, CostRecorded) and payload.outcome != "recorded":
                        closed.append((event.call_id, payload.hold))
                case _:
                    pass
        # G2: each hold is opened once and settled once.
        assert len(set(opened)) == len(opened)
        assert sorted(opened) == sorted(closed)
        # G3: no user is charged less than the provider took, and only assumed charges may exceed it.
        for user_id in spent.keys() | self.provider.book.totals().keys():
            assert spent[user_id] >= self.booked(user_id)
            assert not is_exact or self.booked(user_id) >= spent[user_id] - assumed[user_id]
        # The gate's numbers and the projector's agree, event by event, and with what was added up here.
        assert await self.query("SELECT * FROM discrepancies") == []
        rows = await self.query("SELECT user_id, spent_usd, reserved_usd FROM spend")
        folded = {row["user_id"]: row["spent_usd"].scaleb(9) for row in rows if row["spent_usd"]}
        assert folded == {user_id: nanousd for user_id, nanousd in spent.items() if nanousd}
        assert not any(row["reserved_usd"] for row in rows)


@asynccontextmanager
async def open_calling(
    server_url: str, directory: Path, *, is_served: bool = False, **settings: Any
) -> AsyncGenerator[Calling]:
    """Open a system on an empty server, and the stand-in that it calls.

    There is no pause between attempts, and an attempt times out after half a second. With `is_served`,
    balances are served to other processes, as `tollbook up` does; most tests do not need that.
    """
    quick = {"retries": 1, "backoff_base_s": 0.0, "attempt_timeout_s": 0.5, "openrouter_api_key": API_KEY}
    async with StandIn(StandInConfig(api_key=API_KEY, slow_ms=50)) as provider:
        loaded = load_settings(
            env_file=None,
            redis_url=server_url,
            data_dir=directory / "data",
            openrouter_base_url=provider.base_url,
            **{**quick, **settings},
        )
        if is_served:
            async with open_system(loaded) as system:
                yield Calling(system.runtime, system.projection.store, system.projection.projector, provider)
            return
        async with _open_unserved(loaded, server_url) as (runtime, store, projector):
            yield Calling(runtime, store, projector, provider)


@asynccontextmanager
async def _open_unserved(
    settings: Settings, server_url: str
) -> AsyncGenerator[tuple[InferenceRuntime, Store, Projector]]:
    async with open_ledger(settings, server_url) as handle:
        if policy_sources(settings):
            await start_policy(settings, build_gates(handle, settings), "tests")
        store = Store.open(settings.data_dir / "tollbook.duckdb", handle.ledger_id, len(handle.keys))
        gates = build_gates(handle, settings)
        projector = Projector(
            store,
            handle.redis,
            handle.keys,
            trim=lambda partition, *trimmed: gates[partition].trim(*trimmed),
            settings=ProjectorSettings(pause_ms=0),
        )
        folding = asyncio.create_task(projector.run())
        try:
            async with open_runtime(
                settings, handle, lambda names: asyncio.to_thread(store.baselines, names)
            ) as opened:
                yield opened, store, projector
        finally:
            folding.cancel()
            await asyncio.gather(folding, return_exceptions=True)
            store.close()


def period() -> str:
    """Return the billing period now."""
    return month_at(now_ms()).name
