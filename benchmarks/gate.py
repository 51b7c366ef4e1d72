"""Gate: reserve + settle, compared with two plain XADDs of the same size, every write synced to disk.

Both sides use the same client with the same concurrency: redis-py's asyncio client with a
connection for each task, and Tollbook's own pipeline, which sends commands in batches.
"""

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final, cast
from urllib.parse import urlsplit

from redis.asyncio import Redis

from benchmarks.load import HASH_STAMP, RECORDED, RESERVED, reserve_request, settle_request, user_of
from benchmarks.load import now_ms as clock_ms
from benchmarks.measure import Result, Sizes, Target, compare, in_turn
from tests.cluster_servers import cluster_servers
from tollbook.ledger.gate.functions import load_library
from tollbook.ledger.gate.gate import Gate, create_ledger
from tollbook.ledger.gate.requests import EMPTY_BASELINE, Reserved, Settled
from tollbook.ledger.keys import Keys
from tollbook.ledger.server.connection import connect
from tollbook.ledger.server.embedded import EmbeddedServer
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.ledger.server.replication import Replication
from tollbook.schemas.identifiers import month_at

TASKS = 50
_USERS = 1_000
# Numbers of budgets of a call, in the comparison by budgets.
_FURTHER = (2, 4)
_POLL_S: Final = 0.1
# The gate stamps these in front of the two payloads.
_STAMPS = (
    f'"hold":1,"cap_nanousd":40000000000,"deadline_ms":1795000000000,{HASH_STAMP},',
    '"hold":1,"hold_nanousd":31000000,',
)


