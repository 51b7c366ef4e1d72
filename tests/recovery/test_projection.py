"""DuckDB is lost, damaged or cannot be written while the system runs, and at its start (G5, G6, G8)."""

import asyncio
import contextlib
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import duckdb
import pytest
from redis.asyncio import Redis

from tests.calling import period
from tests.recovery.apart import running_apart
from tests.recovery.books import check_books, events_of
from tests.servers import wait_until
from tests.system import REPLIES, RunningSystem, running_system
from tollbook.consumers.projection import ProjectionService
from tollbook.inference.runtime import open_ledger
from tollbook.inference.setting_tables import CapTable
from tollbook.ledger.errors import BaselineUnavailable
from tollbook.ledger.gate.asking import AskedBaselines
from tollbook.ledger.projection.snapshot import take_snapshot
from tollbook.ledger.projection.store import Store
from tollbook.observability.health import Readiness
from tollbook.schemas.identifiers import budget_name
from tollbook.schemas.results import TaskStatus

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("projections_made_anew")]

STREAM: Final = "analysis"


async def run_tasks(running: RunningSystem, name: str, *users: str, number: int = 3) -> None:
    """Have every user's tasks done."""
    await running.answers(await publish(running, name, *users, number=number))


async def publish(running: RunningSystem, name: str, *users: str, number: int = 1) -> list[str]:
    tasks = [
        {
            "task": "score_post",
            "task_id": f"{name}-{user}-{n}",
            "user_id": user,
            "prompt": "a post",
            "reply_to": REPLIES,
        }
        for user in users
        for n in range(number)
    ]
    await running.publish(STREAM, tasks)
    return [task["task_id"] for task in tasks]


async def are_done(running: RunningSystem, task_ids: list[str]) -> bool:
    results = [await running.system.handle.results.get(task_id) for task_id in task_ids]
    return all(result is not None and result.status is TaskStatus.DONE for result in results)


async def fails_closed(running: RunningSystem) -> bool:
    try:
        await running.system.projection.read(["user:u1"])
    except BaselineUnavailable:
        return True
    return False


def delete(path: Path) -> None:
    path.unlink()


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(b"garbage " * 10_000)
    other.replace(path)


