"""The streams on which publishers get their results, as a task's `reply_to` names them.

Owns which streams may be named, and appending to them. Invariant: nothing is appended to a task stream or to a key of
a ledger. Each result is also stored under its task's own key, so a stream that cannot be written delays no task.
"""

from collections.abc import Callable, Collection, Mapping

import structlog
from redis.exceptions import ResponseError

from tollbook.ledger.keys import is_reserved_key
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.schemas.results import InferenceResult

_log = structlog.get_logger(__name__)


class ReplyStreams:
    """Appends results to reply streams. `max_length` is how many entries each is kept to; 0: no limit.

    `task_streams` returns all of the policy's, also those that this worker does not serve.
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
        """Take no task stream, and none that begins as the keys of these ledgers do, for one of replies.

        `owners` has the namespace of each task stream in this database.
        """
        self._namespaces |= set(owners.values())
        self._others_streams = frozenset(owners)

    def is_reserved(self, reply_to: str | None) -> bool:
        """Whether a stream is a Tollbook's own: this one's, or another's that shares the database."""
        return reply_to is not None and (
            reply_to in self._task_streams()
            or reply_to in self._others_streams
            or any(is_reserved_key(name, reply_to) for name in self._namespaces)
        )

    async def append(self, reply_to: str | None, result: InferenceResult) -> None:
        """Append a result to the publisher's reply stream; at least once, so consumers go by `task_id`.

        A stream that is reserved, or no stream, gets nothing. Errors: LedgerUnavailable.
        """
        if reply_to is None or self.is_reserved(reply_to):
            return  # Of a malformed task, which has its answer under its own key.
        try:
            limit = ("MAXLEN", "~", self._max_length) if self._max_length else ()
            await self._pipeline.execute(
                "XADD", reply_to, *limit, "*", "task_id", result.task_id, "result", result.model_dump_json()
            )
        except ResponseError as exc:
            # The key is no stream. The result stands under its own key, so the task is not delayed by it.
            _log.warning("reply.refused", task_id=result.task_id, reply_to=reply_to, problem=str(exc))
