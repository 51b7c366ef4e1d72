"""A resource that is opened when it is first asked for: one attempt for all who ask, another after a failure."""

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import pytest

from tollbook.inference.on_demand import OnDemand


@dataclass(slots=True)
class Server:
    """What is opened: it notes each opening and closing, answers when told to, and fails while it is away."""

    is_away: bool = False
    may_answer: asyncio.Event = field(default_factory=asyncio.Event)
    was_asked: asyncio.Event = field(default_factory=asyncio.Event)
    opened: int = 0
    closed: int = 0

    async def open(self, stack: AsyncExitStack) -> str:
        self.opened += 1
        stack.callback(self._close)
        self.was_asked.set()
        await self.may_answer.wait()
        if self.is_away:
            raise ConnectionError("away")
        return f"connection {self.opened}"

    def _close(self) -> None:
        self.closed += 1


@pytest.fixture
def server() -> Server:
    return Server()


async def test_nothing_is_opened_before_it_is_asked_for(server: Server) -> None:
    await OnDemand(server.open).aclose()
    assert (server.opened, server.closed) == (0, 0)


async def test_every_caller_gets_the_same_one_until_it_is_closed(server: Server) -> None:
    resource = OnDemand(server.open)
    asking = [asyncio.create_task(resource.get()) for _ in range(3)]
    await server.was_asked.wait()
    server.may_answer.set()
    assert await asyncio.gather(*asking) == ["connection 1"] * 3
    assert await resource.get() == "connection 1"
    assert (server.opened, server.closed) == (1, 0)
    await resource.aclose()
    assert (server.opened, server.closed) == (1, 1)


async def test_a_failure_reaches_all_callers_and_the_next_call_tries_again(server: Server) -> None:
    server.is_away = True
    server.may_answer.set()
    resource = OnDemand(server.open)
    outcomes = await asyncio.gather(resource.get(), resource.get(), return_exceptions=True)
    assert [str(outcome) for outcome in outcomes] == ["away", "away"]
    assert (server.opened, server.closed) == (1, 1), "what was opened on the way is closed"
    server.is_away = False
    assert await resource.get() == "connection 2"
    await resource.aclose()
    assert server.closed == 2


async def test_a_cancelled_caller_does_not_cancel_others(server: Server) -> None:
    resource = OnDemand(server.open)
    first, second = asyncio.create_task(resource.get()), asyncio.create_task(resource.get())
    await server.was_asked.wait()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    server.may_answer.set()
    assert await second == "connection 1"
    await resource.aclose()


async def test_closing_ends_an_attempt_under_way(server: Server) -> None:
    resource = OnDemand(server.open)
    asking = asyncio.create_task(resource.get())
    await server.was_asked.wait()
    await resource.aclose()
    assert (server.opened, server.closed) == (1, 1)
    with pytest.raises(asyncio.CancelledError):
        await asking
