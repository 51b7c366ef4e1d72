"""The whole system on a Valkey Cluster: bursts, a killed primary, partitions that move while calls run."""

import asyncio
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
from redis.exceptions import ClusterDownError
from redis.exceptions import ConnectionError as RedisConnectionError

from tests.cluster_servers import ClusterServers, Node, cluster_servers
from tests.proxy import faulty_proxy
from tests.servers import wait_until
from tests.system import REPLIES, Finished, GatedStandIn, RunningSystem, run_cli, running_system
from tollbook.inference.setting_tables import ConcurrencyTable
from tollbook.ledger.errors import LedgerUnavailable
from tollbook.ledger.keys import Keys
from tollbook.ledger.server.connection import connect
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.ledger.server.refusals import explain
from tollbook.schemas.results import InferenceResult, TaskStatus
from tollbook.standin import StandInConfig

PARTITIONS: Final = 6
CONCURRENCY: Final = ConcurrencyTable(default=50)


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[ClusterServers]:
    async with cluster_servers(tmp_path / "cluster") as servers:
        yield servers


def make_tasks(number: int, *, users: int = 20, first: int = 0) -> list[dict[str, str]]:
    return [
        {
            "task": "score_post",
            "task_id": f"task-{n:04}",
            "user_id": f"user-{n % users}",
            "prompt": f"post {n:04} [[completion_tokens=100]]",
            "max_tokens": "100",
            "reply_to": REPLIES,
        }
        for n in range(first, first + number)
    ]


async def publish_and_wait(running: RunningSystem, tasks: Sequence[dict[str, str]]) -> list[InferenceResult]:
    await publish(running, tasks)
    return await running.answers((task["task_id"] for task in tasks), timeout_s=180)


async def publish(running: RunningSystem, tasks: Sequence[dict[str, str]]) -> None:
    streams = tuple(running.system.runtime.rules.streams)
    add = running.system.handle.pipeline.execute
    await asyncio.gather(
        *(
            add("XADD", streams[number % len(streams)], "*", *(part for field in task.items() for part in field))
            for number, task in enumerate(tasks)
        )
    )


async def assert_sound(running: RunningSystem, tasks: Sequence[dict[str, str]], results: Sequence[Any]) -> None:
    """Every task has one result, every hold one settlement, no cap was passed (G1, G2, G4)."""
    assert {result.status for result in results} == {TaskStatus.DONE}
    calls = Counter(row["call_id"] for row in await running.query("SELECT call_id FROM events WHERE kind = 'hold'"))
    assert calls == Counter(task["task_id"] for task in tasks)
    assert await running.query("FROM discrepancies") == []
    assert await running.query("SELECT id FROM events WHERE type = 'budget-reserved' AND committed_usd > cap_usd") == []


async def can_read(running: RunningSystem) -> bool:
    """Whether every partition is reached. If a node is lost, the first command to it fails."""
    try:
        await asyncio.gather(*(running.redis.xlen(keys.ledger) for keys in running.system.handle.keys))
    except (LedgerUnavailable, RedisConnectionError, ClusterDownError):
        return False
    return True


async def answers_in_the_end(running: RunningSystem, tasks: Sequence[dict[str, str]]) -> list[InferenceResult]:
    """Wait for answers with a client that repeats its reads, as its user must."""
    while True:
        try:
            return await running.answers((task["task_id"] for task in tasks), timeout_s=180)
        except (LedgerUnavailable, RedisConnectionError, ClusterDownError):
            await wait_until(lambda: can_read(running), what="nodes that are reached")


async def verify(running: RunningSystem, cwd: Path) -> Finished:
    return await cli(running, cwd, "verify")


async def cli(running: RunningSystem, cwd: Path, *arguments: str) -> Finished:
    settings = running.system.runtime.settings
    env = {
        "REDIS_URL": running.system.redis_url,
        "TOLLBOOK_DATA_DIR": str(settings.data_dir),
        "TOLLBOOK_PARTITIONS": str(PARTITIONS),
        "TOLLBOOK_ALLOW_UNSYNCED": "1",
        "TOLLBOOK_MIN_REPLICAS": str(settings.min_replicas),
    }
    return await run_cli(*arguments, cwd=cwd, env=env)


