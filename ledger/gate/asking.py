"""Asking the projector for baselines, over Redis: what a process without the DuckDB file does.

A request is published, the projector publishes its answer to the channel of this process. An answer that comes late or
twice is harmless, whoever of several projectors sent it: a baseline has its position, and the gate says STALE where its
tail does not reach back to it, AHEAD where the ledger never had it, DIVERGED where its own sum is another (G6, G8).
"""

import asyncio
import itertools
from collections.abc import Sequence
from typing import Final

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from tollbook.ledger.errors import BaselineUnavailable, LedgerUnavailable
from tollbook.ledger.gate.baseline_messages import (
    BaselineAnswer,
    BaselineRequest,
    MessageMalformed,
    read_answer,
    request_text,
)
from tollbook.ledger.gate.baselines import BaselinePage, BaselineReader
from tollbook.ledger.keys import Keys
from tollbook.ledger.logs import LazyLogger
from tollbook.ledger.server.channels import Subscription, publish
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.ledger.server.refusals import reason_of, unavailable

_ANSWER_S: Final = 5.0
# A request or its answer is lost while a connection is made again, and where the projector ends before it answers.
_ASK_AGAIN_S: Final = 1.0
NO_PROJECTOR: Final = "no projector runs on this ledger: start `tollbook projector`, or wait until it answers"
_log = LazyLogger(__name__)


class AskedBaselines:
    """The requests of one process, over one subscription that is made when it first asks.

    `process` is a name that no other process has. A projector that has not answered within `answer_s` counts as down.
    """

    def __init__(
        self,
        redis: Redis,
        pipeline: CommandPipeline,
        keys: Sequence[Keys],
        *,
        ledger_id: str,
        process: str,
        answer_s: float = _ANSWER_S,
    ) -> None:
        self._pipeline = pipeline
        self._keys = tuple(keys)
        self._ledger_id = ledger_id
        self._process = process
        self._answer_s = answer_s
        self._numbers = itertools.count(1)
        self._asked: dict[int, asyncio.Future[BaselineAnswer]] = {}
        channels = [key.baseline_answers(process) for key in keys]
        self._subscription = Subscription(redis, channels, self._take)
        self._listening: asyncio.Task[None] | None = None
        self._has_warned = False

    def reader(self, partition: int) -> BaselineReader:
        """Return what reads baselines of a partition."""
        keys = self._keys[partition]

        async def read(names: Sequence[str], /) -> BaselinePage:
            return await self._read(keys, tuple(names))

        return read

    async def aclose(self) -> None:
        """Stop listening; who waits for an answer is not served any more."""
        listening, self._listening = self._listening, None
        if listening is not None:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)

    async def _read(self, keys: Keys, names: tuple[str, ...]) -> BaselinePage:
        if self._listening is None or self._listening.done():
            self._listening = asyncio.create_task(self._subscription.run())
        request = BaselineRequest(self._process, next(self._numbers), names)
        answered = self._asked[request.number] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(self._answer_s):
                answer = await self._ask(keys, request, answered)
        except TimeoutError:
            raise BaselineUnavailable(self._silence()) from None
        finally:
            del self._asked[request.number]
        if answer.ledger_id != self._ledger_id:  # G8
            raise BaselineUnavailable(
                f"the projector that answers is of ledger {answer.ledger_id}, this process works on {self._ledger_id}: "
                "stop the one that does not belong to this Redis"
            )
        try:
            return answer.page(names, partition=keys.partition)
        except MessageMalformed as exc:
            raise BaselineUnavailable(
                f"the projector's answer cannot be read ({exc}): restart it together with this process"
            ) from exc

    async def _ask(
        self, keys: Keys, request: BaselineRequest, answered: asyncio.Future[BaselineAnswer]
    ) -> BaselineAnswer:
        text = request_text(request)
        while True:
            await self._subscription.in_place.wait()
            try:
                listeners = await publish(self._pipeline, keys.baseline_requests, text)
            except LedgerUnavailable as exc:
                raise BaselineUnavailable(f"the projector cannot be asked: {reason_of(exc)}") from exc
            except ResponseError as exc:
                raise BaselineUnavailable(f"the projector cannot be asked: {unavailable(exc)}") from exc
            if not listeners:
                raise BaselineUnavailable(NO_PROJECTOR)  # G8
            done, _ = await asyncio.wait((answered,), timeout=_ASK_AGAIN_S)
            if done:
                return answered.result()

    def _silence(self) -> str:
        problem = self._subscription.problem
        if not self._subscription.in_place.is_set():
            return f"no answer of the projector can be heard: {problem or 'Redis confirms no subscription'}"
        return f"the projector did not answer within {self._answer_s:.0f} s"

    def _take(self, _channel: str, text: bytes) -> None:
        try:
            answer = read_answer(text)
        except MessageMalformed as exc:
            if not self._has_warned:  # Once, since whoever may publish here can send any number of them.
                _log.warning("baselines.answer_ignored", problem=str(exc))
            self._has_warned = True
            return
        asked = self._asked.get(answer.number)
        # One that comes late, or a second time, is for nobody.
        if asked is not None and not asked.done():
            asked.set_result(answer)
