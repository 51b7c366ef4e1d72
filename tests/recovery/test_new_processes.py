"""A process that starts anew compares the ledger with what is on disk before anything is written (G1, G4, G8)."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from tests.proxy import faulty_proxy
from tests.recovery.test_going_back import Backup, put_back, take_backup
from tests.servers import wait_until
from tests.system import REPLIES, BackgroundCommand, RunningSystem, run_cli, running_system
from tollbook.ledger.keys import Keys

KEYS = Keys("tollbook", 0)
TASK: dict[Any, Any] = {"task": "score_post", "user_id": "u1", "prompt": "a post", "reply_to": REPLIES}


async def finish(running: RunningSystem, *names: str) -> None:
    await running.publish("analysis", [TASK | {"task_id": name} for name in names])
    await running.answers(names)


def lasting(backup: Backup) -> Backup:
    """Leave out the signs of life, which have ended by the time that a backup is restored."""
    return {key: value for key, value in backup.items() if not key.startswith(b"tollbook:")}


@pytest.fixture
async def older(redis_client: Redis, server_url: str, tmp_path: Path) -> Backup:
    """A system that has ended, of which Redis was restored from an older backup."""
    async with running_system(tmp_path / "data", server_url, segment_events=2, segment_age_s=0.1) as running:
        await finish(running, "kept")
        backup = lasting(await take_backup(redis_client))
        await finish(running, "lost-1", "lost-2")

        async def is_sealed() -> bool:
            return int(await redis_client.hget(KEYS.meta, "sealed_seq") or 0) > 6

        await wait_until(is_sealed, what="the seal of what is going to be lost")
    await put_back(redis_client, backup)
    return backup


def here(server_url: str, data_dir: Path) -> dict[str, str]:
    return {
        "REDIS_URL": server_url,
        "TOLLBOOK_DATA_DIR": str(data_dir),
        "OPENROUTER_BASE_URL": "http://127.0.0.1:9/api/v1",
        "TOLLBOOK_DIALECT": "openrouter",
    }


async def ledger_of(redis: Redis) -> Backup:
    """The keys of the partition, without the projector's mark that stops calls."""
    found = {key: value for key, value in (await take_backup(redis)).items() if key.startswith(KEYS.prefix.encode())}
    found.pop(KEYS.meta.encode(), None)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("command", ["up", pytest.param("projector", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "left",
    [
        pytest.param("DuckDB and archive", marks=pytest.mark.slow),
        "DuckDB",
        pytest.param("archive", marks=pytest.mark.slow),
    ],
)
async def test_a_ledger_that_lacks_events_of_the_disk_is_refused_and_not_written_to(
    redis_client: Redis, server_url: str, tmp_path: Path, older: Backup, command: str, left: str
) -> None:
    data = tmp_path / "data"
    if left == "archive":
        (data / "tollbook.duckdb").unlink()
    if left == "DuckDB":
        shutil.rmtree(data / "archive")
    await redis_client.xadd("analysis", TASK | {"task_id": "lost-1"})
    before = await ledger_of(redis_client)

    refused = await run_cli(command, cwd=tmp_path, env=here(server_url, data))

    assert refused.code == 1
    assert "the ledger has only" in refused.stderr
    assert await ledger_of(redis_client) == before
    assert "the ledger has only" in str(await redis_client.hget(KEYS.meta, "stopped"))


@pytest.mark.slow
@pytest.mark.parametrize("left", ["DuckDB", "archive"])
async def test_no_policy_is_put_in_force_before_the_projector_has_checked(
    redis_client: Redis, server_url: str, tmp_path: Path, older: Backup, left: str
) -> None:
    data = tmp_path / "data"
    if left == "archive":
        (data / "tollbook.duckdb").unlink()
    else:
        shutil.rmtree(data / "archive")
    (tmp_path / "tollbook.toml").write_text('[plans.trial]\ncap_usd = "7"\n')
    before = await ledger_of(redis_client)
    command = await BackgroundCommand.start("up", "--workers", "1", cwd=tmp_path, env=here(server_url, data))
    try:

        async def is_stopped() -> bool:
            return await redis_client.hexists(KEYS.meta, "stopped")

        await wait_until(is_stopped, what="the projector's look")
    finally:
        await command.end()
    assert await ledger_of(redis_client) == before


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--standby",)])
async def test_a_projector_that_starts_before_redis_waits_for_it(
    redis_client: Redis, server_url: str, tmp_path: Path, options: tuple[str, ...]
) -> None:
    async with faulty_proxy(server_url) as link:
        await link.stop()
        env = here(link.url, tmp_path / "data")
        command = await BackgroundCommand.start("projector", *options, cwd=tmp_path, env=env)
        try:
            await wait_until(lambda: "projector.not_ready" in command.stderr, what="a projector that waits")
            await link.start()
            await wait_until(lambda: "projector.started" in command.stderr, what="a projector at work")
        finally:
            await command.end()
    assert command.process.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("left", ["DuckDB", "archive"])
async def test_an_emptied_redis_gets_no_new_ledger_beside_what_is_on_disk(
    redis_client: Redis, server_url: str, tmp_path: Path, older: Backup, left: str
) -> None:
    data = tmp_path / "data"
    if left == "archive":
        (data / "tollbook.duckdb").unlink()
    else:
        shutil.rmtree(data / "archive")
    await redis_client.flushall()

    refused = await run_cli("projector", cwd=tmp_path, env=here(server_url, data))

    assert refused.code == 1
    assert "Redis holds no ledger" in refused.stderr
    assert await redis_client.keys() == []


@pytest.mark.slow
@pytest.mark.parametrize(("is_stopped", "has_duckdb"), [(False, True), (False, False), (True, True)])
async def test_nobody_changes_a_plan_or_a_cost_on_a_ledger_that_went_back(
    redis_client: Redis, server_url: str, tmp_path: Path, older: Backup, is_stopped: bool, has_duckdb: bool
) -> None:
    """Before a projector has looked, by what is on disk; after that, from anywhere."""
    data = tmp_path / "data"
    if not has_duckdb:
        (data / "tollbook.duckdb").unlink()
    if is_stopped:
        await run_cli("projector", cwd=tmp_path, env=here(server_url, data))
        data = tmp_path / "elsewhere"
    before = await ledger_of(redis_client)

    for command in (
        ("credit", "grant", "u1", "1", "--reason", "r"),
        ("plan", "set", "u1", "growth", "--reason", "r"),
        ("cost", "adjust", "kept", "0", "--reason", "r"),
    ):
        refused = await run_cli(*command, cwd=tmp_path, env=here(server_url, data))
        assert refused.code != 0
        assert ("the ledger has only" if is_stopped else "is no longer on the ledger") in refused.stderr

    assert await ledger_of(redis_client) == before


@pytest.mark.slow
async def test_a_worker_on_another_machine_waits_until_a_projector_has_checked(
    redis_client: Redis, server_url: str, tmp_path: Path, older: Backup
) -> None:
    """It has nothing to compare with; without a projector it has no baselines, and then the mark tells it."""
    await redis_client.xadd("analysis", TASK | {"task_id": "new"})
    worker = await BackgroundCommand.start("worker", cwd=tmp_path, env=here(server_url, tmp_path / "elsewhere"))
    try:
        await wait_until(lambda: "no projector runs" in worker.stderr, what="the worker's wait")
        await run_cli("projector", cwd=tmp_path, env=here(server_url, tmp_path / "data"))
        before = await ledger_of(redis_client)
        await redis_client.xadd("generation", TASK | {"task": "generate_draft", "task_id": "newer"})
        await wait_until(lambda: "calls are stopped: " in worker.stderr, what="the worker's reason")
        assert {key: value for key, value in (await ledger_of(redis_client)).items() if key in before} == before
    finally:
        await worker.end()