def cut_in_half(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def empty(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(0)


def overwrite(path: Path) -> None:
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(b"garbage " * (size // 8))


def leave_the_log_alone(path: Path) -> None:
    path.with_name(path.name + ".wal").write_bytes(b"garbage " * 1_000)
    path.unlink()


@pytest.mark.parametrize("damage", [delete, replace])
async def test_a_projection_that_vanishes_while_it_runs_is_rebuilt(
    redis_client: Redis, server_url: str, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    """G5, G8: meanwhile calls fail closed; afterwards it equals a rebuilt one, and nothing is lost."""
    data_dir = tmp_path / "data"
    async with running_system(data_dir, server_url) as running:
        await run_tasks(running, "before", "u1", "u2")
        before = running.system.projection.store
        damage(data_dir / "tollbook.duckdb")
        await wait_until(lambda: fails_closed(running), what="the loss being seen")
        during = await publish(running, "during", "u1", "u3")
        assert {result.status for result in await running.answers(during)} == {TaskStatus.DONE}
        assert running.system.projection.store is not before
        await run_tasks(running, "after", "u2", "u4")
        await check_books(running, tmp_path)


@pytest.mark.parametrize("damage", [cut_in_half, empty, overwrite])
async def test_a_projection_that_is_damaged_while_it_is_open_is_in_order_again_after_the_next_start(
    redis_client: Redis, server_url: str, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    """DuckDB may go on with what it has in memory; what it says stays true, and a file that is lost is made anew."""
    data_dir = tmp_path / "data"
    path = data_dir / "tollbook.duckdb"
    async with running_system(data_dir, server_url) as running:
        await run_tasks(running, "before", "u1", "u2")
        await running.fold_all()
        # Idle, DuckDB moves everything to the file.
        await wait_until(lambda: not path.with_name(path.name + ".wal").exists(), what="a checkpoint")
        damage(path)
        await run_tasks(running, "after", "u1", "u3")
        await check_books(running, tmp_path)
        book = running.provider.book
    async with running_system(data_dir, server_url) as running:
        running.provider.book = book
        await check_books(running, tmp_path)
        await run_tasks(running, "again", "u1", "u4")
        await check_books(running, tmp_path)


@pytest.mark.parametrize("damage", [delete, replace, cut_in_half, empty, overwrite, leave_the_log_alone])
async def test_a_projection_that_is_damaged_at_rest_is_set_aside_and_rebuilt(
    redis_client: Redis, server_url: str, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    data_dir = tmp_path / "data"
    async with running_system(data_dir, server_url) as running:
        await run_tasks(running, "before", "u1", "u2")
        book = running.provider.book
    damage(data_dir / "tollbook.duckdb")
    async with running_system(data_dir, server_url) as running:
        running.provider.book = book
        await run_tasks(running, "after", "u1", "u3")
        await check_books(running, tmp_path)
    assert bool(list(data_dir.glob("*.bad*"))) == (damage is not delete)


def forget_spend(path: Path) -> None:
    with duckdb.connect(str(path)) as connection:
        connection.execute("UPDATE budgets SET settled_usd = 0")


def halve_a_cost(path: Path) -> None:
    with duckdb.connect(str(path)) as connection:
        connection.execute("UPDATE events SET amount_usd = amount_usd / 2 WHERE type = 'cost-recorded'")


@pytest.mark.parametrize("change", [forget_spend, halve_a_cost])
async def test_a_projection_that_was_changed_by_hand_decides_nothing(
    redis_client: Redis, server_url: str, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    """G1, G8: with an empty tail DuckDB alone decides, so it is checked before anybody reads it."""
    data_dir = tmp_path / "data"
    caps = CapTable(users={"u1": 1_500_000})
    async with running_system(data_dir, server_url, caps=caps, tail_keep_s=1.0) as running:
        tasks = await publish(running, "before", "u1", number=60)
        first = [result.status for result in await running.answers(tasks)]
        assert set(first) == {TaskStatus.DONE, TaskStatus.DENIED}, "the cap is reached"
        await running.fold_all()
        key = running.keys.tail(budget_name("user", "u1", period()))
        await wait_until(lambda: is_absent(running, key), what="the tail being empty")
        book = running.provider.book
    change(data_dir / "tollbook.duckdb")
    async with running_system(data_dir, server_url, caps=caps) as running:
        running.provider.book = book
        tasks = await publish(running, "after", "u1", number=5)
        assert {result.status for result in await running.answers(tasks)} == {TaskStatus.DENIED}
        await check_books(running, tmp_path)
    assert len(list(data_dir.glob("*.bad"))) == 1


async def is_absent(running: RunningSystem, key: str) -> bool:
    return not await running.redis.exists(key)


async def test_a_row_changed_while_it_runs_is_found_and_the_file_rebuilt(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    """G8: by the check from time to time; remote workers are answered by the rebuilt file alone."""
    data_dir = tmp_path / "data"
    async with running_system(data_dir, server_url) as running:
        await run_tasks(running, "before", "u1", "u2")
        settings = running.system.runtime.settings
    async with open_ledger(settings, server_url) as handle:
        service = ProjectionService(settings, handle, check_every_s=0.05)
        await service.start()
        folding = asyncio.create_task(service.run())
        await service.projector.catch_up()
        before, true = service.store, budgets(service.store)
        with before.connection.cursor() as cursor:
            cursor.execute("UPDATE budgets SET settled_usd = 0")

        async def is_rebuilt() -> bool:
            with contextlib.suppress(BaselineUnavailable):
                await service.projector.catch_up()
                return service.store is not before
            return False

        await wait_until(is_rebuilt, what="the file being rebuilt")
        assert budgets(service.store) == true
        asked = AskedBaselines(handle.redis, handle.pipeline, handle.keys, ledger_id=handle.ledger_id, process="test")
        name = true[0]["budget"]
        page = await asked.reader(0)([name])
        assert page.balances[name] == (true[0]["settled"], 0)
        await asked.aclose()
        folding.cancel()
        await asyncio.gather(folding, return_exceptions=True)
        await service.stop()
    assert len(list(data_dir.glob("*.bad"))) == 1


def budgets(store: Store) -> list[dict[str, Any]]:
    return store.query("SELECT budget, nanousd(settled_usd) AS settled FROM budgets ORDER BY budget")


@pytest.mark.parametrize("is_running", [False, True])
async def test_an_older_copy_put_in_place_catches_up(
    redis_client: Redis, server_url: str, tmp_path: Path, *, is_running: bool
) -> None:
    """G5, G6: the stream has the rest."""
    data_dir, copy = tmp_path / "data", tmp_path / "copy.duckdb"
    path = data_dir / "tollbook.duckdb"
    async with running_system(data_dir, server_url) as running:
        await run_tasks(running, "before", "u1", "u2")
        await running.fold_all()
        await asyncio.to_thread(take_snapshot, path, copy)
        await run_tasks(running, "since", "u1", "u3")
        if is_running:
            before = running.system.projection.store
            copy.replace(path)
            await wait_until(lambda: is_another(running, before), what="the copy being opened")
            await run_tasks(running, "after", "u2", "u3")
            await check_books(running, tmp_path)
        book = running.provider.book
    if not is_running:
        copy.replace(path)
    async with running_system(data_dir, server_url) as running:
        running.provider.book = book
        await run_tasks(running, "again", "u1", "u4")
        await check_books(running, tmp_path)


async def is_another(running: RunningSystem, before: Store) -> bool:
    with contextlib.suppress(BaselineUnavailable):
        return running.system.projection.store is not before
    return False


async def test_while_the_file_cannot_be_opened_known_users_go_on_and_new_ones_wait(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    """G6, G8: trouble that may pass is waited out."""
    data_dir = tmp_path / "data"
    path = data_dir / "tollbook.duckdb"
    async with running_system(data_dir, server_url, tail_keep_s=3600.0) as running:
        await run_tasks(running, "before", "known")
        await running.fold_all()
        path.rename(tmp_path / "lost.duckdb")
        path.mkdir()
        await wait_until(lambda: fails_closed(running), what="the loss being seen")
        new = await publish(running, "during", "new")
        await run_tasks(running, "during", "known")
        assert not await are_done(running, new)
        assert "new" not in {event.user_id for event in await events_of(running)}
        path.rmdir()
        assert {result.status for result in await running.answers(new)} == {TaskStatus.DONE}
        await check_books(running, tmp_path)
    assert list(data_dir.glob("*.bad*")) == []


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux limits another process")
async def test_a_full_disk_is_waited_out(redis_client: Redis, server_url: str, tmp_path: Path) -> None:
    """G6, G8: no file is set aside because the disk is full, and the fold continues once there is room."""
    async with running_apart(tmp_path / "data", server_url, tail_keep_s=3600.0) as apart:
        running = apart.running
        await run_tasks(running, "before", "known", number=20)
        pid = apart.projector.process.pid
        _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        # The log of this process, which is limited too, is far from it.
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (48_000, hard))
        await run_tasks(running, "during", "known", number=100)
        await wait_until(lambda: "projection.lost" in apart.projector.stderr, what="the full disk being seen")
        assert len(apart.projector.stderr) < os.sysconf("SC_PAGESIZE") * 10
        new = await publish(running, "during", "new")
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))
        assert {result.status for result in await running.answers(new)} == {TaskStatus.DONE}
        await apart.check_projection()
        assert list(apart.path.parent.glob("*.bad*")) == []


async def test_a_projection_without_memory_says_so_waits_and_goes_on(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    """G8: no process ends for it, no file is set aside, and readiness says what to do."""
    data_dir = tmp_path / "data"
    async with running_system(data_dir, server_url) as running:
        await run_tasks(running, "before", "u1")
        await running.fold_all()
        service, limit = running.system.projection, "1MB"
        plenty = service._settings
        service._settings = plenty.model_copy(update={"duckdb_memory": limit})
        # Opened anew since the file is another one, with less memory than that takes.
        path, copy = data_dir / "tollbook.duckdb", data_dir / "copy"
        await asyncio.to_thread(shutil.copyfile, path, copy)
        await asyncio.to_thread(copy.replace, path)
        during = await publish(running, "during", "u1", "u2", number=5)
        readiness = Readiness(running.system.state)

        async def says_why() -> bool:
            health = await readiness.get()
            found = " ".join(check.found for check in health.checks)
            return f"its limit is {limit}: raise TOLLBOOK_DUCKDB_MEMORY" in found

        await wait_until(says_why, what="readiness naming the limit and the setting")
        service._settings = plenty
        assert {result.status for result in await running.answers(during)} == {TaskStatus.DONE}
        await wait_until(lambda: service.problem is None, what="the file being open again")
        await running.fold_all()
        assert not list(data_dir.glob("*.bad"))
        assert not running.system.folding.done()
        await check_books(running, tmp_path)


async def test_a_projector_that_starts_without_memory_waits_and_says_why(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    async with running_system(tmp_path / "data", server_url) as running:
        await run_tasks(running, "before", "u1")
    settings = running.system.runtime.settings
    async with open_ledger(settings, server_url) as handle:
        service = ProjectionService(settings.model_copy(update={"duckdb_memory": "1MB"}), handle)
        reasons: list[str] = []
        starting = asyncio.create_task(service.start(on_waiting=reasons.append))
        await wait_until(lambda: len(reasons) >= 2, what="a second try")
        assert not starting.done()
        assert "it waits for memory" in reasons[0]
        assert "its limit is 1MB: raise TOLLBOOK_DUCKDB_MEMORY" in reasons[0]
        service._settings = settings
        await starting
        assert service.store.position().seq > 0
        await service.stop()
    assert not list((tmp_path / "data").glob("*.bad"))