@pytest.mark.slow
async def test_a_burst_on_three_nodes_gives_each_task_one_result(cluster: ClusterServers, tmp_path: Path) -> None:
    tasks = make_tasks(300)
    async with running_system(
        tmp_path / "data", cluster.url, workers=2, partitions=PARTITIONS, concurrency=CONCURRENCY, allow_unsynced=True,
        provider=GatedStandIn(StandInConfig(latency_ms=5)),
    ) as running:  # fmt: skip
        results = await publish_and_wait(running, tasks)
        await assert_sound(running, tasks, results)
        assert running.provider.requests == len(tasks)
        nodes = {(await cluster.owner(keys.meta)).port for keys in running.system.handle.keys}
        assert len(nodes) > 1, "the partitions are spread over nodes"
        verified = await verify(running, tmp_path)
        assert verified.code == 0, verified.stdout + verified.stderr


@asynccontextmanager
async def running_with_replicas(tmp_path: Path, **settings: Any) -> AsyncIterator[tuple[ClusterServers, RunningSystem]]:
    """A system on three primaries with a replica each."""
    async with (
        cluster_servers(tmp_path / "cluster", replicas=3) as cluster,
        running_system(
            tmp_path / "data", cluster.url, partitions=PARTITIONS, concurrency=CONCURRENCY, allow_unsynced=True,
            claim_after_s=10.0, provider=GatedStandIn(StandInConfig(latency_ms=100)), **settings,
        ) as running,
    ):  # fmt: skip
        yield cluster, running


async def assert_nothing_lost(running: RunningSystem, tasks: Sequence[dict[str, str]], tmp_path: Path) -> None:
    results = await answers_in_the_end(running, tasks)
    await wait_until(lambda: can_read(running), what="a test's client that knows the new node")
    await assert_sound(running, tasks, results)
    assert running.provider.requests == len(tasks), "nothing was bought twice"
    verified = await verify(running, tmp_path)
    assert verified.code == 0, verified.stdout + verified.stderr


@pytest.mark.slow
async def test_a_killed_primary_costs_no_task_and_no_money(tmp_path: Path) -> None:
    tasks = make_tasks(300)
    async with running_with_replicas(tmp_path) as (cluster, running):
        await publish(running, tasks)
        await wait_until(lambda: running.provider.requests > 50, what="calls on their way")
        await cluster.fail_over(await cluster.owner(running.keys.meta))
        await assert_nothing_lost(running, tasks, tmp_path)


@pytest.mark.slow
async def test_a_dead_primary_loses_no_write_that_its_replica_confirmed(tmp_path: Path) -> None:
    """Without a pause before its death. Its partitions wait until it is back as a replica; the others go on."""
    tasks = make_tasks(300)
    async with running_with_replicas(tmp_path, min_replicas=1) as (cluster, running):
        await publish(running, tasks)
        await wait_until(lambda: running.provider.requests > 50, what="calls on their way")
        primary = await cluster.owner(running.keys.meta)
        replica = await cluster.replica_of(primary)
        primary.kill()
        await cluster.promoted(replica)
        lonely = [keys for keys in running.system.handle.keys if await cluster.owner(keys.meta) is replica]
        pipeline = running.system.handle.pipeline
        await wait_until(lambda: pipeline.unconfirmed_at(lonely[0].meta) is not None, what="writes without a replica")
        others = [keys for keys in running.system.handle.keys if keys not in lonely]
        assert others, "other primaries have partitions"
        assert all(pipeline.unconfirmed_at(keys.meta) is None for keys in others)
        primary.start_again()
        await assert_nothing_lost(running, tasks, tmp_path)


