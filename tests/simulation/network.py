"""The network between processes and Redis: messages take time, and connections break with the outcome unknown.

`FakeRedis` takes the place of redis-py's client in the project's CommandPipeline and
BudgetWaitQueue. When a connection breaks, its batch is executed whole, in part or not at all. A
batch may also be executed long after its sender has seen the connection break.
"""

import asyncio
import re
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, cast

import hiredis
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from tests.simulation.loop import Process, VirtualLoop, current_process
from tests.simulation.redis_server import RedisServer
from tollbook.ledger.server.connection import ANSWER_TIMEOUT_S

_LATEST_EXECUTION_S = 20.0
_Watch = Callable[[Process, Sequence[Any], Any, bool], None]


@dataclass
class Faults:
    """How often the network fails, as shares of the batches sent; `latency_s` is the usual time in one direction."""

    broken: float = 0.0
    silent: float = 0.0
    slow: float = 0.0
    message_lost: float = 0.0
    latency_s: float = 0.001


class Network:
    """Connects the processes of a simulation with one server.

    `watch(process, command, reply, is_answered)` is called for every executed command; `is_answered` says whether the
    reply reaches the process.
    """

    def __init__(self, loop: VirtualLoop, server: RedisServer, random: Random, faults: Faults) -> None:
        self.loop = loop
        self.server = server
        self.random = random
        self.faults = faults
        self.watch: _Watch = lambda *_: None
        self.on_trouble: Callable[[Process, float], None] = lambda *_: None
        self.down_until_s: dict[Process, float] = {}
        self.servers = 1
        """Number of servers so far: a batch that was sent to one is not executed by the next."""
        self._subscribers: list[FakePubSub] = []
        server.on_publish = self._publish

    def client(self) -> "FakeRedis":
        return FakeRedis(self)

    def is_down(self, process: Process) -> bool:
        return self.down_until_s.get(process, 0.0) > self.loop.time()

    def cut(self, process: Process, seconds: float) -> None:
        """Cut a process off from the server for a while."""
        self.down_until_s[process] = self.loop.time() + seconds
        self.on_trouble(process, seconds)
        for subscriber in [each for each in self._subscribers if each.process is process]:
            subscriber.lose_connection()

    def replace_server(self, processes: Iterable[Process], seconds: float) -> None:
        """Break every connection; no process can connect again for a while."""
        self.servers += 1
        for process in processes:
            self.cut(process, seconds)

    def delay_s(self, process: Process) -> float:
        if self.faults.slow and self.random.random() < self.faults.slow:
            self.on_trouble(process, 5.0)
            return self.random.uniform(0.1, 5.0)
        return self.faults.latency_s * self.random.uniform(0.5, 2.0)

    def execute(self, process: Process, command: Sequence[Any], *, is_answered: bool) -> Any:
        self.server.client = process
        try:
            reply = self.server.execute(command)
        except ResponseError as exc:
            reply = exc
        self.watch(process, command, reply, is_answered)
        return reply

    def subscribe(self, subscriber: "FakePubSub") -> None:
        self._subscribers.append(subscriber)

    def unsubscribe(self, subscriber: "FakePubSub") -> None:
        if subscriber in self._subscribers:
            self._subscribers.remove(subscriber)

    def _publish(self, channel: bytes, message: bytes) -> int:
        found = [each for each in self._subscribers if channel in each.channels]
        for subscriber in found:
            if self.random.random() >= self.faults.message_lost:
                self.loop.world_later(self.delay_s(subscriber.process), subscriber.deliver, message)
        return len(found)


