"""Composition root of a process that makes calls: Redis, gate, baselines, provider, prices.

Clocks, ids and randomness are made here; the modules below get them as parameters.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

from redis.asyncio import Redis

from tollbook.inference.calls.call import RunId
from tollbook.inference.calls.lost_requests import LostRequests
from tollbook.inference.calls.reservations import Reservations
from tollbook.inference.calls.retry import RetryPolicy
from tollbook.inference.calls.runner import CallRunner
from tollbook.inference.calls.steps import CallObserver
from tollbook.inference.current_policy import CurrentPolicy
from tollbook.inference.learning_models import learning_models
from tollbook.inference.models import ModelCatalogue
from tollbook.inference.policy_changes import check_stated_policy
from tollbook.inference.prices.catalogue import PriceCatalogue
from tollbook.inference.process_name import process_name
from tollbook.inference.provider_users import provider_user_of
from tollbook.inference.providers.clients import ProviderClients
from tollbook.inference.settings import Settings
from tollbook.inference.signs_of_life import SignOfLife, sign_of_life
from tollbook.inference.user_ids import UserIds, open_user_key
from tollbook.ledger.clock import now_ms
from tollbook.ledger.errors import LedgerReplaced, LedgerUnavailable, WrongPartitions
from tollbook.ledger.gate.asking import AskedBaselines
from tollbook.ledger.gate.baselines import BaselineReader, Baselines
from tollbook.ledger.gate.functions import load_library
from tollbook.ledger.gate.gate import Gate, LedgerState, create_ledger
from tollbook.ledger.gate.ledger import Ledger, Patience
from tollbook.ledger.gate.probe import check_permissions, check_writable
from tollbook.ledger.gate.unbooked import FOLDER as UNBOOKED_FOLDER
from tollbook.ledger.gate.wait_queue import BudgetWaitQueue
from tollbook.ledger.keys import Keys
from tollbook.ledger.results import Results
from tollbook.ledger.server.connection import ANSWER_TIMEOUT_S, connect
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.ledger.server.policy import ServerWatch, watched_server
from tollbook.schemas.policy import Policy

# A server that syncs a large batch to a slow disk is not silent.
_MIN_ANSWER_TIMEOUT_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class LedgerHandle:
    """An opened ledger: its identity and the objects that access it."""

    redis: Redis
    pipeline: CommandPipeline
    keys: tuple[Keys, ...]
    states: tuple[LedgerState, ...]
    results: Results
    server: ServerWatch
    sign: SignOfLife
    user_key: bytes = field(repr=False)  # G10
    policies: CurrentPolicy
    user_ids: UserIds

    @property
    def ledger_id(self) -> str:
        """The ledger's identity, given at its creation."""
        return self.states[0].ledger_id

    @property
    def policy(self) -> Policy:
        """The newest policy that this process has read from the ledger."""
        return self.policies.newest.policy


