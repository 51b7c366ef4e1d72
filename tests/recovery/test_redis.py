"""Redis dies, loses connections, is emptied, goes back in time or cannot write (G3, G4, G8)."""

import asyncio
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import pytest
from redis.asyncio import Redis

from tests.proxy import faulty_proxy
from tests.recovery.books import check_books, events_of, is_at_rest
from tests.servers import PATIENCE_S, wait_until
from tests.system import STREAMS, RunningSystem, running_system
from tollbook.app.processes import open_system
from tollbook.inference.calls.call import Call, RunId
from tollbook.ledger.errors import LedgerAhead, LedgerRefused, LedgerReplaced, LedgerUnavailable
from tollbook.ledger.projection.follower import LedgerRewritten
from tollbook.ledger.server.connection import connect
from tollbook.ledger.server.embedded import EmbeddedServer
from tollbook.schemas.events import BudgetReserved, CostAdjusted, CostRecorded
from tollbook.schemas.results import TaskStatus
from tollbook.schemas.tasks import Task

STREAM: Final = "analysis"
USERS: Final = ("u1", "u2", "u3")


async def publish(redis_url: str, name: str, number: int) -> list[str]:
    """Publish so many tasks of every user."""
    task_ids = list[str]()
    async with connect(redis_url) as redis, redis.pipeline(transaction=False) as pipe:
        for n in range(number):
            for user in USERS:
                task_ids.append(f"{name}-{user}-{n}")
                task = {"task": "score_post", "task_id": task_ids[-1], "user_id": user, "prompt": "a post"}
                pipe.xadd(STREAM, task)  # pyright: ignore[reportArgumentType]
        await pipe.execute()
    return task_ids


async def become_done(running: RunningSystem, task_ids: Sequence[str]) -> None:
    async def are_done() -> bool:
        with suppress(LedgerUnavailable):
            results = [await running.system.handle.results.get(task_id) for task_id in task_ids]
            return all(result is not None and result.status is TaskStatus.DONE for result in results)
        return False

    await wait_until(are_done, what="a completion of every task")


async def check_once(running: RunningSystem, directory: Path, tasks: int) -> None:
    """Each task was held for, called and settled once, and the ledger has to the nano-dollar what the provider took."""
    await is_at_rest(running)
    await check_books(running, directory)
    spent, holds = Counter[str](), Counter[str]()
    for event in await events_of(running):
        match event.payload:
            case CostRecorded() | CostAdjusted():
                spent[event.user_id] += event.amount
            case BudgetReserved():
                holds[event.call_id] += 1
            case _:
                pass
    assert (len(holds), set(holds.values())) == (tasks, {1})
    assert running.provider.requests == tasks
    assert spent == running.provider.book.totals()


@pytest.mark.slow
async def test_redis_is_restarted_under_load(private_server: EmbeddedServer, tmp_path: Path) -> None:
    async with running_system(tmp_path / "data", private_server.url, workers=2) as running:
        task_ids: list[str] = []
        for restart in range(3):
            task_ids += await publish(private_server.url, f"r{restart}", 20)
            await running.provider.wait_for_arrivals(20 * restart + 5, user="u1")
            await private_server.kill()
            await private_server.start()
        await become_done(running, task_ids)
        await check_once(running, tmp_path, len(task_ids))


@pytest.mark.slow
async def test_replies_are_lost_under_load(redis_client: Redis, server_url: str, tmp_path: Path) -> None:
    """A repeated command has one effect."""
    async with (
        faulty_proxy(server_url) as proxy,
        running_system(tmp_path / "data", proxy.url, workers=2) as running,
        connect(server_url) as direct,
    ):
        running.redis = direct
        task_ids = await publish(server_url, "t", 40)
        for _ in range(8):
            proxy.loses_replies = True
            await proxy.next_chunk()
            await proxy.next_chunk()
            proxy.break_connections()
            proxy.loses_replies = False
            await proxy.next_chunk()
        await become_done(running, task_ids)
        await check_once(running, tmp_path, len(task_ids))


