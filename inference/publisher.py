"""Publishing tasks from applications, and waiting for their results.

    async with Publisher() as publisher:
        task_id = await publisher.publish("generation", "generate_draft", "Write ...", user_id="u42")
        result = await publisher.wait(task_id, timeout_s=60)

Only Redis is needed: no prices, no provider, no DuckDB, and no part of the worker. A task gets its id before it is
sent, so that a retry is safe: the same id with the same content is the same call (G4).
"""

import asyncio
import math
import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from types import TracebackType
from typing import Final, Self, Unpack, cast, overload

from pydantic import BaseModel

from tollbook.inference.address import find_redis_url
from tollbook.inference.arguments import read_arguments
from tollbook.inference.delta_reader import read_along
from tollbook.inference.errors import ResultTimeout, TaskUnconfirmed, error_of
from tollbook.inference.on_demand import OnDemand
from tollbook.inference.settings import Settings, given_or_loaded
from tollbook.inference.stated_policy import policy_of
from tollbook.inference.structured_output import M, checked_model, parse_output, with_response_format
from tollbook.inference.task_deltas import TaskUpdate
from tollbook.ledger.errors import LedgerUnavailable, RedisCannotServe
from tollbook.ledger.keys import Keys, is_reserved_key
from tollbook.ledger.results import Results
from tollbook.ledger.server.address import hide_password
from tollbook.ledger.server.connection import connect
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.ledger.server.refusals import translating_redis_errors
from tollbook.ledger.stream_owners import check_owner, read_owners
from tollbook.schemas.entries import TaskEntry, TaskFields, task_entry
from tollbook.schemas.identifiers import normalise_id
from tollbook.schemas.policy import Policy, default_policy
from tollbook.schemas.results import InferenceResult, TaskStatus
from tollbook.schemas.tasks import RESERVED_STREAM_WORDS, InvalidTask

# The first command on a long idle connection often finds it dead; the second command opens a new connection.
_TRIES: Final = 2


