"""The dead-letter stream: tasks that cannot be executed, unchanged, with the reason.

Invariant: the number of letters and their age are limited, whatever publishers send. The step that appends a letter
drops the oldest ones beyond the limits, and counts them. The log has a few lines per minute, and the numbers.
"""

from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from redis.exceptions import ResponseError

from tollbook.consumers.messages import Delivery, fields_as_json, fields_from_json, read_task
from tollbook.consumers.throttled_warning import FloodWarning
from tollbook.inference.current_policy import policy_in_force
from tollbook.ledger.clock import now_ms as clock_ms
from tollbook.ledger.gate.functions import function, library_code
from tollbook.ledger.gate.policies import read_policies
from tollbook.ledger.keys import Keys, dead_letters, dropped_dead_letters
from tollbook.ledger.logs import LazyLogger
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.schemas.identifiers import is_hashed_id

Reason = Literal["invalid_task", "idempotency_conflict", "attempts_exhausted"]
# Characters kept of a task id, so that the id with its `~retry-` ending is not too long.
_ID_KEPT: Final = 150
_PAGE: Final = 1_000
_MINUTE_MS: Final = 60_000
_log = LazyLogger(__name__)


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One dead letter. `fields` are the original entry's, byte for byte."""

    id: str
    stream: str
    entry_id: str
    reason: str
    error: str
    task_id: str
    user_id: str
    deliveries: int
    at_ms: int
    fields: Mapping[bytes, bytes]


@dataclass(frozen=True, slots=True)
class DeadLetterLimits:
    """The maximum number of letters, and how long each is kept."""

    max_letters: int = 10_000
    keep_s: float = 30 * 86_400.0


@dataclass(frozen=True, slots=True)
class Selection:
    """A filter on dead letters; None matches every value. `since_ms`: dead-lettered at that moment or later."""

    stream: str | None = None
    reason: str | None = None
    user_id: str | None = None
    since_ms: int | None = None

    def has(self, letter: DeadLetter) -> bool:
        """Whether a letter matches."""
        return (
            self.stream in (None, letter.stream)
            and self.reason in (None, letter.reason)
            and self.user_id in (None, letter.user_id)
            and (self.since_ms is None or letter.at_ms >= self.since_ms)
        )


@dataclass(frozen=True, slots=True)
class Retried:
    """Where a retried task went, and the task id under which its result will be."""

    stream: str
    entry_id: str
    task_id: str


