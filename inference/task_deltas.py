"""The answer of a task while it comes: a worker appends its deltas to a Redis stream, a publisher reads along.

One stream for a task, `{tollbook:P}:deltas:<task_id>`, bounded and short-lived. Its entries have one field each:
`delta` (a chunk as JSON), `gap` (deltas before were lost), `restarted` (what came before is void: another run begins),
`end` (the result's status). The result alone is certain: it says all that the deltas say, and is stored before the end.
Invariant: no call waits for this stream.
"""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from redis.exceptions import RedisError

from tollbook.inference.deltas import Delta
from tollbook.ledger.errors import LedgerUnavailable
from tollbook.ledger.logs import LazyLogger
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.schemas.results import InferenceResult

MAX_ENTRIES: Final = 20_000
"""About how many entries a stream keeps; older ones go."""
KEPT_S: Final = 3_600
_PATIENCE_S: Final = 1.0
"""How long an entry may take; what has come meanwhile is lost with it then."""
_log = LazyLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskUpdate:
    """What a reader of a task's answer is told next.

    `delta`: the next part, a chunk in OpenAI's form. `gap`: parts before it were lost. `restarted`: what came before is
    void, since another worker begins anew. `result`: the end; it says all that the parts said, and is the last.
    """

    kind: Literal["delta", "gap", "restarted", "result"]
    delta: Delta | None = None
    result: InferenceResult | None = None

    @property
    def text(self) -> str:
        """The part of the answer's text that a delta has."""
        return "".join(choice["delta"].get("content", "") for choice in (self.delta or {}).get("choices", ()))


class DeltaStream:
    """Appends the deltas of one task, in the background: a slow Redis loses some, and slows no call."""

    def __init__(self, pipeline: CommandPipeline, key: str, *, patience_s: float = _PATIENCE_S) -> None:
        self._pipeline = pipeline
        self._key = key
        self._patience_s = patience_s
        self._waiting: list[Delta] = []
        self._writing: asyncio.Task[None] | None = None
        self._has_gap = False
        self._is_new = True
        self._is_restart = False

    def begin(self, *, is_restart: bool) -> None:
        """Have it said that a run begins, where it is not the first."""
        if is_restart:
            self._is_restart = True
            self._start_writing()

    async def take(self, delta: Delta) -> None:
        """Take a delta; it is appended soon, with others where there are many."""
        self._waiting.append(delta)
        self._start_writing()

    def _start_writing(self) -> None:
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write())

    async def flush(self) -> None:
        """Append what is left. It takes a few seconds at most."""
        if self._writing is not None:
            await self._writing

    async def end(self, status: str) -> None:
        """Append what is left, and the end."""
        await self.flush()
        await self._append("end", status)

    async def _write(self) -> None:
        if self._is_restart:
            self._is_restart = False
            self._has_gap = not await self._append("restarted", "1")
        while self._waiting:
            batch, self._waiting = self._waiting, []
            if self._has_gap and not await self._append("gap", "1"):
                self._waiting.clear()
                return
            self._has_gap = False
            try:
                text = json.dumps(merged(batch), separators=(",", ":"))
            except (TypeError, ValueError) as exc:
                # Of another form than is known: the result has the answer, and must not be lost for it (G4).
                _log.warning("deltas.not_merged", key=self._key, problem=type(exc).__name__)
                self._has_gap = True
                continue
            if not await self._append("delta", text):
                self._has_gap = True
                self._waiting.clear()

    async def _append(self, field: str, value: str) -> bool:
        """Append an entry; return False where Redis did not take it in time."""
        try:
            async with asyncio.timeout(self._patience_s):
                added = self._pipeline.execute("XADD", self._key, "MAXLEN", "~", MAX_ENTRIES, "*", field, value)
                if self._is_new or field == "end":
                    await asyncio.gather(added, self._pipeline.execute("EXPIRE", self._key, KEPT_S))
                else:
                    await added
        except (LedgerUnavailable, RedisError, TimeoutError) as exc:
            _log.warning("deltas.lost", key=self._key, problem=str(exc) or "Redis did not answer in time")
            return False
        self._is_new = False
        return True


def merged(deltas: list[Delta]) -> Delta:
    """Return deltas that follow each other as one: texts and lists go on."""
    if len(deltas) == 1:
        return deltas[0]
    said: dict[str, Any] = {}
    logprobs: dict[str, Any] = {}
    finish: str | None = None
    for delta in deltas:
        choice = delta["choices"][0]
        _go_on(said, choice["delta"])
        _go_on(logprobs, choice["logprobs"] or {})
        finish = choice["finish_reason"] or finish
    return {"choices": [{"index": 0, "delta": said, "finish_reason": finish, "logprobs": logprobs or None}]}


def _go_on(joined: dict[str, Any], part: Mapping[str, Any]) -> None:
    for name, value in part.items():
        if value is not None:
            joined[name] = joined[name] + value if joined.get(name) is not None else value


def read_entry(fields: Mapping[bytes, bytes]) -> TaskUpdate | None:
    """Return what an entry says; None for the end, which the result says better, and for what is no entry."""
    if b"restarted" in fields:
        return TaskUpdate(kind="restarted")
    if b"gap" in fields:
        return TaskUpdate(kind="gap")
    if b"delta" not in fields:
        return None
    try:
        return TaskUpdate(kind="delta", delta=json.loads(fields[b"delta"]))
    except ValueError:
        return TaskUpdate(kind="gap")