class Publisher:
    """A connection of an application to the task streams; open it once and share it between all requests.

    It connects at its first use, and tries again at later uses until Redis answers: an application may start before
    Redis. Tasks that are published at the same time are sent together: a thousand tasks take a few round trips.
    Errors of every method: LedgerUnavailable.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        """Without `settings`, they are read from the environment and `.env` when the publisher is opened."""
        self._settings = settings
        self._policy: Policy | None = None
        self._connection: OnDemand[_Connection] | None = None

    async def __aenter__(self) -> Self:
        """Read the settings; do not connect yet. Errors: SettingsError."""
        settings = given_or_loaded(self._settings)
        self._policy = policy_of(settings)
        self._connection = OnDemand(lambda stack: _Connection.open(settings, stack))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Send the queued tasks, then close the connections."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.aclose()

    async def publish(
        self,
        stream: str,
        task: str,
        prompt: str | None = None,
        **fields: Unpack[TaskFields],
    ) -> str:
        """Publish a task and return its id: the given `task_id`, else a new one.

        Errors: InvalidTask, before anything is sent, for a task that a worker would refuse; TaskUnconfirmed, with the
            id.
        """
        entry = await self.new_entry(stream, task, prompt, **fields)
        await self.send(entry)
        return entry.task_id

    @overload
    async def publish_and_wait(
        self,
        stream: str,
        task: str,
        prompt: str | None = None,
        *,
        timeout_s: float,
        response_model: type[M],
        **fields: Unpack[TaskFields],
    ) -> M: ...

    @overload
    async def publish_and_wait(
        self,
        stream: str,
        task: str,
        prompt: str | None = None,
        *,
        timeout_s: float,
        response_model: None = None,
        **fields: Unpack[TaskFields],
    ) -> InferenceResult: ...

    async def publish_and_wait(
        self,
        stream: str,
        task: str,
        prompt: str | None = None,
        *,
        timeout_s: float,
        response_model: type[BaseModel] | None = None,
        **fields: Unpack[TaskFields],
    ) -> InferenceResult | BaseModel:
        """Publish a task and return its result, or its answer as an instance of a pydantic model.

        Errors: as `publish` and `wait`.
        """
        read_arguments(timeout_s=timeout_s)  # Before anything is sent.
        if response_model is None:
            return await self.wait(await self.publish(stream, task, prompt, **fields), timeout_s=timeout_s)
        fields = {**fields, "response_format": checked_model(response_model)}
        task_id = await self.publish(stream, task, prompt, **fields)
        return await self.wait(task_id, timeout_s=timeout_s, response_model=response_model)

    async def new_entry(
        self, stream: str, task: str, prompt: str | None = None, **fields: Unpack[TaskFields]
    ) -> TaskEntry:
        """Make a task to `send`, with a new id if none is given. Errors: InvalidTask."""
        try:
            return new_entry(stream, task, prompt, policy=self._policy, **fields)
        except InvalidTask:
            policy = await self._policy_of_ledger()  # The ledger's policy may have the names.
            if policy is None or policy == self._policy:
                raise
            self._policy = policy
        return new_entry(stream, task, prompt, policy=policy, **fields)

    async def _policy_of_ledger(self) -> Policy | None:
        """Return the ledger's policy; None if there is none, or Redis does not answer."""
        try:
            async with self._connected() as connection:
                return await connection.policy()
        except LedgerUnavailable:
            return None

    async def send(self, entry: TaskEntry) -> str:
        """Append an entry made by `new_entry` and return the stream entry's id.

        Errors: TaskUnconfirmed; StreamTaken if another Tollbook serves the stream; InvalidTask if `reply_to` is a key
            of a Tollbook in this database.
        """
        if not isinstance(cast("object", entry), TaskEntry):
            raise InvalidTask("give `send` what `new_entry` returns")
        async with self._connected() as connection:
            connection.check_owner(entry.stream)
            connection.check_reply(entry.fields.get("reply_to"))
            flat = [part for pair in entry.fields.items() for part in pair]
            is_unknown = False
            for tries_left in reversed(range(_TRIES)):
                try:
                    entry_id: bytes = await connection.pipeline.execute("XADD", entry.stream, "*", *flat)
                except LedgerUnavailable as exc:
                    # A refused task is not published, unless an earlier try with a lost reply has published it.
                    is_unknown = is_unknown or not isinstance(exc, RedisCannotServe)
                    if not tries_left and is_unknown:
                        raise TaskUnconfirmed(entry.task_id, exc) from exc
                    if not tries_left:
                        raise RedisCannotServe(f"task {entry.task_id} was not published: {exc.message}") from exc
                else:
                    return entry_id.decode()
        raise AssertionError("the last try returns or raises")

    async def result(self, task_id: str) -> InferenceResult | None:
        """Return a task's result; None if there is none yet, or no longer: results are kept for some days."""
        task_id = read_arguments(task_id=task_id).task_id
        async with self._connected() as connection:
            return await (await connection.results()).get(normalise_id(task_id))

    @overload
    async def wait(self, task_id: str, *, timeout_s: float, response_model: type[M]) -> M: ...

    @overload
    async def wait(self, task_id: str, *, timeout_s: float, response_model: None = None) -> InferenceResult: ...

    async def wait(
        self, task_id: str, *, timeout_s: float, response_model: type[BaseModel] | None = None
    ) -> InferenceResult | BaseModel:
        """Return a task's result as soon as it is stored: `done`, `denied`, `failed` or `invalid`.

        With a pydantic model as `response_model`, the answer is returned as an instance of it; publish the task with
        the same model as `response_format`. If the task has no answer, an error is raised then.
        An existing result is returned at once; otherwise Redis wakes this call when the result is stored. An outage of
        Redis in between does not end the wait.
        Errors: ResultTimeout after `timeout_s` seconds; the task goes on, and can be waited for again. With a model:
            the error of the result, as raised by `InferenceClient.call`; OutputInvalid.
        """
        given = read_arguments(task_id=task_id, timeout_s=timeout_s)
        task_id, timeout_s = given.task_id, given.timeout_s
        if response_model is not None:
            checked_model(response_model)
        async with self._connected() as connection:
            found = await (await connection.results()).wait(normalise_id(task_id), timeout_s)
        if found is None:
            raise ResultTimeout(task_id, timeout_s)
        if response_model is None:
            return found
        if found.status is not TaskStatus.DONE:
            raise error_of(found)
        return parse_output(found, response_model)

    async def stream(self, task_id: str, *, timeout_s: float | None = None) -> AsyncGenerator[TaskUpdate, None]:
        """Read a task's answer while it comes: yield its deltas, then its result.

        The task must be published with `streamed=True`; otherwise only the result comes. A late reader gets the earlier
        deltas, too. `restarted`: discard the earlier deltas, since another worker starts again. `gap`: some deltas were
        lost, but the result is complete.
        Errors: ResultTimeout if there is no result after `timeout_s` seconds; the task goes on.
        """
        given = read_arguments(task_id=task_id, timeout_s=math.inf if timeout_s is None else timeout_s)
        task_id, timeout_s = normalise_id(given.task_id), given.timeout_s
        async with self._connected() as connection:
            async for update in connection.read_along(await connection.results(), task_id, timeout_s):
                yield update

    @asynccontextmanager
    async def _connected(self) -> "AsyncGenerator[_Connection]":
        if self._connection is None:
            raise LedgerUnavailable("the publisher is not open: use `async with Publisher() as publisher:`")
        with translating_redis_errors():
            connection = await self._connection.get()
        try:
            with translating_redis_errors():
                yield connection
        except (TaskUnconfirmed, RedisCannotServe):
            raise
        except LedgerUnavailable as exc:
            raise LedgerUnavailable(f"Redis at {connection.where}: {exc.message}") from exc.__cause__