@asynccontextmanager
async def open_ledger(
    settings: Settings,
    redis_url: str,
    *,
    expected_id: str | None = None,
    may_create: bool = True,
    part: str = "application",
) -> AsyncGenerator[LedgerHandle]:
    """Open the ledger. If there is none, create it, unless `expected_id` is given or `may_create` is false.

    Only a projector may create a ledger: it knows whether its DuckDB belongs to another one. `part` is the kind of
    process, for the sign of life.
    Errors: LedgerUnavailable, also if there is no ledger; ServerTooOld; ServerUnsafe; PermissionsMissing;
        WrongPartitions; LedgerReplaced if the ledger's id is not `expected_id`; UserKeyLost.
    """
    redis = connect(redis_url)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(redis.aclose)
        await load_library(redis)
        pipeline = CommandPipeline(redis, timeout_s=answer_timeout_s(settings), replication=settings.replication)
        stack.push_async_callback(pipeline.aclose)
        server = await stack.enter_async_context(
            watched_server(redis, allow_unsynced=settings.allow_unsynced, pipeline=pipeline)
        )
        first = Keys(settings.namespace)
        await check_permissions(pipeline, [first])  # Before other commands, so that the error names what is missing.
        keys = await _keys_of(pipeline, settings, takes_stored=not may_create)
        await check_permissions(pipeline, keys)
        if expected_id is not None:
            await _check_ledger_id(pipeline, keys, expected_id)
        elif not may_create:
            expected_id = await _stored_ledger_id(pipeline, keys[0])
        ledger_id = expected_id or str(uuid.uuid4())
        states = [await create_ledger(pipeline, key, ledger_id=ledger_id, partitions=len(keys)) for key in keys]
        for state in states:
            if state.partitions != len(keys):
                raise WrongPartitions(configured=len(keys), stored=state.partitions)
        await asyncio.gather(*(check_writable(pipeline, key) for key in keys))
        results = Results(
            redis,
            pipeline,
            namespace=settings.namespace,
            partitions=len(keys),
            ttl_s=settings.result_ttl_s,
            id_ttl_s=settings.idempotency_ttl_s,
        )
        sign = await stack.enter_async_context(sign_of_life(pipeline, settings, name=process_name(), part=part))
        models = ModelCatalogue.from_settings(settings)
        policies = await CurrentPolicy.of_ledger(pipeline, keys, price_provider=settings.price_provider, models=models)
        user_key = await open_user_key(
            pipeline, keys[0], policies, data_dir=settings.data_dir, ledger_id=states[0].ledger_id
        )
        user_ids = UserIds(policies, pipeline, keys[0], user_key)
        yield LedgerHandle(redis, pipeline, keys, tuple(states), results, server, sign, user_key, policies, user_ids)


def answer_timeout_s(settings: Settings) -> float:
    """Return how long to wait for a reply of Redis, so that a worker with a silent connection does not lose its claims.

    There is time left to renew the claims over another connection, within 0.8 of TOLLBOOK_CLAIM_AFTER_S.
    """
    return min(ANSWER_TIMEOUT_S, max(_MIN_ANSWER_TIMEOUT_S, settings.claim_after_s / 3))


async def _keys_of(pipeline: CommandPipeline, settings: Settings, *, takes_stored: bool) -> tuple[Keys, ...]:
    """Return the keys of each partition: as many as set; with `takes_stored` and no setting, as many as stored."""
    count = settings.partitions
    if takes_stored and "partitions" not in settings.model_fields_set:
        stored: bytes | None = await pipeline.execute("HGET", Keys(settings.namespace).meta, "partitions")
        count = int(stored) if stored else count
    return tuple(Keys(settings.namespace, number) for number in range(count))


async def _stored_ledger_id(pipeline: CommandPipeline, key: Keys) -> str:
    found: bytes | None = await pipeline.execute("HGET", key.meta, "ledger_id")
    if found is None:
        raise LedgerUnavailable(
            f"there is no ledger {key.namespace!r} in this Redis yet: `tollbook up` or `tollbook projector` makes it"
        )
    return found.decode()


async def _check_ledger_id(pipeline: CommandPipeline, keys: tuple[Keys, ...], expected_id: str) -> None:
    """Refuse before anything is created: an emptied Redis must not get a new ledger beside an old projection."""
    for key in keys:
        found: bytes | None = await pipeline.execute("HGET", key.meta, "ledger_id")
        if found is None or found.decode() != expected_id:
            raise LedgerReplaced(expected=expected_id, found=found.decode() if found else "")


def build_gates(handle: LedgerHandle, settings: Settings, *, process: str = "") -> tuple[Gate, ...]:
    """Return the gates of all partitions; `process` names this process in its notes of unbooked charges."""
    return tuple(
        Gate(
            handle.pipeline,
            key,
            state.ledger_id,
            idempotency_ttl_s=settings.idempotency_ttl_s,
            result_ttl_s=settings.result_ttl_s,
            seen=state.head.entry,
            process=process,
            unbooked_folder=settings.data_dir / UNBOOKED_FOLDER,
        )
        for key, state in zip(handle.keys, handle.states, strict=True)
    )


