"""A Redis or Valkey Cluster: which node has which key, and following a key that has moved.

Invariant: a command is sent again only after a node has refused it unread, with MOVED, ASK or TRYAGAIN. All other
errors go to the caller, who knows what is idempotent. See docs/adr/0021-one-batch-a-node.md.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar, cast

from redis.asyncio import Redis
from redis.exceptions import AskError, ClusterDownError, MovedError, TryAgainError
from redis.exceptions import ConnectionError as RedisConnectionError

from tollbook.ledger.errors import LedgerUnavailable, RedisCannotServe
from tollbook.ledger.logs import LazyLogger
from tollbook.ledger.server.slots import SLOTS, Command, key_of, slot_of

T = TypeVar("T")
_log = LazyLogger(__name__)
# A node answers CLUSTER SLOTS from memory. After this time without an answer, another node is asked too.
_NEXT_S: Final = 0.5
_ASK_S: Final = 10.0
_FIRST: Final = asyncio.FIRST_COMPLETED
# How long a command follows a moving key. Nothing was done so far, so the caller may retry.
_FOLLOW_S: Final = 10.0
# Two nodes can redirect to each other until both know of a failover.
_PAUSE_S: Final = 0.02
_HOPS_AT_ONCE: Final = 4


@dataclass(frozen=True, slots=True, order=True)
class Address:
    """Where a node of a cluster is reached."""

    host: str
    port: int

    def __str__(self) -> str:
        """Return `host:port`, as in a URL."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class SlotRange:
    """Slots that one primary has, from the first to the last; and its replicas."""

    first: int
    last: int
    primary: Address
    replicas: tuple[Address, ...] = ()