class DeadLetters:
    """Puts, lists, retries and drops dead letters. Errors of every method: LedgerUnavailable."""

    def __init__(
        self,
        pipeline: CommandPipeline,
        namespace: str,
        *,
        limits: DeadLetterLimits | None = None,
        now_ms: Callable[[], int] = clock_ms,
    ) -> None:
        self._pipeline = pipeline
        self._namespace = namespace
        self.key = dead_letters(namespace)
        self._dropped_key = dropped_dead_letters(namespace)
        self._limits = limits or DeadLetterLimits()
        self._now_ms = now_ms
        self._put = FloodWarning("task.dead_lettered", now_ms)
        # Logged once a minute, with the number of that minute.
        self._dropped = 0
        self._dropped_logged_ms = 0

    async def put(
        self, delivery: Delivery, *, reason: Reason, error: str, task_id: str, user_id: str | None = None
    ) -> None:
        """Append a task with the reason, and drop the oldest letters beyond the limits.

        A worker that dies before its acknowledgement may append it twice.
        """
        letter_id = await self._append(
            *("stream", delivery.stream, "entry_id", delivery.entry_id, "reason", reason, "error", error[:1000]),
            *("task_id", task_id, "user_id", user_id or "", "deliveries", delivery.deliveries, "at", self._now_ms()),
            *("fields", fields_as_json(delivery.fields)),
        )
        self._put.warn(reason, letter=letter_id, task_id=task_id, stream=delivery.stream, entry_id=delivery.entry_id)

    async def tidy(self) -> None:
        """Drop the letters beyond the limits, and log the pending numbers. Needed for a stream that gets no letters."""
        await self._append()
        self.flush()

    def flush(self, *, is_last: bool = False) -> None:
        """Log the numbers of the last minute; with `is_last`, those of the current minute too."""
        self._put.flush(is_last=is_last)
        now_ms = self._now_ms()
        if self._dropped and (is_last or now_ms - self._dropped_logged_ms >= _MINUTE_MS):
            limits = self._limits
            _log.warning(
                "dead_letters.dropped", times=self._dropped, max_letters=limits.max_letters, keep_s=limits.keep_s
            )
            self._dropped, self._dropped_logged_ms = 0, now_ms

    async def _append(self, *fields: str | int) -> str:
        command = (
            "FCALL", function("dead_letter"), 2, self.key, self._dropped_key,
            self._limits.max_letters, round(1000 * self._limits.keep_s), *fields,
        )  # fmt: skip
        try:
            letter_id, dropped = await self._pipeline.execute(*command)
        except ResponseError as exc:
            if "Function not found" not in str(exc):
                raise
            # The server was emptied or replaced. If all tasks are malformed, no call loads the library.
            await self._pipeline.execute_on_primaries("FUNCTION", "LOAD", "REPLACE", library_code())
            letter_id, dropped = await self._pipeline.execute(*command)
        self._dropped += dropped
        self.flush()
        return letter_id.decode()

    async def list(self, *, count: int = 100, after: str = "-") -> list[DeadLetter]:
        """Return dead letters, oldest first."""
        start = "-" if after == "-" else f"({after}"
        entries: Any = await self._pipeline.execute("XRANGE", self.key, start, "+", "COUNT", count)
        return [_parse(entry) for entry in entries]

    async def get(self, letter_id: str) -> DeadLetter | None:
        """Return one dead letter, or None."""
        entries: Any = await self._pipeline.execute("XRANGE", self.key, letter_id, letter_id)
        return _parse(entries[0]) if entries else None

    async def select(self, selection: Selection) -> AsyncGenerator[DeadLetter]:
        """Yield the dead letters of a selection, oldest first."""
        after = "-"
        while page := await self.list(count=_PAGE, after=after):
            for letter in page:
                if selection.has(letter):
                    yield letter
            after = page[-1].id

    async def plain_ids(self, user_ids: Iterable[str]) -> dict[str, str]:
        """Return the plain id of each user whose hash the table beside the ledger has."""
        wanted = [each for each in user_ids if is_hashed_id(each)]
        if not wanted:
            return {}
        # Imported here: a worker does not need it, and `tollbook dead-letters` needs it only for hashed ids.
        from tollbook.inference.user_ids import read_plain

        return await read_plain(self._pipeline, Keys(self._namespace), wanted)

    async def count(self) -> int:
        """Return how many letters there are."""
        return int(await self._pipeline.execute("XLEN", self.key))

    async def dropped(self) -> int:
        """Return how many letters were dropped because there were too many, or they were too old."""
        return int(await self._pipeline.execute("GET", self._dropped_key) or 0)

    async def retry(self, letter: DeadLetter, *, unchanged: bool = False) -> Retried:
        """Put the task on its stream again, then drop the letter.

        The task already has a result under its task id, and that result stays (G4). So the task runs under a new id,
        which is always the same for this letter: if the retry is repeated after a crash, the task runs once. With
        `unchanged` the entry goes back byte for byte.

        Errors: InvalidTask if the task cannot be read, since it would only be dead-lettered again; PolicyUnreadable.
        """
        fields, task_id = letter.fields, letter.task_id
        if not unchanged:
            (stored,) = await read_policies(self._pipeline, [Keys(self._namespace)])
            tag_names = policy_in_force(stored).policy.tag_names
            _, task = read_task(Delivery(letter.stream, letter.entry_id, letter.fields), tag_names)
            task_id = f"{task_id[:_ID_KEPT]}~retry-{letter.id}"
            renamed = task.model_copy(update={"task_id": task_id})
            fields = {b"data": renamed.model_dump_json(exclude_none=True).encode()}
        flat = [part for pair in fields.items() for part in pair]
        entry_id: bytes = await self._pipeline.execute("XADD", letter.stream, "*", *flat)
        await self.drop(letter.id)
        return Retried(stream=letter.stream, entry_id=entry_id.decode(), task_id=task_id)

    async def drop(self, letter_id: str) -> bool:
        """Remove a dead letter; return whether it was there."""
        return bool(await self._pipeline.execute("XDEL", self.key, letter_id))


def _parse(entry: Any) -> DeadLetter:
    letter_id, flat = entry
    values = {flat[i].decode(): flat[i + 1].decode() for i in range(0, len(flat), 2)}
    return DeadLetter(
        id=letter_id.decode(),
        stream=values["stream"],
        entry_id=values["entry_id"],
        reason=values["reason"],
        error=values["error"],
        task_id=values["task_id"],
        user_id=values["user_id"],
        deliveries=int(values["deliveries"]),
        at_ms=int(values["at"]),
        fields=fields_from_json(values["fields"]),
    )
