"""Composition root of a process that makes calls: Redis, gate, baselines, provider, prices.

Clocks, ids and randomness are made here and nowhere below.
"""

import asyncio
import os
import secrets
import socket
import time
import uuid
from collections.abc import AsyncGenerator, Generator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Final

from redis.asyncio import Redis

from tollbook.inference.address import find_redis_url
from tollbook.inference.calls.budgets import BudgetPolicy
from tollbook.inference.calls.observer import CallObserver
from tollbook.inference.calls.retry import RetryPolicy
from tollbook.inference.calls.runner import CallRunner
from tollbook.inference.errors import AppError, SettingsError
from tollbook.inference.prices.catalogue import PriceCatalogue
from tollbook.inference.providers.client import ProviderClient
from tollbook.inference.routing import routing_with
from tollbook.inference.settings import Settings, load_settings
from tollbook.ledger.errors import LedgerReplaced, LedgerUnavailable, WrongPartitions
from tollbook.ledger.gate.baselines import BaselineReader, Baselines
from tollbook.ledger.gate.functions import load_library
from tollbook.ledger.gate.gate import Gate, LedgerState, create_ledger
from tollbook.ledger.gate.ledger import Ledger, Patience
from tollbook.ledger.gate.wait_queue import FreedBudgets
from tollbook.ledger.keys import Keys
from tollbook.ledger.projection.remote import remote_reader
from tollbook.ledger.results import Results
from tollbook.ledger.server.connection import ANSWER_TIMEOUT_S, connect
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.ledger.server.policy import ServerWatch, watched_server
from tollbook.schemas.plans import Plan
from tollbook.schemas.results import ErrorCode
from tollbook.schemas.routes import Route
from tollbook.schemas.tasks import TaskType

# A server that syncs a large batch to a slow disk is not silent.
_LEAST_ANSWER_TIMEOUT_S: Final = 0.5


def now_ms() -> int:
    """Milliseconds since the epoch by this machine's clock; the gate corrects it by Redis's where it matters."""
    return time.time_ns() // 1_000_000


def process_name() -> str:
    """Return a name no other process has: host, process id, and a random part for containers that share both."""
    host = "".join(c if c.isalnum() or c == "-" else "-" for c in socket.gethostname())[:40]
    return f"{host}-{os.getpid()}-{secrets.token_hex(3)}"


@dataclass(frozen=True, slots=True)
class LedgerHandle:
    """An opened ledger: its identity and the objects that speak to it."""

    redis: Redis
    pipeline: CommandPipeline
    keys: tuple[Keys, ...]
    states: tuple[LedgerState, ...]
    results: Results
    server: ServerWatch

    @property
    def ledger_id(self) -> str:
        """The identity given at creation."""
        return self.states[0].ledger_id


@asynccontextmanager
async def open_ledger(
    settings: Settings, redis_url: str, *, expected_id: str | None = None, may_create: bool = True
) -> AsyncGenerator[LedgerHandle]:
    """Open the ledger, or create it where there is none, none is expected and it may be.

    Only a projector may: it knows whether its DuckDB belongs to another ledger.
    Errors: LedgerUnavailable, also where there is none; ServerTooOld; ServerUnsafe; WrongPartitions; LedgerReplaced
    where `expected_id` is another ledger's.
    """
    redis = connect(redis_url)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(redis.aclose)
        await load_library(redis)
        server = await stack.enter_async_context(watched_server(redis, allow_unsynced=settings.allow_unsynced))
        pipeline = CommandPipeline(redis, timeout_s=answer_timeout_s(settings))
        stack.push_async_callback(pipeline.aclose)
        keys = tuple(Keys(settings.namespace, number) for number in range(settings.partitions))
        if expected_id is not None:
            await _expect(pipeline, keys, expected_id)
        elif not may_create:
            expected_id = await _found_id(pipeline, keys[0])
        ledger_id = expected_id or str(uuid.uuid4())
        states = [await create_ledger(pipeline, key, ledger_id=ledger_id, partitions=len(keys)) for key in keys]
        for state in states:
            if state.partitions != len(keys):
                raise WrongPartitions(configured=len(keys), stored=state.partitions)
        results = Results(
            redis,
            pipeline,
            namespace=settings.namespace,
            partitions=len(keys),
            ttl_s=settings.result_ttl_s,
            id_ttl_s=settings.idempotency_ttl_s,
        )
        yield LedgerHandle(redis, pipeline, keys, tuple(states), results, server)


def answer_timeout_s(settings: Settings) -> float:
    """Return how long an answer of Redis is waited for: a connection that falls silent must cost no worker its claims.

    It leaves time to renew them over another connection, within 0.8 of TOLLBOOK_CLAIM_AFTER_S.
    """
    return min(ANSWER_TIMEOUT_S, max(_LEAST_ANSWER_TIMEOUT_S, settings.claim_after_s / 3))


async def _found_id(pipeline: CommandPipeline, key: Keys) -> str:
    found: bytes | None = await pipeline.execute("HGET", key.meta, "ledger_id")
    if found is None:
        raise LedgerUnavailable(
            f"there is no ledger {key.namespace!r} in this Redis yet: `tollbook up` or `tollbook projector` makes it"
        )
    return found.decode()


async def _expect(pipeline: CommandPipeline, keys: tuple[Keys, ...], expected_id: str) -> None:
    """Refuse before anything is created: an emptied Redis must not get a new ledger beside an old projection."""
    for key in keys:
        found: bytes | None = await pipeline.execute("HGET", key.meta, "ledger_id")
        if found is None or found.decode() != expected_id:
            raise LedgerReplaced(expected=expected_id, found=found.decode() if found else "")