class Cluster:
    """The nodes of a cluster and the slots of each, as far as they are known.

    `open_client` makes a client of one node, which must not repeat a command by itself.
    """

    def __init__(self, open_client: Callable[[Address], Redis], seeds: Sequence[Address]) -> None:
        self._open_client = open_client
        self._seeds = tuple(seeds)
        self._clients: dict[Address, Redis] = {}
        self._places: list[Address | None] = [None] * SLOTS
        self._ranges: tuple[SlotRange, ...] = ()
        self._refreshing: asyncio.Task[None] | None = None
        self._turn = 0

    @property
    def ranges(self) -> tuple[SlotRange, ...]:
        """The slots of each primary, as they were read last."""
        return self._ranges

    def client(self, address: Address) -> Redis:
        """Return the client of a node."""
        if address not in self._clients:
            self._clients[address] = self._open_client(address)
        return self._clients[address]

    def next_client(self) -> Redis:
        """Return the client of the next primary in turn, so that a lost primary is not tried twice in a row."""
        primaries = self.known_primaries or self._seeds
        self._turn += 1
        return self.client(primaries[self._turn % len(primaries)])

    async def primaries(self) -> list[Address]:
        """Return all primaries that have slots, in order. Errors: LedgerUnavailable."""
        await self.refresh()
        return self.known_primaries

    @property
    def known_primaries(self) -> list[Address]:
        """All primaries that have slots, as was read last."""
        return sorted({each.primary for each in self._ranges})

    def use(self, reply: Sequence[Any], asked: Address) -> None:
        """Store a node's reply to CLUSTER SLOTS."""
        self._ranges = tuple(_range(row, asked) for row in reply)
        places: list[Address | None] = [None] * SLOTS
        for each in self._ranges:
            places[each.first : each.last + 1] = [each.primary] * (each.last + 1 - each.first)
        self._places = places

    async def refresh(self) -> None:
        """Read where the slots are. Errors: LedgerUnavailable if no node answers."""
        await asyncio.shield(self.refresh_soon())

    def refresh_soon(self) -> "asyncio.Task[None]":
        """Read where the slots are, in the background: once for all callers at the same time."""
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(self._refresh())
            # A caller that needs an unknown place refreshes again, and gets the error.
            self._refreshing.add_done_callback(lambda task: task.cancelled() or task.exception())
        return self._refreshing

    async def _refresh(self) -> None:
        replicas = (replica for each in self._ranges for replica in each.replicas)
        known = [*dict.fromkeys((*self.known_primaries, *self._seeds, *replicas))]
        # Another node comes first each time: a node that is cut off from the others has old data.
        self._turn += 1
        start = self._turn % len(known)
        left = [*known[start:], *known[:start]]
        asked: dict[asyncio.Task[list[Any]], Address] = {}
        problem: BaseException = LedgerUnavailable("no node of the cluster has a slot")
        try:
            while left or asked:
                if left:
                    address = left.pop(0)
                    asked[asyncio.create_task(self._slots_by(address))] = address
                # The next node is asked at once if a node fails, and soon if a node does not answer.
                done, _ = await asyncio.wait(asked, timeout=_NEXT_S if left else None, return_when=_FIRST)
                for each in done:
                    answering = asked.pop(each)
                    if (failure := each.exception()) is not None:
                        problem = failure
                    elif reply := each.result():
                        self.use(reply, answering)
                        return
        finally:
            for each in asked:
                each.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        raise LedgerUnavailable(f"no node of the cluster says where its slots are ({problem})") from problem

    async def _slots_by(self, address: Address) -> list[Any]:
        async with asyncio.timeout(_ASK_S):
            return await _ask(self.client(address), "CLUSTER", "SLOTS")

    async def place_of(self, slot: int | None) -> Address:
        """Return the node that has a slot; for None, any primary. Errors: RedisCannotServe; LedgerUnavailable."""
        place = self._any_place() if slot is None else self._places[slot]
        if place is None:
            await self.refresh()
            place = self._any_place() if slot is None else self._places[slot]
        if place is None:
            raise RedisCannotServe(f"Redis cannot serve now: no node of the cluster has slot {slot}")
        return place

    def known_place_of(self, slot: int) -> Address | None:
        """Return the node that had a slot at the last refresh or redirect."""
        return self._places[slot]

    def _any_place(self) -> Address | None:
        return self._ranges[0].primary if self._ranges else None

    async def follow(
        self, command: Command, send: Callable[[Address, bool], Awaitable[T]], *, at: str | None = None
    ) -> T:
        """Send a command to the node that has its key, or the key `at`, and follow that key if it has moved.

        `send(address, is_asking)` sends the command to a node, with ASKING first if `is_asking`, and raises an error
        reply. Errors: those of `send`; RedisCannotServe if the key is not found: nothing was done.
        """
        key = key_of(command) if at is None else at
        slot = None if key is None else slot_of(key)
        place, is_asking = await self.place_of(slot), False
        hops, ends_at = 0, asyncio.get_running_loop().time() + _FOLLOW_S
        while True:
            try:
                return await send(place, is_asking)
            except (AskError, TryAgainError) as exc:
                problem = exc
            except (LedgerUnavailable, RedisConnectionError, ClusterDownError, OSError, TimeoutError):
                self.refresh_soon()
                raise
            hops += 1
            if asyncio.get_running_loop().time() >= ends_at:
                raise RedisCannotServe(f"Redis cannot serve now: a key is being moved ({problem})") from problem
            if isinstance(problem, TryAgainError) or hops > _HOPS_AT_ONCE:
                await asyncio.sleep(_PAUSE_S)
            place, is_asking = self._redirected(problem, place)

    def _redirected(self, problem: AskError | TryAgainError, place: Address) -> tuple[Address, bool]:
        """Return the node to which a refusal redirects, and whether only for this command."""
        if isinstance(problem, TryAgainError):
            return place, False
        host, port = cast("tuple[str, int]", problem.node_addr)
        target = Address(host or place.host, port)
        if isinstance(problem, MovedError):
            self._move(problem.slot_id, target)
            return target, False
        return target, True

    def note_problem(self, problem: Exception) -> None:
        """Apply a redirect that was received elsewhere; for other errors, read again where the slots are."""
        if isinstance(problem, MovedError) and (address := cast("tuple[str, int]", problem.node_addr))[0]:
            self._move(problem.slot_id, Address(*address))
        else:
            self.refresh_soon()

    def _move(self, slot: int, target: Address) -> None:
        if self._places[slot] != target:
            self._places[slot] = target
            _log.debug("cluster.slot_moved", slot=slot, node=str(target))
            self.refresh_soon()

    async def aclose(self) -> None:
        """Close all clients, also those that are opened meanwhile for commands still on their way."""
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.gather(self._refreshing, return_exceptions=True)
        while self._clients:
            _, client = self._clients.popitem()
            await client.aclose()


async def ask_on(client: Redis, command: Command, options: dict[str, Any], *, is_asking: bool) -> Any:
    """Send a command to one node; with `is_asking`, send ASKING before it on the same connection."""
    if not is_asking:
        return await _ask(client, *command, **options)
    async with client.pipeline(transaction=False) as pipeline:
        pipeline.execute_command("ASKING")  # pyright: ignore[reportUnknownMemberType]
        pipeline.execute_command(*command, **options)  # pyright: ignore[reportUnknownMemberType]
        _, reply = await pipeline.execute(raise_on_error=False)
    if isinstance(reply, Exception):
        raise reply
    return reply


async def _ask(client: Redis, *command: Any, **options: Any) -> Any:
    return await client.execute_command(*command, **options)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def _range(row: Sequence[Any], asked: Address) -> SlotRange:
    first, last, primary, *replicas = row
    return SlotRange(
        int(first), int(last), _address(primary, asked), tuple(_address(replica, asked) for replica in replicas)
    )


def _address(node: Sequence[Any], asked: Address) -> Address:
    host = node[0].decode() if isinstance(node[0], bytes) else node[0]
    # A node that does not know its own name is reached at the address that was asked; see CLUSTER SLOTS.
    return Address(asked.host if host in (None, "", "?") else host, int(node[1]))
