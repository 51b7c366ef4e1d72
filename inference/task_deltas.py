"""Streaming the answer of a task: a worker appends its deltas to a Redis stream, and a publisher reads them.

Each task has one stream, `{tollbook:P}:deltas:<task_id>`, limited in length and lifetime. Its entries have one field
each: `delta` (a chunk as JSON), `gap` (earlier deltas were lost), `restarted` (discard the earlier deltas: another run
begins), `end` (the result's status). Only the result is certain: it has all that the deltas have, and is stored before
the end. Invariant: no call waits for this stream.
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
"""About how many entries a stream keeps; older ones are trimmed."""
KEPT_S: Final = 3_600
_PATIENCE_S: Final = 1.0
"""How long appending an entry may take; after that, it is lost together with the deltas that came meanwhile."""
_log = LazyLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskUpdate:
    """The next update for a reader of a task's answer.

    `delta`: the next part, a chunk in OpenAI's form. `gap`: earlier parts were lost. `restarted`: discard the earlier
    parts, since another worker starts again. `result`: the last update; it has all that the parts had.
    """

    kind: Literal["delta", "gap", "restarted", "result"]
    delta: Delta | None = None
    result: InferenceResult | None = None

    @property
    def text(self) -> str:
        """The text of a delta; '' if it has none."""
        return "".join(choice["delta"].get("content", "") for choice in (self.delta or {}).get("choices", ()))


class DeltaStream:
    """Appends the deltas of one task in the background: with a slow Redis, deltas are lost, but no call is slowed."""

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
        """Begin a run; with `is_restart`, append that the earlier deltas are void."""
        if is_restart:
            self._is_restart = True
            self._start_writing()

    async def take(self, delta: Delta) -> None:
        """Take a delta; it is appended soon, merged with others if there are many."""
        self._waiting.append(delta)
        self._start_writing()

    def _start_writing(self) -> None:
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write())

    async def flush(self) -> None:
        """Append the waiting deltas; takes a few seconds at most."""
        if self._writing is not None:
            await self._writing

    async def end(self, status: str) -> None:
        """Append the waiting deltas and the end."""
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
                # Deltas of an unknown form must not lose the result, which has the whole answer (G4).
                _log.warning("deltas.not_merged", key=self._key, problem=type(exc).__name__)
                self._has_gap = True
                continue
            if not await self._append("delta", text):
                self._has_gap = True
                self._waiting.clear()

    async def _append(self, field: str, value: str) -> bool:
        """Append an entry; return False if Redis did not confirm it in time."""
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
    """Return consecutive deltas as one delta: texts and lists are concatenated."""
    if len(deltas) == 1:
        return deltas[0]
    joined: dict[str, Any] = {}
    logprobs: dict[str, Any] = {}
    finish: str | None = None
    for delta in deltas:
        choice = delta["choices"][0]
        _extend(joined, choice["delta"])
        _extend(logprobs, choice["logprobs"] or {})
        finish = choice["finish_reason"] or finish
    return {"choices": [{"index": 0, "delta": joined, "finish_reason": finish, "logprobs": logprobs or None}]}


def _extend(joined: dict[str, Any], part: Mapping[str, Any]) -> None:
    for name, value in part.items():
        if value is not None:
            joined[name] = joined[name] + value if joined.get(name) is not None else value


def read_entry(fields: Mapping[bytes, bytes]) -> TaskUpdate | None:
    """Return the update of an entry; None for the end, since the result follows, and for an unknown entry."""
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