def build_gates(handle: LedgerHandle, settings: Settings) -> tuple[Gate, ...]:
    """Return the gates of all partitions."""
    return tuple(
        Gate(
            handle.pipeline,
            key,
            state.ledger_id,
            idempotency_ttl_s=settings.idempotency_ttl_s,
            result_ttl_s=settings.result_ttl_s,
            seen=state.head.entry,
        )
        for key, state in zip(handle.keys, handle.states, strict=True)
    )


def build_ledger(
    handle: LedgerHandle, settings: Settings, read: BaselineReader, *, patience: Patience | None = None
) -> Ledger:
    """Return the ledger with baselines read by `read`."""
    gates = build_gates(handle, settings)
    baselines = [
        Baselines(read, number, monotonic=time.monotonic, max_age_s=settings.tail_keep_s / 3)
        for number in range(len(gates))
    ]
    return Ledger(handle.redis, gates, baselines, patience=patience, check_server=handle.server.check)


def budget_policy(settings: Settings) -> BudgetPolicy:
    """Return the caps in force by these settings. Errors: SettingsError."""
    if settings.campaign_cap_nanousd is not None and settings.partitions > 1:
        # A campaign's users are spread over the partitions, and one step touches one partition only.
        raise SettingsError(["TOLLBOOK_CAMPAIGN_CAP_USD: campaign caps need TOLLBOOK_PARTITIONS=1"])
    return BudgetPolicy(
        plan_caps_nanousd={plan: settings.plan_cap_nanousd(plan) for plan in Plan},
        user_caps_nanousd=settings.user_caps_nanousd,
        day_cap_nanousd=settings.day_cap_nanousd,
        campaign_cap_nanousd=settings.campaign_cap_nanousd,
    )


@dataclass(frozen=True, slots=True)
class InferenceRuntime:
    """Everything that calls need."""

    name: str
    settings: Settings
    handle: LedgerHandle
    ledger: Ledger
    runner: CallRunner
    routes: dict[TaskType, Route]
    freed: FreedBudgets
    policy: BudgetPolicy
    unanswered: dict[str, str] = field(default_factory=dict[str, str])
    """By call id: the run that asked for money and got no answer. The next run of the call goes on with what it got."""


@asynccontextmanager
async def open_runtime(
    settings: Settings,
    handle: LedgerHandle,
    read: BaselineReader,
    *,
    patience: Patience | None = None,
    observer: CallObserver | None = None,
) -> AsyncGenerator[InferenceRuntime]:
    """Put a runner together; it is closed at the end. `observer` follows its calls. Errors: SettingsError."""
    async with AsyncExitStack() as stack:
        ledger = build_ledger(handle, settings, read, patience=patience)
        provider = await stack.enter_async_context(ProviderClient.from_settings(settings))
        freed = FreedBudgets(handle.redis, [key.waiters for key in handle.keys])
        freed.start()
        stack.push_async_callback(freed.aclose)
        policy = budget_policy(settings)
        runner = CallRunner(
            ledger=ledger,
            results=handle.results,
            provider=provider,
            prices=PriceCatalogue(settings.price_overrides, provider=settings.price_provider),
            policy=policy,
            retry=RetryPolicy.from_settings(settings),
            attempt_timeout_s=settings.attempt_timeout_s,
            now_ms=now_ms,
            observer=observer,
        )
        yield InferenceRuntime(
            process_name(), settings, handle, ledger, runner, routing_with(settings.routes), freed, policy
        )


_current: ContextVar[InferenceRuntime | None] = ContextVar("inference_runtime", default=None)
# Web servers run an application's start and its requests in contexts of their own: a request sees no context variable
# that was set at start, so it gets the runtime that was opened last on its event loop.
_opened: Final[dict[asyncio.AbstractEventLoop, list[InferenceRuntime]]] = {}


def current_runtime() -> InferenceRuntime:
    """Return the runtime that `connect_runtime` opened around this, or at the start of this application.

    Errors: AppError (LEDGER_UNAVAILABLE).
    """
    opened = _opened.get(asyncio.get_running_loop(), [])
    runtime = _current.get()
    if runtime not in opened:
        runtime = opened[-1] if opened else None
    if runtime is None:
        raise AppError(
            ErrorCode.LEDGER_UNAVAILABLE, "no runtime is open: use `async with connect_runtime():` around the calls"
        )
    return runtime


@asynccontextmanager
async def connect_runtime(settings: Settings | None = None) -> AsyncGenerator[InferenceRuntime]:
    """Connect to a running system from another program; clients and services inside use it by default.

    Redis and the projector's DuckDB are found by the settings (environment or `.env`), or by what
    `tollbook up` left in the data directory. Errors: SettingsError; LedgerError.
    """
    settings = settings or load_settings()
    redis_url = find_redis_url(settings)
    async with AsyncExitStack() as stack:
        handle = await stack.enter_async_context(open_ledger(settings, redis_url, may_create=False))
        read = remote_reader(settings.data_dir)
        runtime = await stack.enter_async_context(open_runtime(settings, handle, read))
        stack.enter_context(_as_current(runtime))
        yield runtime


@contextmanager
def _as_current(runtime: InferenceRuntime) -> Generator[None]:
    loop, before = asyncio.get_running_loop(), _current.get()
    _opened.setdefault(loop, []).append(runtime)
    _current.set(runtime)
    try:
        yield
    finally:
        # Not by a token: the end may come in another context than the beginning.
        _current.set(before)
        _opened[loop].remove(runtime)
        if not _opened[loop]:
            del _opened[loop]
