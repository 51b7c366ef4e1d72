"""Answering other processes' requests for baselines, over Redis: the projector's side of `ledger/gate/asking.py`.

Requests are collected while DuckDB is read; the next read answers all of them. No message can stop the answering:
malformed messages are counted and ignored, and if requests come faster than answers, the oldest are dropped.

No fence is needed. A projector that has lost its lease without knowing it may still answer with the balances at its
position: the gate checks a baseline by its position, not by its sender.
"""

import asyncio
from collections.abc import Sequence
from typing import Final, NamedTuple

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from tollbook.consumers.throttled_warning import ThrottledWarning
from tollbook.ledger.clock import now_ms
from tollbook.ledger.errors import BaselineUnavailable, LedgerError
from tollbook.ledger.gate.baseline_messages import BaselineRequest, MessageMalformed, answer_text, read_request
from tollbook.ledger.gate.baselines import BaselinePage, BaselineReader
from tollbook.ledger.keys import Keys
from tollbook.ledger.server.channels import Subscription, publish
from tollbook.ledger.server.pipeline import CommandPipeline

_SUBSCRIBED_S: Final = 5.0
_MAX_WAITING: Final = 1_000
_MAX_READ_NAMES: Final = 2_000
_log = structlog.get_logger(__name__)


class _PendingRequest(NamedTuple):
    keys: Keys
    request: BaselineRequest


class BaselineAnswers:
    """Answers the requests for baselines of one ledger, from `start` to `stop`.

    `malformed` counts the messages that were no valid request; `reads` counts the reads of DuckDB.
    """

    def __init__(
        self,
        redis: Redis,
        keys: Sequence[Keys],
        read: BaselineReader,
        *,
        ledger_id: str,
        max_waiting: int = _MAX_WAITING,
    ) -> None:
        """`read` reads baselines of all partitions; a LedgerError that it raises is sent to the askers."""
        self.malformed = 0
        self.reads = 0
        self._keys = {key.baseline_requests: key for key in keys}
        self._read = read
        self._ledger_id = ledger_id
        self._max_waiting = max_waiting
        # By asker and number: a repeated request gets one answer.
        self._waiting: dict[tuple[str, int], _PendingRequest] = {}
        self._has_arrived = asyncio.Event()
        self._subscription = Subscription(redis, tuple(self._keys), self._take)
        # A connection of its own, so that answers do not wait behind the trimming and checking of the ledger.
        self._pipeline = CommandPipeline(redis)
        self._tasks: set[asyncio.Task[None]] = set()
        self._bad_request = ThrottledWarning("baselines.request_ignored", now_ms)
        self._lost_answer = ThrottledWarning("baselines.answer_lost", now_ms)

    @property
    def waiting(self) -> int:
        """How many requests wait for the next read."""
        return len(self._waiting)

    async def start(self) -> None:
        """Begin to answer; return once Redis has confirmed the subscription, or after 5 s without."""
        self._tasks = {asyncio.create_task(self._subscription.run()), asyncio.create_task(self._answer_forever())}
        try:
            async with asyncio.timeout(_SUBSCRIBED_S):
                await self._subscription.in_place.wait()
        except TimeoutError:
            _log.warning("baselines.not_heard_yet", problem=self._subscription.problem)

    async def stop(self) -> None:
        """Stop answering: Redis tells later askers that nobody is subscribed."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._pipeline.aclose()

    def _take(self, channel: str, text: bytes) -> None:
        try:
            request = read_request(text)
        except MessageMalformed as exc:
            self.malformed += 1
            self._bad_request.warn(exc)
            return
        self._waiting[request.asker, request.number] = _PendingRequest(self._keys[channel], request)
        if len(self._waiting) > self._max_waiting:
            del self._waiting[next(iter(self._waiting))]
            self._lost_answer.warn(BaselineUnavailable("more requests come than can be answered"))
        self._has_arrived.set()

    async def _answer_forever(self) -> None:
        while True:
            await self._has_arrived.wait()
            batch = self._next_batch()
            if not self._waiting:
                self._has_arrived.clear()
            names = tuple(dict.fromkeys(name for asked in batch for name in asked.request.names))
            found = await self._read_baselines(names)
            # Not awaited: on a slow connection to Redis, the next answers need not wait until these are sent.
            sending = asyncio.create_task(self._send(batch, found))
            self._tasks.add(sending)
            sending.add_done_callback(self._tasks.discard)

    def _next_batch(self) -> list[_PendingRequest]:
        """Remove as many waiting requests as one read can answer, and return them."""
        batch: list[_PendingRequest] = []
        size = 0
        for asked in self._waiting.values():
            size += len(asked.request.names)
            if batch and size > _MAX_READ_NAMES:
                break
            batch.append(asked)
        for asked in batch:
            del self._waiting[asked.request.asker, asked.request.number]
        return batch

    async def _read_baselines(self, names: tuple[str, ...]) -> BaselinePage | LedgerError:
        self.reads += 1
        try:
            return await self._read(names)
        except LedgerError as exc:
            return exc
        except Exception as exc:  # noqa: BLE001 - whatever it is, the askers must fail closed and know why.
            return BaselineUnavailable(f"DuckDB could not be read ({exc})")  # G8

    async def _send(self, batch: Sequence[_PendingRequest], found: BaselinePage | LedgerError) -> None:
        sent = await asyncio.gather(*(self._answer(each, found) for each in batch), return_exceptions=True)
        for problem in sent:
            if isinstance(problem, RedisError | LedgerError):
                self._lost_answer.warn(problem)
            elif problem is not None:
                _log.error("baselines.answer_failed", problem=repr(problem))

    async def _answer(self, asked: _PendingRequest, found: BaselinePage | LedgerError) -> None:
        keys, request = asked
        text = answer_text(request, ledger_id=self._ledger_id, partition=keys.partition, found=found)
        await publish(self._pipeline, keys.baseline_answers(request.asker), text)
