"""What reads and listens on a cluster: it finds the right node, also after a partition has moved."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.cluster_servers import ClusterServers, Node, cluster_servers
from tests.gate_bench import PERIOD
from tollbook.inference.delta_reader import read_along
from tollbook.inference.task_deltas import DeltaStream
from tollbook.ledger.gate.functions import load_library
from tollbook.ledger.gate.gate import Gate, create_ledger
from tollbook.ledger.gate.ledger import Ledger
from tollbook.ledger.keys import Keys
from tollbook.ledger.results import Results
from tollbook.ledger.server.connection import ServerClient, connect
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.ledger.server.servers import place_of, primaries, read_together, server_of
from tollbook.ledger.stream import StreamReader
from tollbook.schemas.results import InferenceResult, TaskStatus

pytestmark = pytest.mark.slow
KEYS = Keys()


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[ClusterServers]:
    async with cluster_servers(tmp_path / "cluster") as servers:
        yield servers


@pytest.fixture
async def client(cluster: ClusterServers) -> AsyncIterator[ServerClient]:
    async with connect(cluster.url) as redis:
        yield redis


@pytest.fixture
async def pipeline(client: ServerClient) -> AsyncIterator[CommandPipeline]:
    pipeline = CommandPipeline(client)
    yield pipeline
    await pipeline.aclose()


async def other_than(cluster: ClusterServers, key: str) -> Node:
    owner = await cluster.owner(key)
    return next(node for node in cluster.nodes if node is not owner)


async def test_the_functions_are_loaded_into_every_primary_and_into_a_new_one_when_needed(
    cluster: ClusterServers, client: ServerClient, pipeline: CommandPipeline
) -> None:
    await load_library(client)
    for node in cluster.nodes:
        assert await node.ask("FUNCTION", "LIST")
    state = await create_ledger(pipeline, KEYS, ledger_id="a ledger", partitions=1)
    gate = Gate(pipeline, KEYS, state.ledger_id, idempotency_ttl_s=60, result_ttl_s=60)
    ledger = Ledger(client, [gate], [])
    await ledger.probe(0)

    node = await cluster.add_node()
    assert not await node.ask("FUNCTION", "LIST")
    await cluster.move(KEYS.meta, node)
    await ledger.probe(0)
    assert (await ledger.account("user", PERIOD)).plan is None
    assert await node.ask("FUNCTION", "LIST")


async def test_a_reader_that_waits_follows_its_partition(
    cluster: ClusterServers, client: ServerClient, pipeline: CommandPipeline
) -> None:
    reader = StreamReader(client, KEYS)
    first = await pipeline.execute("XADD", KEYS.ledger, "*", "a", "1")
    batch = await reader.read_after(count=10)
    assert [entry[0] for entry in batch.entries] == [first]
    waiting = asyncio.create_task(reader.read_after(batch.last_id, count=10, block_ms=60_000))
    await cluster.move(KEYS.meta, await other_than(cluster, KEYS.meta))
    second = await pipeline.execute("XADD", KEYS.ledger, "*", "a", "2")
    assert [entry[0] for entry in (await waiting).entries] == [second]
    await reader.aclose()


async def test_reads_and_scans_follow_a_moved_partition(
    cluster: ClusterServers, client: ServerClient, pipeline: CommandPipeline
) -> None:
    tails = {KEYS.tail(f"user:{number}").encode() for number in range(50)}
    await asyncio.gather(*(pipeline.execute("RPUSH", tail, "1") for tail in tails))
    commands = [("LLEN", KEYS.tail("user:1")), ("EXISTS", KEYS.tail("user:2"), KEYS.tail("user:3"))]
    for is_moved in (False, True):
        if is_moved:
            await cluster.move(KEYS.meta, await other_than(cluster, KEYS.meta))
        for is_one_moment in (False, True):
            assert await read_together(client, KEYS.meta, commands, is_one_moment=is_one_moment) == [1, 2]
        assert {key async for key in client.scan_iter(match=KEYS.tail_pattern)} == tails
        owner = await cluster.owner(KEYS.meta)
        assert place_of(await server_of(client, KEYS.meta)) == f"127.0.0.1:{owner.port}"
    assert len(await primaries(client)) == 3


async def test_the_time_is_that_of_the_partitions_node(
    cluster: ClusterServers, client: ServerClient, pipeline: CommandPipeline
) -> None:
    owner = await cluster.owner(KEYS.meta)
    before = (await owner.info("commandstats")).get("cmdstat_time", {}).get("calls", 0)
    assert abs(await pipeline.now_ms(KEYS.meta) - time.time() * 1000) < 60_000
    assert (await owner.info("commandstats"))["cmdstat_time"]["calls"] == before + 1


async def test_what_is_announced_at_one_node_is_heard_at_all(
    cluster: ClusterServers, client: ServerClient, pipeline: CommandPipeline
) -> None:
    assert await pipeline.execute("PING")
    listeners = [client.pubsub() for _ in cluster.nodes]  # Each at another node.
    for listener in listeners:
        await listener.subscribe(KEYS.waiters)
        assert (await listener.get_message(timeout=30) or {})["type"] == "subscribe"
    assert await client.ping()
    await pipeline.execute("PUBLISH", KEYS.waiters, "a budget")
    for listener in listeners:
        assert (await listener.get_message(timeout=30) or {})["data"] == b"a budget"
        await listener.aclose()


async def test_streamed_answers_are_read_from_any_partition(client: ServerClient, pipeline: CommandPipeline) -> None:
    results = Results(client, pipeline, namespace="tollbook", partitions=6, ttl_s=60, id_ttl_s=60)
    for user in ("ann", "bob", "cem"):
        task = f"task-of-{user}"
        stream = DeltaStream(pipeline, results.deltas_key(task, user))
        reading = read_along(client, results, results.deltas_keys(task), task, timeout_s=60)
        first = asyncio.ensure_future(anext(reading))
        await stream.take({"choices": [{"index": 0, "delta": {"content": "hello"}, "finish_reason": None}]})
        assert (await first).text == "hello"
        await results.put(InferenceResult(task_id=task, status=TaskStatus.FAILED, user_id=user))
        await stream.end("failed")
        assert [update.kind async for update in reading] == ["result"]