@pytest.mark.slow
async def test_functions_that_were_flushed_are_loaded_again(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    async with running_system(tmp_path / "data", server_url) as running:
        await running.provider.shut()
        during = await publish(server_url, "during", 5)
        for user in USERS:
            await running.provider.wait_for_arrivals(5, user=user)
        await redis_client.function_flush()
        await running.provider.open()
        await become_done(running, during)
        await redis_client.function_flush()
        after = await publish(server_url, "after", 5)
        await become_done(running, after)
        await check_once(running, tmp_path, len(during + after))


async def why_calls_are_refused(running: RunningSystem) -> str:
    """Return the error of a call whose user has no cached baseline; the call must not reach the provider."""
    before = running.provider.requests
    task = Task.model_validate({"task": "score_post", "user_id": "somebody", "prompt": "a post"})
    runtime = running.system.runtime
    call = Call.of_task(task, call_id="refused", run_id=RunId("test", "1"), policy=runtime.policies.of("somebody"))
    with pytest.raises(LedgerRefused) as refused:
        await runtime.reservations.reserve(call)
    assert running.provider.requests == before
    return str(refused.value)


async def test_an_emptied_redis_is_refused_until_somebody_decides(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    data_dir = tmp_path / "data"
    async with running_system(data_dir, server_url, stop_grace_s=0.5) as running:
        await become_done(running, await publish(server_url, "before", 2))
        await running.fold_all()
        await redis_client.flushall()
        with pytest.raises(
            LedgerReplaced, match="Restore its data and restart, or set the DuckDB file and the archive"
        ):
            await asyncio.wait_for(asyncio.shield(running.system.folding), PATIENCE_S)
        assert "Redis was emptied or replaced" in await why_calls_are_refused(running)

        # The groups are made again, so that what is published now is not lost; it stays pending.
        async def are_groups_there() -> bool:
            return all([await redis_client.exists(stream) for stream in STREAMS])

        await wait_until(are_groups_there, what="the groups")
        after = await publish(server_url, "after", 2)
        book, requests = running.provider.book, running.provider.requests
        settings = running.system.runtime.settings

        async def are_delivered() -> bool:
            return await running.pending() == len(after)

        await wait_until(are_delivered, what="the tasks at the worker")
        assert running.provider.requests == requests
    with pytest.raises(LedgerReplaced, match="Redis holds no ledger"):
        async with open_system(settings):
            pass
    (data_dir / "tollbook.duckdb").rename(tmp_path / "aside.duckdb")
    async with running_system(data_dir, server_url, claim_after_s=1.0) as running:
        await become_done(running, after)
        assert running.provider.book.totals() == book.totals()
        await check_once(running, tmp_path, len(after))


@pytest.mark.slow
async def test_a_redis_that_was_restored_from_an_older_state_is_refused(
    private_server: EmbeddedServer, tmp_path: Path
) -> None:
    """Going on would forget what the lost events charged."""
    data_dir, backup, valkey = tmp_path / "here", tmp_path / "backup", tmp_path / "data" / "valkey"
    async with running_system(data_dir, private_server.url) as running:
        await become_done(running, await publish(private_server.url, "kept", 2))
        await running.fold_all()
    await private_server.stop()
    await asyncio.to_thread(shutil.copytree, valkey, backup)
    await private_server.start()
    async with running_system(data_dir, private_server.url) as running:
        await become_done(running, await publish(private_server.url, "lost", 2))
        await running.fold_all()
        # While the system runs.
        await private_server.stop()
        await asyncio.to_thread(shutil.rmtree, valkey)
        await asyncio.to_thread(shutil.copytree, backup, valkey)
        await private_server.start()
        with pytest.raises(LedgerAhead, match="restored from an older backup"):
            await asyncio.wait_for(asyncio.shield(running.system.folding), PATIENCE_S)
        assert "older backup" in await why_calls_are_refused(running)
        settings = running.system.runtime.settings
    with pytest.raises(LedgerAhead, match="restored from an older backup"):
        async with open_system(settings):
            pass
    # A projection made of what is left goes on; the ledger grows past the old one's position.
    projection, aside = data_dir / "tollbook.duckdb", tmp_path / "aside.duckdb"
    projection.rename(aside)
    async with running_system(data_dir, private_server.url) as running:
        await become_done(running, await publish(private_server.url, "new", 4))
    aside.replace(projection)
    with pytest.raises(LedgerRewritten, match="or run `tollbook recover`"):
        async with open_system(settings):
            pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "on", "off", "error"),
    [("maxmemory", "1", "0", "OOM"), ("min-replicas-to-write", "1", "0", "NOREPLICAS")],
)
async def test_a_redis_that_cannot_write_is_waited_for(
    private_server: EmbeddedServer,
    tmp_path: Path,
    setting: str,
    on: str,
    off: str,
    error: str,
) -> None:
    """Nothing is acknowledged that is not stored; calls in flight are settled when there is room again."""
    async with running_system(tmp_path / "data", private_server.url) as running:
        await running.provider.shut()
        task_ids = await publish(private_server.url, "t", 3)
        for user in USERS:
            await running.provider.wait_for_arrivals(3, user=user)
        await running.redis.config_set(setting, on)
        await running.provider.open()

        async def is_refused() -> bool:
            statistics: Any = await running.redis.info("errorstats")
            return statistics.get(f"errorstat_{error}", {}).get("count", 0) >= len(task_ids)

        await wait_until(is_refused, what="the settlements being refused")
        assert await running.pending() == len(task_ids)
        assert [await running.system.handle.results.get(task_id) for task_id in task_ids] == [None] * len(task_ids)
        await running.redis.config_set(setting, off)
        await become_done(running, task_ids)
        await check_once(running, tmp_path, len(task_ids))