def new_entry(
    stream: str,
    task: str,
    prompt: str | None = None,
    *,
    policy: Policy | None = None,
    **fields: Unpack[TaskFields],
) -> TaskEntry:
    """Make a task to `send`, with a new id if none is given; its names are checked against the policy.

    Without a `policy`, the default policy is used. Errors: InvalidTask.
    """
    values = with_response_format({"task": task, "prompt": prompt, **fields})
    values["stream"] = values.pop("streamed", None)
    return task_entry(stream, values, new_id=str(uuid.uuid4()), policy=policy or default_policy())


class _Connection:
    """The connections and caches of a connected publisher."""

    def __init__(self, settings: Settings, redis_url: str, stack: AsyncExitStack) -> None:
        self._settings = settings
        self.where = hide_password(redis_url)
        self._redis = connect(redis_url)
        stack.push_async_callback(self._redis.aclose)
        # No mark: its Redis user may not write it, and it is not needed, since every command of a publisher writes.
        replication = settings.replication and replace(settings.replication, mark=None)
        self.pipeline = CommandPipeline(self._redis, replication=replication)
        stack.push_async_callback(self.pipeline.aclose)
        self._results: Results | None = None
        self._is_certain = False
        self._owners: Mapping[str, str] = {}
        self._asking = asyncio.Lock()

    @classmethod
    async def open(cls, settings: Settings, stack: AsyncExitStack) -> "_Connection":
        redis_url = find_redis_url(settings)
        connection = cls(settings, redis_url, stack)
        try:
            connection._owners = await read_owners(connection.pipeline)
        except LedgerUnavailable as exc:
            raise LedgerUnavailable(f"Redis at {connection.where}: {exc.message}") from exc.__cause__
        return connection

    def check_owner(self, stream: str) -> None:
        """Check that this Tollbook serves the stream. Errors: StreamTaken."""
        check_owner(self._owners, stream, self._settings.namespace)

    def check_reply(self, reply_to: str | None) -> None:
        """Check that a worker would accept this stream for replies. Errors: InvalidTask."""
        namespaces = {self._settings.namespace, *self._owners.values()}
        if reply_to is not None and (
            reply_to in self._owners or any(is_reserved_key(name, reply_to) for name in namespaces)
        ):
            raise InvalidTask(f"'reply_to' {RESERVED_STREAM_WORDS} {reply_to!r} is")

    async def results(self) -> Results:
        """Return the reader of results in all partitions of the ledger, made once."""
        async with self._asking:
            # Tasks may be published before the ledger exists; until then, its number of partitions is not certain.
            if not self._is_certain:
                meta = Keys(self._settings.namespace).meta
                stored: bytes | None = await self.pipeline.execute("HGET", meta, "partitions")
                self._is_certain = stored is not None
                partitions = int(stored) if stored else self._settings.partitions
                if self._results is None or partitions != self._results.partitions:
                    self._results = self._results_in(partitions)
            assert self._results is not None
            return self._results

    def read_along(self, results: Results, task_id: str, timeout_s: float | None) -> AsyncGenerator[TaskUpdate, None]:
        """Yield the deltas of a task's answer, then its result."""
        return read_along(self._redis, results, results.deltas_keys(task_id), task_id, timeout_s=timeout_s)

    async def policy(self) -> Policy | None:
        """Return the ledger's policy; None if there is no ledger, or it has no policy."""
        # Imported here: most programs use known names and do not need it.
        from tollbook.inference.current_policy import CurrentPolicy

        keys = [Keys(self._settings.namespace)]
        in_force = (await CurrentPolicy.of_ledger(self.pipeline, keys)).newest
        return in_force.policy if in_force.version else None

    def _results_in(self, partitions: int) -> Results:
        settings = self._settings
        return Results(
            self._redis,
            self.pipeline,
            namespace=settings.namespace,
            partitions=partitions,
            ttl_s=settings.result_ttl_s,
            id_ttl_s=settings.idempotency_ttl_s,
        )