@pytest.mark.slow
async def test_doctor_asks_the_replicas_of_each_primary(tmp_path: Path) -> None:
    async with running_with_replicas(tmp_path, min_replicas=1) as (cluster, running):

        async def found() -> dict[str, str]:
            doctor = await cli(running, tmp_path, "doctor", "--json")
            assert [each for each in doctor.json() if each["check"] == "redis" and each["state"] != "ok"] == []
            return {each["found"]: each["state"] for each in doctor.json() if each["check"] == "replicas"}

        nodes = {f"127.0.0.1:{(await cluster.owner(keys.meta)).port}" for keys in running.system.handle.keys}
        assert await found() == {f"{node}: 1 replica had a write when asked": "ok" for node in nodes}
        lonely = await cluster.owner(running.keys.meta)
        (await cluster.replica_of(lonely)).kill()
        failed = [text for text, state in (await found()).items() if state == "failed"]
        assert len(failed) == 1
        assert failed[0].startswith(f"127.0.0.1:{lonely.port}: 0 of the 1 replicas")


@pytest.mark.slow
async def test_a_burst_outlives_a_cut_link_a_dead_primary_and_a_move_at_once(tmp_path: Path) -> None:
    """The promoted replica lacks what was written behind its cut link, but no process used that (G1, G3, G4)."""
    tasks = make_tasks(300)
    async with running_with_replicas(tmp_path, min_replicas=1) as (cluster, running):
        primary = await cluster.owner(running.keys.meta)
        owners = {keys: await cluster.owner(keys.meta) for keys in running.system.handle.keys}
        lonely = [keys for keys, owner in owners.items() if owner is primary]
        moving, source = next((keys, owner) for keys, owner in owners.items() if owner is not primary)
        target = next(node for node in cluster.nodes[:3] if node not in (primary, source))
        async with faulty_proxy(primary.url) as link:
            replica = await cluster.replicate_over(link.url, primary)
            await running.provider.shut()
            await publish(running, tasks)
            await wait_until(lambda: running.provider.arrived.total() > 50, what="calls on their way")
            await cluster.move(moving.meta, target)
            await link.stop()
            before = await event_ids(primary, lonely)
            await running.provider.open()

            async def has_more() -> bool:
                return len(await event_ids(primary, lonely)) > len(before)

            await wait_until(has_more, what="events behind the cut link")
            written = await event_ids(primary, lonely)
            primary.kill()
        await cluster.promoted(replica)
        assert written - await event_ids(replica, lonely), "nothing was lost with the primary, so nothing is shown"
        primary.start_again()
        await assert_nothing_lost(running, tasks, tmp_path)


async def event_ids(node: Node, partitions: Sequence[Keys]) -> set[tuple[int, bytes]]:
    """Return what a node has on these partitions' ledgers."""
    found = set[tuple[int, bytes]]()
    for keys in partitions:
        entries: Any = await node.client.xrange(keys.ledger)
        found |= {(keys.partition, entry_id) for entry_id, _ in entries}
    return found


@pytest.mark.slow
async def test_partitions_move_to_a_new_node_while_calls_run(cluster: ClusterServers, tmp_path: Path) -> None:
    async with running_system(
        tmp_path / "data", cluster.url, partitions=PARTITIONS, concurrency=CONCURRENCY, allow_unsynced=True,
        provider=GatedStandIn(StandInConfig(latency_ms=20)),
    ) as running:  # fmt: skip
        # It has no slot yet, and not the gate's functions.
        node = await cluster.add_node()
        tasks, results, has_moved = list[dict[str, str]](), list[InferenceResult](), asyncio.Event()

        async def work() -> None:
            while not has_moved.is_set():
                some = make_tasks(40, first=len(tasks))
                tasks.extend(some)
                results.extend(await publish_and_wait(running, some))

        working = asyncio.create_task(work())
        await wait_until(lambda: running.provider.requests > 50, what="calls on their way")
        for keys in running.system.handle.keys[:3]:
            await cluster.move(keys.meta, node)
        for key in ("analysis", REPLIES, "tollbook:dead-letters", "tollbook:projector"):
            await cluster.move(key, node)
        before = running.provider.requests
        await wait_until(lambda: running.provider.requests > before + 50 or working.done(), what="calls afterwards")
        has_moved.set()
        await working
        await assert_sound(running, tasks, results)
        assert running.provider.requests == len(tasks), "nothing was bought twice"
        verified = await verify(running, tmp_path)
        assert verified.code == 0, verified.stdout + verified.stderr


