"""Answers that need no call: to a ping, to a malformed message, to a task whose id was used for another task.

Invariant (G4): the first answer under a task id is never changed.
"""

from collections.abc import Callable
from typing import Final

from tollbook.consumers.dead_letters import DeadLetters
from tollbook.consumers.messages import Delivery, salvage
from tollbook.inference.user_ids import UserIds
from tollbook.ledger.errors import IdempotencyConflict
from tollbook.ledger.results import Results
from tollbook.schemas.identifiers import task_id_from_entry
from tollbook.schemas.results import ErrorCode, InferenceResult, TaskStatus
from tollbook.schemas.tasks import PING, Task

# How long the result of a malformed message without a task id is kept. Its publisher cannot look for the result, and a
# flood of such messages must not fill the memory for a week.
_UNNAMED_TTL_S: Final = 3_600


class Answers:
    """Stores such answers, and puts tasks that cannot be executed on the dead-letter stream.

    Errors of every method: LedgerUnavailable.
    """

    def __init__(
        self, results: Results, dead_letters: DeadLetters, user_ids: UserIds, now_ms: Callable[[], int]
    ) -> None:
        self._results = results
        self._dead_letters = dead_letters
        self._user_ids = user_ids
        self._now_ms = now_ms

    async def ping(self, task_id: str, task: Task) -> InferenceResult:
        """Answer a ping. Errors: IdempotencyConflict if another task has used the id."""
        result = InferenceResult(
            task_id=task_id,
            status=TaskStatus.DONE,
            content="pong",
            user_id=task.user_id,
            task_type=task.task,
            finished_at_ms=self._now_ms(),
            metadata=task.metadata,
        )
        if await self._results.put(result):  # G4
            return result
        stored = await self._results.get_of(task_id, task.user_id)
        if stored is None or (stored.task_type, stored.user_id) != (PING, task.user_id):
            raise IdempotencyConflict(task_id)
        return stored

    async def malformed(self, delivery: Delivery, problem: str) -> tuple[InferenceResult, str | None]:
        """Refuse a malformed message; return the answer and its reply stream, or None if that cannot be read."""
        known = salvage(delivery)
        user_id = None if known.user_id is None else self._user_ids.on_ledger(known.user_id)  # G10
        await self._dead_letters.put(
            delivery, reason="invalid_task", error=problem, task_id=known.task_id, user_id=user_id
        )
        result = InferenceResult(
            task_id=known.task_id,
            status=TaskStatus.INVALID,
            error_code=ErrorCode.INVALID_TASK,
            error=problem,
            user_id=user_id,
            finished_at_ms=self._now_ms(),
        )
        is_named = known.task_id != task_id_from_entry(delivery.stream, delivery.entry_id)
        if not await self._results.put(result, max_ttl_s=None if is_named else _UNNAMED_TTL_S):  # G4
            # A redelivery repeats the first answer. A well-formed task that had this id before keeps its result.
            stored = await self._results.get_of(known.task_id, user_id) or result
            result = stored if stored.status is TaskStatus.INVALID and stored.error == problem else result
        return result, known.reply_to

    async def conflict(self, delivery: Delivery, task_id: str, task: Task, problem: str) -> InferenceResult:
        """Refuse a task whose id was used for another task.

        The result of the other task stays under its key. Only the reply stream reports the conflict.
        """
        await self._dead_letters.put(
            delivery, reason="idempotency_conflict", error=problem, task_id=task_id, user_id=task.user_id
        )
        return InferenceResult(
            task_id=task_id,
            status=TaskStatus.INVALID,
            error_code=ErrorCode.IDEMPOTENCY_CONFLICT,
            error=problem,
            user_id=task.user_id,
            task_type=task.task,
            finished_at_ms=self._now_ms(),
            metadata=task.metadata,
        )