class PlainClient:
    """redis-py's own client, with the pipeline's interface."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def execute(self, *command: Any) -> Any:
        return await self._redis.execute_command(*command)


class Pairs:
    """Both sides over one client. `name` keeps its calls apart from those of another."""

    def __init__(
        self,
        name: str,
        gate: Gate,
        xadd: Callable[[str, dict[str, str]], Awaitable[Any]],
        pairs: int,
        *,
        budgets: int = 1,
    ) -> None:
        self._budgets = budgets
        self._name = name
        self._gate = gate
        self._xadd = xadd
        self._pairs = pairs
        self._run = 0
        self._window = month_at(clock_ms())

    async def gate(self) -> float:
        return await self._rate(self._reserve_and_settle)

    async def plain(self) -> float:
        return await self._rate(self._two_xadds)

    async def _rate(self, pair: Callable[[int], Awaitable[None]]) -> float:
        self._run += 1
        numbers = iter(range(self._pairs))

        async def work() -> None:
            for n in numbers:
                await pair(n)

        started = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(TASKS)))
        return self._pairs / (time.perf_counter() - started)

    async def _reserve_and_settle(self, n: int) -> None:
        call = f"{self._name}-{self._run}-{n}"
        request = reserve_request(call, user_of(n % _USERS), self._window, n, budgets=self._budgets)
        reserved = await self._gate.reserve(request, (EMPTY_BASELINE,) * self._budgets)
        if not isinstance(reserved, Reserved):
            raise TypeError(f"not reserved: {reserved}")
        settled = await self._gate.settle(settle_request(request, reserved, n))
        if not isinstance(settled, Settled):
            raise TypeError(f"not settled: {settled}")

    async def _two_xadds(self, n: int) -> None:
        user, call = user_of(n % _USERS), f"{self._name}-{self._run}-{n}"
        await self._xadd("plain", self._event("budget-reserved", user, call, 31_000_000, RESERVED.format(n=n), 0))
        await self._xadd("plain", self._event("cost-recorded", user, call, 1_734_000, RECORDED, 1))

    def _event(self, kind: str, user: str, call: str, amount: int, payload: str, stamp: int) -> dict[str, str]:
        return {
            "type": kind,
            "v": "2",
            "seq": "123456",
            "user_id": user,
            "period": self._window.name,
            "call_id": call,
            "attempt": "1",
            "amount": str(amount),
            "committed": "31000000",
            "payload": "{" + _STAMPS[stamp] + payload[1:],
        }


async def run(directory: Path, sizes: Sizes) -> list[Result]:
    pairs, rounds = sizes.of(8_000, 300), sizes.of(7, 2)
    async with EmbeddedServer(directory, fsync="always") as server, Redis.from_url(server.url) as redis:
        await load_library(redis)
        pipeline = CommandPipeline(redis)
        keys = Keys("bench")
        await create_ledger(pipeline, keys, ledger_id=(ledger_id := str(uuid.uuid4())), partitions=1)

        def gate_over(client: Any) -> Gate:
            return Gate(
                cast("CommandPipeline", client), keys, ledger_id, idempotency_ttl_s=3_000_000, result_ttl_s=600_000
            )

        async def xadd_piped(stream: str, fields: dict[str, str]) -> Any:
            return await pipeline.execute("XADD", stream, "*", *(part for pair in fields.items() for part in pair))

        async def xadd_plain(stream: str, fields: dict[str, str]) -> Any:
            return await redis.xadd(stream, cast("Any", fields))

        plain = Pairs("plain", gate_over(PlainClient(redis)), xadd_plain, pairs)
        piped = Pairs("piped", gate_over(pipeline), xadd_piped, pairs)
        several = [Pairs(f"of-{n}", gate_over(pipeline), xadd_piped, pairs, budgets=n) for n in _FURTHER]
        await in_turn(1, plain.gate, plain.plain, piped.gate, piped.plain, *(each.gate for each in several))
        await redis.config_resetstat()
        a, b = await in_turn(rounds, plain.gate, plain.plain)
        usec = await _usec_per_call(redis)
        c, d = await in_turn(rounds, piped.gate, piped.plain)
        of_one, *of_several = await in_turn(rounds, piped.gate, *(each.gate for each in several))
        await pipeline.aclose()
    return [
        compare(
            "gate",
            f"reserve+settle against 2 XADD, redis-py client, {TASKS} tasks",
            a,
            b,
            unit="pairs/s",
            target=Target(">=", 0.8),
            server_usec_per_call=usec,
        ),
        compare("gate", f"the same over Tollbook's pipeline, {TASKS} tasks", c, d, unit="pairs/s"),
        *(
            compare("gate", f"with {n} budgets a call against one, over the pipeline", figures, of_one, unit="pairs/s")
            for n, figures in zip(_FURTHER, of_several, strict=True)
        ),
        *await _with_a_replica(directory, sizes),
        await _on_a_cluster(directory, sizes),
    ]


async def _with_a_replica(directory: Path, sizes: Sizes) -> list[Result]:
    """Measure the cost of waiting for a replica, against the same pipeline that does not wait."""
    pairs, rounds = sizes.of(8_000, 300), sizes.of(5, 2)
    async with (
        EmbeddedServer(directory / "primary", fsync="always") as primary,
        EmbeddedServer(directory / "replica", fsync="always") as replica,
        Redis.from_url(primary.url) as redis,
        Redis.from_url(replica.url) as follower,
    ):
        await load_library(redis)
        await _follow(follower, primary.url)
        keys = Keys("bench")
        without = CommandPipeline(redis)
        await create_ledger(without, keys, ledger_id=(ledger_id := str(uuid.uuid4())), partitions=1)

        def pairs_over(name: str, pipeline: CommandPipeline) -> Pairs:
            gate = Gate(pipeline, keys, ledger_id, idempotency_ttl_s=3_000_000, result_ttl_s=600_000)
            return Pairs(name, gate, cast("Any", redis.xadd), pairs)

        unconfirmed = pairs_over("without", without)
        kinds = {"the replica": Replication(1, mark=keys.mark)}
        kinds["the replica's disk"] = Replication(1, is_on_disk=True, mark=keys.mark)
        results = list[Result]()
        for waited_for, replication in kinds.items():
            waiting = CommandPipeline(redis, replication=replication)
            confirmed = pairs_over(waited_for, waiting)
            await in_turn(1, confirmed.gate, unconfirmed.gate)
            a, b = await in_turn(rounds, confirmed.gate, unconfirmed.gate)
            await waiting.aclose()
            what = f"reserve+settle that wait for {waited_for} against those that do not, {TASKS} tasks"
            results.append(compare("gate", what, a, b, unit="pairs/s"))
        await without.aclose()
        return results


async def _on_a_cluster(directory: Path, sizes: Sizes) -> Result:
    """Compare the pipeline over a node that has every slot of a cluster with the same pipeline over one server."""
    pairs, rounds = sizes.of(8_000, 300), sizes.of(7, 2)
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(EmbeddedServer(directory / "one", fsync="always"))
        cluster = await stack.enter_async_context(cluster_servers(directory / "nodes", primaries=1, fsync="always"))
        sides = list[Pairs]()
        for url in (cluster.url, server.url):
            redis = await stack.enter_async_context(connect(url))
            await load_library(redis)
            pipeline = CommandPipeline(redis)
            stack.push_async_callback(pipeline.aclose)
            keys = Keys("bench")
            await create_ledger(pipeline, keys, ledger_id=(ledger_id := str(uuid.uuid4())), partitions=1)
            gate = Gate(pipeline, keys, ledger_id, idempotency_ttl_s=3_000_000, result_ttl_s=600_000)
            sides.append(Pairs("pairs", gate, cast("Any", redis.xadd), pairs))
        on_cluster, on_server = sides
        await in_turn(1, on_cluster.gate, on_server.gate)
        a, b = await in_turn(rounds, on_cluster.gate, on_server.gate)
    what = f"reserve+settle on a node of a cluster against one server, over the pipeline, {TASKS} tasks"
    return compare("gate", what, a, b, unit="pairs/s", target=Target(">=", 0.95))


async def _follow(replica: Redis, primary_url: str) -> None:
    """Make a server the primary's replica; return when it is in sync."""
    primary = urlsplit(primary_url)
    await replica.config_set("masterauth", primary.password or "")
    await replica.execute_command("REPLICAOF", primary.hostname, primary.port)
    info: dict[str, Any] = {}
    while info.get("master_link_status") != "up":
        await asyncio.sleep(_POLL_S)
        info = await replica.info("replication")


async def _usec_per_call(redis: Redis) -> dict[str, float]:
    """Return the server's own figure for a command's time, without network and sync."""
    stats: dict[str, Any] = await redis.info("commandstats")
    return {name: stats[f"cmdstat_{name}"]["usec_per_call"] for name in ("fcall", "xadd")}
