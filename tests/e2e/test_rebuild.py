"""The projection is a fold: a lost DuckDB file is rebuilt; a restarted system goes on where it was."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pytest
from redis.asyncio import Redis

from tests.servers import wait_until
from tests.system import REPLIES, BackgroundCommand, GatedStandIn, RunningSystem, run_cli, running_system
from tollbook.inference.setting_tables import CapTable
from tollbook.ledger.projection.comparison import TABLES, compare
from tollbook.ledger.projection.store import Store
from tollbook.schemas.results import TaskStatus

# Every way a call can end.
PROMPTS: Final = {
    "plain": "a post",
    "retried": "a post [[fault=http_503]]",
    "failed": "a post [[fault=http_400]]",
    "unbilled": "a post [[fault=missing_usage]]",
    "overcharged": "a post [[fault=overcharge]]",
}
CAPS: Final = CapTable(users={"poor": 1})


def make_tasks(users: Sequence[str]) -> list[dict[str, str]]:
    return [
        {"task": "score_post", "task_id": f"{kind}-{user}", "user_id": user, "prompt": prompt, "reply_to": REPLIES}
        for kind, prompt in PROMPTS.items()
        for user in users
    ]


async def run_tasks(running: RunningSystem, tasks: list[dict[str, str]]) -> set[TaskStatus]:
    await running.publish("analysis", tasks)
    results = await running.answers(task["task_id"] for task in tasks)
    await running.fold_all()
    return {result.status for result in results}


async def test_a_deleted_projection_is_rebuilt_row_for_row(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    """G5: the tables are a pure function of the ledger."""
    data_dir, kept = tmp_path / "data", tmp_path / "kept.duckdb"
    async with running_system(data_dir, server_url, caps=CAPS) as running:
        statuses = await run_tasks(running, make_tasks(["u1", "u2", "u3", "poor"]))
        assert statuses == {TaskStatus.DONE, TaskStatus.FAILED, TaskStatus.DENIED}
        ledger_id, events = running.system.handle.ledger_id, await redis_client.xlen(running.keys.ledger)
    (data_dir / "tollbook.duckdb").rename(kept)

    async with running_system(data_dir, server_url, caps=CAPS) as running:
        await running.fold_all()
        rebuilt, old = running.system.projection.store, Store.open(kept, ledger_id, 1)
        try:
            assert compare(old, rebuilt) == []
            for table in TABLES:
                count = f"SELECT count(*) AS n FROM {table}"  # noqa: S608 - our own constants.
                assert rebuilt.query(count) == old.query(count)
            assert old.query("SELECT count(*) AS n FROM events")[0]["n"] == events
            assert rebuilt.query("FROM discrepancies") == []
        finally:
            old.close()
        # And it works: the next call is checked against the rebuilt spend.
        more = {"task": "score_post", "task_id": "after", "user_id": "u1", "prompt": "a post", "reply_to": REPLIES}
        assert await run_tasks(running, [more]) == {TaskStatus.DONE}


@pytest.mark.slow
async def test_up_goes_on_after_a_restart_and_executes_nothing_twice(tmp_path: Path) -> None:
    """G3, G4: ledger, results, spend and pending tasks survive the process, and a redelivery calls no model."""
    directory = tmp_path / "here"
    directory.mkdir()
    async with GatedStandIn() as provider:
        variables = {"OPENROUTER_BASE_URL": provider.base_url, "TOLLBOOK_DIALECT": "openrouter"}
        task = ("publish", "analysis", "score_post", "a post", "--user", "u42", "--task-id", "mine", "--json")
        first = await BackgroundCommand.start("up", cwd=directory, env=variables)
        try:
            await wait_until(lambda: "Tollbook is up" in first.stdout, what="up")
            done = (await run_cli(*task, "--wait", "50", cwd=directory)).json()
            assert done["status"] == "done"
        finally:
            await first.end()
        assert first.process.returncode == 0, first.stderr
        # At rest, the projection's file answers.
        spend = (await run_cli("spend", "u42", "--json", cwd=directory)).json()
        assert spend[0]["spent_usd"] == done["cost_usd"]
        assert provider.requests == 1

        second = await BackgroundCommand.start("up", cwd=directory, env=variables)
        try:
            await wait_until(lambda: "Tollbook is up" in second.stdout, what="up again")
            assert (await run_cli("result", "mine", "--json", cwd=directory)).json() == done
            again = await run_cli(*task, "--wait", "50", cwd=directory)
            assert again.json() == done
            # A task behind the redelivered one on the same stream: once it is done, so is the redelivery.
            ping = await run_cli("publish", "analysis", "ping", "--wait", "50", "--json", cwd=directory)
            assert ping.json()["content"] == "pong"
            assert (await run_cli("spend", "u42", "--json", cwd=directory)).json() == spend
            assert provider.requests == 1
        finally:
            await second.end()
        assert second.process.returncode == 0, second.stderr