class Connection:
    """One connection. A broken one works again with the next batch, as redis-py's reconnects by itself."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._process = current_process()
        self._replies: deque[Any] = deque()
        self._waiting: asyncio.Future[None] | None = None
        self._sent = 0

    async def send_packed_command(self, commands: Sequence[bytes], *, check_health: bool = True) -> None:
        network, random = self._network, self._network.random
        if network.loop.is_ending:
            raise asyncio.CancelledError
        if network.is_down(self._process):
            await asyncio.sleep(0.01)
            raise RedisConnectionError("no connection")
        self._sent += 1
        answered, executed, late_s = len(commands), len(commands), 0.0
        draw = random.random()
        if draw < network.faults.broken:
            network.on_trouble(self._process, 0.0)
            executed = random.randint(0, len(commands))
            answered = random.randint(0, executed) if executed < len(commands) else random.randint(0, executed - 1)
            if random.random() < 0.3:
                late_s = random.uniform(0.0, _LATEST_EXECUTION_S)
                answered = 0
        elif draw < network.faults.broken + network.faults.silent:
            network.on_trouble(self._process, ANSWER_TIMEOUT_S)
            executed, answered = random.choice((0, len(commands))), -1
        batch = [_unpacked(command) for command in commands]
        network.loop.world_later(
            network.delay_s(self._process) + late_s,
            self._arrive,
            self._sent,
            batch,
            executed,
            answered,
            network.servers,
        )
        if late_s:
            network.loop.world_later(
                network.delay_s(self._process), self._answer, self._sent, [RedisConnectionError("lost")]
            )

    def _arrive(self, number: int, batch: Sequence[Sequence[Any]], executed: int, answered: int, server: int) -> None:
        network = self._network
        if server != network.servers:
            return self._answer(number, [RedisConnectionError("lost")])
        is_answered = answered == len(batch)
        replies = [network.execute(self._process, command, is_answered=is_answered) for command in batch[:executed]]
        if answered < 0 or number != self._sent:
            return None
        answers = replies[:answered]
        if answered < len(batch):
            answers.append(RedisConnectionError("lost"))
        network.loop.world_later(network.delay_s(self._process), self._return, number, answers, server)
        return None

    def _return(self, number: int, replies: Sequence[Any], server: int) -> None:
        is_lost = server != self._network.servers
        self._answer(number, [RedisConnectionError("lost")] if is_lost else replies)

    def _answer(self, number: int, replies: Sequence[Any]) -> None:
        if number != self._sent:
            return
        self._replies.extend(replies)
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def read_response(self, *, disable_decoding: bool = True) -> Any:
        while not self._replies:
            if self._network.loop.is_ending:
                raise asyncio.CancelledError
            self._waiting = self._network.loop.create_future()
            await self._waiting
        reply = self._replies.popleft()
        if isinstance(reply, Exception):
            raise reply
        return reply

    async def disconnect(self, *, nowait: bool = False) -> None:
        self._sent += 1
        self._replies.clear()


class FakeRedis:
    """The parts of a redis-py client that the project uses beside its pipeline: the pool, and pub/sub."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self.connection_pool = self

    def typed(self) -> Redis:
        return cast("Redis", self)

    async def get_connection(self) -> Connection:
        return Connection(self._network)

    async def release(self, connection: Connection) -> None:
        pass

    def pubsub(self) -> "FakePubSub":
        return FakePubSub(self._network)


_PONG = object()


class FakePubSub:
    """A subscription. Messages are lost while there is no connection."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self.process = current_process()
        self.channels: tuple[bytes, ...] = ()
        self._messages: deque[Any] = deque()
        self._waiting: asyncio.Future[None] | None = None

    async def subscribe(self, *channels: str) -> None:
        await asyncio.sleep(self._network.delay_s(self.process))
        if self._network.is_down(self.process):
            raise RedisConnectionError("no connection")
        self.channels = tuple(channel.encode() for channel in channels)
        self._network.subscribe(self)

    async def get_message(self, *, timeout: float) -> dict[str, Any] | None:  # noqa: ASYNC109 - as redis-py has it.
        if not self._messages:
            self._waiting = self._network.loop.create_future()
            await asyncio.wait((self._waiting,), timeout=timeout)
        if not self._messages:
            return None
        message = self._messages.popleft()
        if isinstance(message, Exception):
            raise message
        if message is _PONG:
            return {"type": "pong"}
        return {"type": "message", "channel": self.channels[0], "data": message}

    async def ping(self) -> None:
        if self._network.is_down(self.process):
            raise RedisConnectionError("no connection")
        self._network.loop.world_later(self._network.delay_s(self.process), self.deliver, _PONG)

    def deliver(self, message: Any) -> None:
        self._messages.append(message)
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def lose_connection(self) -> None:
        self._network.unsubscribe(self)
        self._network.loop.world_later(0.0, self.deliver, RedisConnectionError("lost"))

    async def aclose(self) -> None:
        self._network.unsubscribe(self)


def _unpacked(command: bytes) -> tuple[str | int, ...]:
    """Return the arguments of a packed command; it has the form of a list reply, so the reply parser reads it."""
    reader = hiredis.Reader()
    reader.feed(command)
    return tuple(int(part) if re.fullmatch(rb"0|-?[1-9]\d*", part) else part.decode() for part in reader.gets())
