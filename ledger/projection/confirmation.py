"""Confirming a fold before it is committed: its thread asks the event loop, which reads the gate's traces from Redis.

The fold keeps its transaction open meanwhile, so a confirmation must end as soon as the fold is cancelled: `end`
cancels the request that the thread waits for.
"""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

import duckdb

from tollbook.ledger.projection.fold import Folded
from tollbook.ledger.projection.traces import ForgedEvent, Traces, check_stamps, read_expected, read_moves
from tollbook.ledger.server.connection import ANSWER_TIMEOUT_S
from tollbook.schemas.identifiers import EntryId

_T = TypeVar("_T")


class Confirmation:
    """Compares one fold with the gate's traces after `after`. Made in the event loop, called in the fold's thread."""

    def __init__(self, traces: Traces, after: EntryId) -> None:
        self._traces = traces
        self._after = after
        self._loop = asyncio.get_running_loop()
        self._request: Future[Any] | None = None
        self._has_ended = False

    def __call__(self, cursor: duckdb.DuckDBPyConnection, folded: Folded) -> None:
        """Compare. Errors: ForgedEvent; TailChanged; Doubted; LedgerUnavailable; RedisError; TimeoutError."""
        after = self._after
        expected = read_expected(cursor, after)
        problems = [
            self._ask(partial(self._traces.explain, budget, read_moves(cursor, budget, after), after))
            for budget in self._ask(lambda: self._traces.differing(expected))
        ]
        forged = [problem for problem in problems if isinstance(problem, ForgedEvent)]
        if problems:
            raise min(forged, key=lambda problem: problem.seq) if forged else problems[0]  # G8
        self._ask(lambda: self._traces.check_others(expected))
        self._ask(lambda: self._traces.check_policies(expected))
        if folded.discrepancies:
            last_seq = folded.position.seq
            first_seq = last_seq - folded.events + 1
            check_stamps(cursor, partition=self._traces.partition, first_seq=first_seq, last_seq=last_seq, after=after)

    def end(self) -> None:
        """Cancel what the fold's thread waits for, now and later; called in the event loop."""
        self._has_ended = True
        if self._request is not None:
            self._request.cancel()

    def _ask(self, request: Callable[[], Awaitable[_T]]) -> _T:
        async def bounded() -> _T:
            if self._has_ended:
                raise asyncio.CancelledError
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                return await request()

        self._request = future = asyncio.run_coroutine_threadsafe(bounded(), self._loop)
        return future.result()
