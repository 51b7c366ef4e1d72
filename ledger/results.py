"""Results of tasks: stored under one key each, announced on a channel of the same name.

The gate stores a settled call's result in the step that settles it. Only results that
move no money (denied, invalid, ping) are stored here, and they never replace another result.
"""

import asyncio
import contextlib

from pydantic import ValidationError
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from tollbook.ledger.arrivals import Arrivals
from tollbook.ledger.errors import LedgerUnavailable, ResultUnreadable
from tollbook.ledger.keys import Keys, task_partition
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.schemas.identifiers import partition_of
from tollbook.schemas.problems import as_text, problems_of
from tollbook.schemas.results import InferenceResult

# An announcement can be missed during a reconnect, so the key is read from time to time as well.
_READ_AGAIN_S = 1.0


class Results:
    """The results of one ledger. Errors of every method: LedgerUnavailable; ResultUnreadable."""

    def __init__(
        self, redis: Redis, pipeline: CommandPipeline, *, namespace: str, partitions: int, ttl_s: int, id_ttl_s: int
    ) -> None:
        self._arrivals = Arrivals(redis)
        self._namespace = namespace
        self._id_ttl_s = id_ttl_s
        self._pipeline = pipeline
        self._partitions = tuple(Keys(namespace, number) for number in range(partitions))
        self._ttl_s = ttl_s

    @property
    def partitions(self) -> int:
        """How many partitions there are."""
        return len(self._partitions)

    async def claim(self, task_id: str, user_id: str | None) -> bool:
        """Claim a task id for a call, in the partition of its user; return False if another partition has it (G4).

        Within a partition the gate checks this in its own step, so with one partition nothing is sent.
        """
        return await self._is_own(task_id, user_id, "SET", self._partition(user_id), "NX", "GET", "EX", self._id_ttl_s)

    async def put(self, result: InferenceResult, *, replaces: bool = False, max_ttl_s: int | None = None) -> bool:
        """Store a result that no settlement stores; return False if the task has a result already.

        With `replaces`, an existing result is replaced. With `max_ttl_s`, the result is kept for at most that long.
        """
        if not await self._is_own(result.task_id, result.user_id, "GET"):
            return False
        key = self._key(result.task_id, result.user_id)
        condition = () if replaces else ("NX",)
        ttl_s = self._ttl_s if max_ttl_s is None else min(max_ttl_s, self._ttl_s)
        stored = await self._pipeline.execute("SET", key, result.model_dump_json(), *condition, "EX", ttl_s)
        if stored is None:
            return False
        # A refused announcement must not fail a stored result: waiting tasks also read the key from time to time.
        with contextlib.suppress(ResponseError):
            await self._pipeline.execute("PUBLISH", key, result.task_id)
        return True

    async def get_of(self, task_id: str, user_id: str | None) -> InferenceResult | None:
        """Return the result of a task of this user, read where `put` stores it; None if there is none."""
        key = self._key(task_id, user_id)
        found: bytes | None = await self._pipeline.execute("GET", key)
        return None if found is None else _read(key, found)

    async def get(self, task_id: str) -> InferenceResult | None:
        """Return a task's result from any partition; None if there is none yet, or it has expired."""
        keys = self._keys(task_id)
        replies = await asyncio.gather(*(self._pipeline.execute("GET", key) for key in keys))
        return next((_read(key, found) for key, found in zip(keys, replies, strict=True) if found is not None), None)

    async def wait(self, task_id: str, timeout_s: float) -> InferenceResult | None:
        """Return a task's result as soon as it is stored, or None after `timeout_s`.

        Errors: LedgerUnavailable if Redis does not answer at the start or at the end; an outage between is waited out.
        """
        try:
            async with asyncio.timeout(timeout_s):
                return await self.get(task_id) or await self._arrival(task_id)
        except TimeoutError:
            return await self.get(task_id)

    async def _arrival(self, task_id: str) -> InferenceResult:
        async with self._arrivals.expected(self._keys(task_id)) as woken:
            while True:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_READ_AGAIN_S):
                        await woken.wait()
                woken.clear()
                with contextlib.suppress(LedgerUnavailable):
                    if (result := await self.get(task_id)) is not None:
                        return result

    def deltas_key(self, task_id: str, user_id: str | None) -> str:
        """Return the key of the stream of a task's answer, beside its result."""
        return self._partitions[self._partition(user_id)].deltas(task_id)

    def deltas_keys(self, task_id: str) -> list[str]:
        """Return the keys that this stream can have, one for each partition."""
        return [keys.deltas(task_id) for keys in self._partitions]

    def _key(self, task_id: str, user_id: str | None) -> str:
        return self._partitions[self._partition(user_id)].result(task_id)

    async def _is_own(self, task_id: str, user_id: str | None, command: str, *arguments: str | int) -> bool:
        """Whether no other partition has a call of this id; `command` returns the partition that has it."""
        if len(self._partitions) == 1:
            return True
        key = task_partition(self._namespace, task_id)
        owner: bytes | None = await self._pipeline.execute(command, key, *arguments)
        return owner is None or int(owner) == self._partition(user_id)  # G4

    def _partition(self, user_id: str | None) -> int:
        return partition_of(user_id, len(self._partitions)) if user_id else 0

    def _keys(self, task_id: str) -> list[str]:
        return [keys.result(task_id) for keys in self._partitions]


def _read(key: str, found: bytes) -> InferenceResult:
    try:
        return InferenceResult.model_validate_json(found)
    except ValidationError as exc:
        # No value is shown: a result holds a completion (G10).
        raise ResultUnreadable(key, as_text(problems_of(exc, InferenceResult, hides=lambda _: True))) from exc  # G10
