"""Command pipelines: commands of many tasks in batches over one connection, or one per node of a cluster.

While one batch is on its way, new commands gather for the next: a worker with a hundred
concurrent calls makes few round trips, and a server that syncs its log on every write
syncs once per batch. Nothing is sent twice: a lost connection fails the whole batch with
LedgerUnavailable, and the caller, who knows what is idempotent, decides. A batch that too
few replicas confirm fails in the same way, if replicas are waited for.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Final, cast

import hiredis
from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import (
    BusyLoadingError,
    ClusterDownError,
    DataError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from tollbook.ledger.errors import LedgerUnavailable
from tollbook.ledger.server.connection import leave_server, time_ms
from tollbook.ledger.server.node_pipelines import NodePipelines
from tollbook.ledger.server.refusals import cannot_serve, unavailable
from tollbook.ledger.server.replication import Replication
from tollbook.ledger.server.servers import cluster_of
from tollbook.ledger.server.slots import Argument

# Redis answers these while it starts or cannot write: nothing was done, and a retry may succeed.
_TEMPORARY: Final = ("LOADING", "BUSY ", "MISCONF", "NOREPLICAS")
_MAX_BATCH: Final = 512
# Takes a tenth of the time of redis-py's own packing. The type stub of hiredis 3.5 wrongly has a tuple of one element.
pack_command: Final = cast("Callable[[tuple[Argument, ...]], bytes]", hiredis.pack_command)
"""(arguments): the bytes of a command. Errors: TypeError."""


class CommandPipeline:
    """Sends batches over one connection, or one per node of a cluster; the first command finds out which.

    `batches` and `commands` count what was sent.

    `replication`: the replicas to wait for after a batch that may have written; None: no wait.

    Errors of `execute`: LedgerUnavailable (outcome unknown), or its subclasses RedisCannotServe (nothing was done) and
    TooFewReplicas; redis.exceptions.ResponseError for a refused command; DataError for a command that cannot be sent.
    """

    def __init__(self, redis: Redis, *, timeout_s: float = 30.0, replication: Replication | None = None) -> None:
        self.replication = replication
        self._unconfirmed: LedgerUnavailable | None = None
        self._batches = 0
        self._commands = 0
        self._redis = redis
        self._nodes: NodePipelines | None = None
        self._timeout_s = timeout_s
        self._limit: asyncio.Timeout | None = None
        self._ends_at: float | None = None
        self._queue: list[tuple[Sequence[Argument], asyncio.Future[Any]]] = []
        self._connection: AbstractConnection | None = None
        self._flusher: asyncio.Task[None] | None = None
        self._is_closed = False
        self._is_demoted = False

    async def execute(self, *command: Argument) -> Any:
        """Send one command and return the reply: bytes, int, list or None."""
        if self._nodes is not None:
            return await self._nodes.execute(command)
        return await self.enqueue(*command)

    def enqueue(self, *command: Argument) -> asyncio.Future[Any]:
        """Put one command into the next batch; commands stay in their order. Errors: LedgerUnavailable once closed."""
        if self._is_closed:
            raise LedgerUnavailable("the connection to Redis is closed")
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._queue.append((command, future))
        if self._flusher is None or self._flusher.done():
            self._flusher = asyncio.create_task(self._flush())
        return future

    async def execute_on_primaries(self, *command: Argument) -> list[Any]:
        """Send a command without key to every server that takes writes, and return their replies."""
        if (nodes := await self._find_nodes()) is not None:
            return await nodes.execute_on_primaries(command)
        return [await self.execute(*command)]

    async def now_ms(self, key: str) -> int:
        """Return the time in milliseconds since the epoch, by the clock of the server that has a key."""
        if (nodes := await self._find_nodes()) is not None:
            return time_ms(await nodes.execute(("TIME",), at=key))
        return time_ms(await self.execute("TIME"))

    @property
    def batches(self) -> int:
        """How many batches were sent."""
        return self._batches + (0 if self._nodes is None else self._nodes.batches)

    @property
    def commands(self) -> int:
        """How many commands were sent."""
        return self._commands + (0 if self._nodes is None else self._nodes.commands)

    @property
    def is_on_cluster(self) -> bool:
        """Whether this is a cluster; False before the first command."""
        return self._nodes is not None

    @property
    def unconfirmed(self) -> LedgerUnavailable | None:
        """Why replicas have not confirmed the last batch that may have written; None if they have, or need not.

        On a cluster, the problem of any primary.
        """
        return self._unconfirmed if self._nodes is None else self._nodes.unconfirmed

    def unconfirmed_at(self, key: str) -> LedgerUnavailable | None:
        """The same for the server that has a key."""
        return self._unconfirmed if self._nodes is None else self._nodes.unconfirmed_at(key)

    async def replicate(self, mark: str | None = None) -> None:
        """Wait until replicas have everything that is on the server now, from all clients, if replicas are waited for.

        On a cluster, this is about the server with the key `mark`; without `mark`, about the writes of this process.
        """
        if self.replication is None or self.replication.mark is None:
            return
        if mark is None and (nodes := await self._find_nodes()) is not None:
            await nodes.execute_on_primaries(self.replication.wait())
        else:
            await self.execute("SET", mark or self.replication.mark, "")

    def end_within(self, seconds: float) -> None:
        """Stop waiting for answers after this time: a shutdown must end whatever Redis does."""
        self._ends_at = asyncio.get_running_loop().time() + seconds
        if self._limit is not None:
            before = self._limit.when()
            self._limit.reschedule(self._ends_at if before is None else min(before, self._ends_at))
        if self._nodes is not None:
            self._nodes.end_within(seconds)

    @property
    def remaining_s(self) -> float:
        """How long this waits for an answer from now on."""
        return self._timeout_s if self._ends_at is None else self._ends_at - asyncio.get_running_loop().time()

    async def aclose(self) -> None:
        """Send what is queued, then close the connection and return it to its pool."""
        self._is_closed = True
        if self._flusher is not None:
            await asyncio.gather(self._flusher, return_exceptions=True)
        if self._nodes is not None:
            await self._nodes.aclose()
        await self._drop_connection()

    async def _flush(self) -> None:
        while self._queue:
            batch, self._queue = self._queue[:_MAX_BATCH], self._queue[_MAX_BATCH:]
            self._batches += 1
            self._commands += len(batch)
            try:
                async with asyncio.timeout(self._answer_timeout_s()) as self._limit:
                    replies = await self._exchange([command for command, _ in batch])
            except Exception as exc:  # noqa: BLE001 - even a bug of the client must reach the callers that wait.
                self._limit = None
                await self._drop_connection()
                problem = exc
                if not isinstance(exc, LedgerUnavailable):
                    problem = unavailable(exc if str(exc) else TimeoutError(f"not within {self._timeout_s:g} s"))
                    problem.__cause__ = exc
                replies = cast("list[Any]", [problem] * len(batch))
            except BaseException:
                self._limit = None
                await self._drop_connection()
                for _, future in batch:
                    future.cancel()
                raise
            self._limit = None
            if self._is_demoted:
                # After a failover the address leads to another server; open connections stay with the demoted one.
                self._is_demoted = False
                await self._drop_connection()
                await leave_server(self._redis)
            for (_, future), reply in zip(batch, replies, strict=True):
                if future.done():  # The caller was cancelled; its command was sent anyway.
                    continue
                if isinstance(reply, BaseException):
                    future.set_exception(reply)
                else:
                    future.set_result(reply)

    def _answer_timeout_s(self) -> float:
        return max(0.0, min(self._timeout_s, self.remaining_s))

    async def _exchange(self, commands: list[Sequence[Argument]]) -> list[Any]:
        connection = self._connection
        if connection is None:
            if (nodes := await self._find_nodes()) is not None:
                # This batch gathered before the cluster was detected.
                self._batches, self._commands = self._batches - 1, self._commands - len(commands)
                return await asyncio.gather(*map(nodes.execute, commands), return_exceptions=True)
            connection = self._connection = await self._redis.connection_pool.get_connection()
        packed: list[bytes] = []
        refused: dict[int, DataError] = {}
        confirmation: list[Sequence[Argument]] = []
        if self.replication is not None and any(map(self.replication.is_needed_after, commands)):
            confirmation = self.replication.confirmation(commands, within_s=self._answer_timeout_s() / 2)
        for index, command in enumerate([*commands, *confirmation]):
            try:
                packed.append(pack_command(tuple(command)))
            except TypeError as exc:  # Our bug: it must not look like a lost connection, or fail other commands.
                refused[index] = DataError(str(exc))
        await connection.send_packed_command(packed, check_health=False)
        replies = [refused.get(index) or await self._read(connection) for index in range(len(commands))]
        if self.replication is not None and confirmation:
            replied = [await self._read(connection) for _ in confirmation]
            self._unconfirmed = problem = self.replication.problem_of(replied)
            if problem is not None:
                for index, command in enumerate(commands):
                    if self.replication.is_needed_after(command) and not isinstance(replies[index], BaseException):
                        replies[index] = problem  # G1 G3
        return replies

    async def _find_nodes(self) -> NodePipelines | None:
        if self._nodes is None:
            try:
                cluster = await cluster_of(self._redis)
            except (RedisError, OSError) as exc:
                raise unavailable(exc) from exc
            if cluster is not None and self._nodes is None:
                self._nodes = NodePipelines(cluster, self._open_node)
        return self._nodes

    def _open_node(self, client: Redis) -> "CommandPipeline":
        replication = None if self.replication is None else self.replication.of_node()
        node = CommandPipeline(client, timeout_s=self._timeout_s, replication=replication)
        node._ends_at = self._ends_at
        return node

    async def _read(self, connection: AbstractConnection) -> Any:
        try:
            return cast("Any", await connection.read_response(disable_decoding=True))
        except (RedisConnectionError, RedisTimeoutError) as exc:
            # redis-py turns this error reply into a connection error; the connection itself is fine.
            if isinstance(exc, BusyLoadingError):
                return _refused(exc)
            raise
        except ResponseError as exc:
            self._is_demoted = self._is_demoted or isinstance(exc, ReadOnlyError)
            return _refused(exc) if _is_temporary(exc) else exc

    async def _drop_connection(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.disconnect(nowait=True)
            await self._redis.connection_pool.release(connection)


def _refused(exc: RedisError) -> LedgerUnavailable:
    problem = cannot_serve(exc)
    problem.__cause__ = exc
    return problem


def _is_temporary(exc: ResponseError) -> bool:
    # redis-py removes the code from the text of errors that it has a class for.
    return isinstance(exc, ReadOnlyError | OutOfMemoryError | ClusterDownError) or str(exc).startswith(_TEMPORARY)
