"""Reply streams: publishers get their results on the stream that a task's `reply_to` names.

Owns which streams may be named, and appending to them. Invariant: nothing is appended to a task stream or to a key of
a ledger. Each result is also stored under the task's own key, so a reply stream that cannot be written delays no task.
"""

from collections.abc import Callable, Collection, Mapping

import structlog
from redis.exceptions import ResponseError

from tollbook.ledger.keys import is_reserved_key
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.schemas.results import InferenceResult

_log = structlog.get_logger(__name__)


class ReplyStreams:
    """Appends results to reply streams. `max_length` is the maximum number of entries of each; 0 means no limit.

    `task_streams` returns all task streams of the policy, including those that this worker does not serve.
    """

    def __init__(
        self,
        pipeline: CommandPipeline,
        *,
        namespace: str,
        task_streams: Callable[[], Collection[str]],
        max_length: int = 0,
    ) -> None:
        self._pipeline = pipeline
        self._namespaces = {namespace}
        self._others_streams = frozenset[str]()
        self._task_streams = task_streams
        self._max_length = max_length

    def share_database_with(self, owners: Mapping[str, str]) -> None:
        """Reserve the task streams and the keys of all ledgers in this database.

        `owners` maps each task stream in this database to its namespace.
        """
        self._namespaces |= set(owners.values())
        self._others_streams = frozenset(owners)

    def is_reserved(self, reply_to: str | None) -> bool:
        """Whether a stream belongs to a Tollbook: to this one, or to another one in this database."""
        return reply_to is not None and (
            reply_to in self._task_streams()
            or reply_to in self._others_streams
            or any(is_reserved_key(name, reply_to) for name in self._namespaces)
        )

    async def append(self, reply_to: str | None, result: InferenceResult) -> None:
        """Append a result to the publisher's reply stream at least once; readers deduplicate by `task_id`.

        Appends nothing if the stream is reserved, or if the key is no stream. Errors: LedgerUnavailable.
        """
        if reply_to is None or self.is_reserved(reply_to):
            return  # A task with a reserved stream is malformed; its answer is under its own key.
        try:
            limit = ("MAXLEN", "~", self._max_length) if self._max_length else ()
            await self._pipeline.execute(
                "XADD", reply_to, *limit, "*", "task_id", result.task_id, "result", result.model_dump_json()
            )
        except ResponseError as exc:
            # The key is no stream. The result is also stored under the task's key, so the task is not delayed.
            _log.warning("reply.refused", task_id=result.task_id, reply_to=reply_to, problem=str(exc))
