"""Waiting for other calls' holds to settle, without a slot and in the order of arrival.

The gate marks a budget when it answers WAIT and announces it when one of its holds is settled. Each announcement lets
the first of the budget's waiters try again; one that got its hold lets the next try, since there may be room for more.
An announcement can be missed (pub/sub keeps nothing), so the first waiter also tries every second.
"""

import asyncio
from collections import deque
from collections.abc import Sequence

from redis.asyncio import Redis

from tollbook.ledger.server.channels import Subscription


class BudgetWaitQueue:
    """The calls of one process that wait for money, in one queue for each budget."""

    def __init__(self, redis: Redis, channels: Sequence[str], *, retry_every_s: float = 1.0) -> None:
        self._freed = Subscription(redis, channels, lambda _, budget: self.next(budget.decode(errors="replace")))
        self._retry_every_s = retry_every_s
        self._queues: dict[str, deque[asyncio.Future[None]]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def waiting(self) -> int:
        """How many calls wait now."""
        return sum(len(queue) for queue in self._queues.values())

    def start(self) -> None:
        """Begin to listen. Call `aclose` to end."""
        self._tasks = [asyncio.create_task(self._freed.run()), asyncio.create_task(self._retry())]

    async def aclose(self) -> None:
        """Stop listening; those who wait stay waiting until they are cancelled."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def wait(self, budget: str, *, is_first: bool) -> None:
        """Wait for a turn to try again; `is_first` keeps the place of one who has just tried in vain."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue = self._queues.setdefault(budget, deque())
        if is_first:
            queue.appendleft(turn)
        else:
            queue.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn in queue:
                queue.remove(turn)
            elif turn.done() and not turn.cancelled():
                self.next(budget)  # The turn was given to one who no longer takes it.
            raise

    def next(self, budget: str) -> None:
        """Let the first of a budget's waiters try."""
        queue = self._queues.get(budget)
        while queue:
            turn = queue.popleft()
            if not turn.done():
                turn.set_result(None)
                break
        if queue is not None and not queue:
            del self._queues[budget]

    async def _retry(self) -> None:
        while True:
            await asyncio.sleep(self._retry_every_s)
            for budget in list(self._queues):
                self.next(budget)