def build_ledger(
    handle: LedgerHandle,
    settings: Settings,
    reader: Callable[[int], BaselineReader],
    *,
    patience: Patience | None = None,
    process: str = "",
) -> Ledger:
    """Return the ledger; `reader` returns the baseline reader of a partition, `process` is as in `build_gates`."""
    gates = build_gates(handle, settings, process=process)
    baselines = [
        Baselines(reader(number), number, monotonic=time.monotonic, max_age_s=settings.tail_keep_s / 3)
        for number in range(len(gates))
    ]
    return Ledger(handle.redis, gates, baselines, patience=patience, check_server=handle.server.check)


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceRuntime:
    """Everything that calls need."""

    name: str
    settings: Settings
    handle: LedgerHandle
    ledger: Ledger
    reservations: Reservations
    runner: CallRunner
    lost_requests: LostRequests
    policies: CurrentPolicy
    user_ids: UserIds
    unanswered: dict[str, RunId] = field(default_factory=dict[str, RunId])
    """By call id, the run that got no reply to its reservation; a retry of the call resumes its hold."""

    @property
    def rules(self) -> Policy:
        """The newest policy that this process has read from the ledger."""
        return self.policies.newest.policy

    @property
    def prices(self) -> PriceCatalogue:
        """The prices of the newest policy."""
        return self.policies.newest.prices


def _reader(
    stack: AsyncExitStack, handle: LedgerHandle, read: BaselineReader | None, name: str
) -> Callable[[int], BaselineReader]:
    """Return the reader of each partition: `read`, or one that asks the projector, wherever it runs."""
    if read is not None:
        return lambda _: read
    asked = AskedBaselines(handle.redis, handle.pipeline, handle.keys, ledger_id=handle.ledger_id, process=name)
    stack.push_async_callback(asked.aclose)
    return asked.reader


@asynccontextmanager
async def open_runtime(
    settings: Settings,
    handle: LedgerHandle,
    read: BaselineReader | None = None,
    *,
    patience: Patience | None = None,
    observer: CallObserver | None = None,
    max_call_s: float | None = None,
) -> AsyncGenerator[InferenceRuntime]:
    """Build a runtime, and close it at the end. `observer` follows its calls.

    `read` reads baselines in this process if it has the projection; without it, the projector is asked over Redis.
    `max_call_s` limits the duration of a call; by default, it is the longest sum of its requests and pauses.

    Errors: SettingsError; PolicyDiffers if the settings differ from the ledger's policy; PolicyUnreadable.
    """
    async with AsyncExitStack() as stack:
        name = process_name()
        reader = _reader(stack, handle, read, name)
        ledger = build_ledger(handle, settings, reader, patience=patience, process=name)
        policies = handle.policies
        await policies.refresh()
        check_stated_policy(settings, policies.newest)
        providers = await stack.enter_async_context(ProviderClients.from_settings(settings))
        queue = BudgetWaitQueue(handle.redis, [key.waiters for key in handle.keys])
        queue.start()
        stack.push_async_callback(queue.aclose)
        retry = RetryPolicy.from_settings(settings)
        await stack.enter_async_context(learning_models(policies, providers, settings, now_ms=now_ms))
        lost_requests = LostRequests(providers, policies)
        reservations = Reservations(
            ledger=ledger,
            results=handle.results,
            policies=policies,
            queue=queue,
            max_call_s=max_call_s or retry.max_call_s(settings.attempt_timeout_s),
            now_ms=now_ms,
            observer=observer,
            ask_cost=lost_requests.cost,
        )
        runner = CallRunner(
            ledger=ledger,
            results=handle.results,
            providers=providers,
            policies=policies,
            retry=retry,
            now_ms=now_ms,
            observer=observer,
            provider_user=provider_user_of(settings.provider_user, handle.user_key),
        )
        yield InferenceRuntime(
            name=name,
            settings=settings,
            handle=handle,
            ledger=ledger,
            reservations=reservations,
            runner=runner,
            lost_requests=lost_requests,
            policies=policies,
            user_ids=handle.user_ids,
        )