REASON: Final = ("--reason", "a test")
COMMANDS: Final[tuple[tuple[str, ...], ...]] = (
    ("url",),
    ("spend",),
    ("doctor",),
    ("verify",),
    ("replay", "--into", "replayed.duckdb"),
    ("audit", "user", "user-1"),
    ("audit", "call", "task-0001"),
    ("keys", "create", "--user", "user-1"),
    ("keys", "list"),
    ("credit", "grant", "user-1", "2", *REASON),
    ("credit", "list"),
    ("plan", "set", "user-2", "growth", *REASON, "--yes"),
    ("plan", "show", "user-2"),
    ("policy", "apply", "new.toml", *REASON),
    ("policy", "history"),
    ("top", "--once"),
    ("recover",),
    ("dead-letters", "list"),
    ("dead-letters", "drop", "--all", "--yes"),
    ("publish", "analysis", "score_post", "hello", "--user", "user-3", "--wait", "30"),
    ("result", "task-0001"),
    ("ping",),
    ("sql", "SELECT count(*) FROM events"),
    ("alerts", "list"),
    ("what-if", "--cap", "starter=1"),
    ("reconcile",),
    ("report", "--html", "report.html"),
    ("verify",),
    ("doctor",),
)


@pytest.mark.slow
async def test_every_command_works_on_a_cluster(cluster: ClusterServers, tmp_path: Path) -> None:
    (tmp_path / "new.toml").write_text("[plans.growth]\ncap_usd = 20\n")
    (tmp_path / "crossing.toml").write_text(
        '[[budgets]]\nname = "teams"\nby = ["team"]\nwindow = "week"\ncap_usd = 20\n'
    )
    async with running_system(
        tmp_path / "data", cluster.url, partitions=PARTITIONS, concurrency=CONCURRENCY, allow_unsynced=True
    ) as running:
        await publish_and_wait(running, make_tasks(40))
        await running.publish("analysis", [{"task": "nonsense", "prompt": "a task that no worker can read"}])
        await wait_until(running.dead_letters, what="a dead letter")
        finished = {command: await cli(running, tmp_path, *command) for command in COMMANDS}
        assert {command: each for command, each in finished.items() if each.code} == {}

        shown = (await cli(running, tmp_path, "partitions", "--json")).json()
        owners = [await cluster.owner(keys.meta) for keys in running.system.handle.keys]
        assert [row["node"] for row in shown] == [f"127.0.0.1:{owner.port}" for owner in owners]
        assert sum(row["events"] for row in shown) == len(await running.query("FROM events"))
        assert {row["lag_events"] for row in shown} == {0}

        # Its users would lie in several partitions, and no step can compare it with its cap.
        refused = await cli(running, tmp_path, "policy", "apply", "crossing.toml", *REASON)
        assert refused.code != 0
        assert f"{PARTITIONS} partitions" in refused.stderr + refused.stdout


async def test_a_node_is_recognised_and_its_socket_and_other_databases_are_refused(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as short:  # A socket's path may have 107 bytes.
        socket = Path(short) / "s"
        async with cluster_servers(tmp_path, primaries=1, unixsocket=str(socket)) as servers:
            for url, problem in (
                (f"unix://{socket}?db=0", "over a socket"),
                (servers.nodes[0].url.removesuffix("0") + "3", "a cluster has only 0"),
            ):
                async with connect(url) as redis:
                    pipeline = CommandPipeline(redis)
                    with pytest.raises(LedgerUnavailable) as refused:
                        await pipeline.execute("PING")
                    assert problem in explain(refused.value)
                    await pipeline.aclose()
