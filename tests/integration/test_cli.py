"""Commands against systems in odd states: in parts, killed, silent, badly configured."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

import pytest
from redis.asyncio import Redis

from tests.servers import wait_until
from tests.system import GatedStandIn, StayingCommand, command_environment, run_cli, tollbook
from tollbook.ledger.keys import Keys
from tollbook.ledger.projection.store import Store
from tollbook.schemas.identifiers import check_id

STREAM: Final = "analysis"
# claude-3-haiku at $0.25 and $1.25 a million; the bound counts every byte, 32 for the message and 128 for the request.
PROMPT: Final = "a post [[completion_tokens=100]]"
COST: Final = (len(PROMPT) // 4 + 4) * 250 + 100 * 1_250
BOUND: Final = (len(PROMPT) + 32 + 128) * 250 + 500 * 1_250


@asynccontextmanager
async def staying(*arguments: str, until: str, cwd: Path, env: dict[str, str]) -> AsyncIterator[StayingCommand]:
    """Run a command that stays; yields it once its output has the word `until`."""
    command = await StayingCommand.start(*arguments, cwd=cwd, env=env)

    def is_ready() -> bool:
        assert command.process.returncode is None, command.stderr
        return until in command.stdout + command.stderr

    try:
        await wait_until(is_ready, 30, what=f"`tollbook {' '.join(arguments)}`")
        yield command
    finally:
        await command.end()


def variables(provider: GatedStandIn, **others: str) -> dict[str, str]:
    return {"OPENROUTER_BASE_URL": provider.base_url, "TOLLBOOK_DIALECT": "openrouter", **others}


def publish(task_id: str, *more: str) -> tuple[str, ...]:
    return ("publish", STREAM, "score_post", PROMPT, "--user", "u1", "--task-id", task_id, "--json", *more)


async def test_projector_and_worker_run_as_processes_of_their_own_and_the_projector_may_die(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    directory = tmp_path / "here"
    directory.mkdir()
    async with GatedStandIn() as provider:
        env = variables(provider, REDIS_URL=server_url)
        async with (
            staying("projector", until="projector.started", cwd=directory, env=env) as projector,
            # A worker that stops when the projector is dead stops all the same.
            staying("worker", "--streams", STREAM, until="worker.started", cwd=directory, env=env),
        ):
            done = (await run_cli(*publish("t1", "--wait", "20"), cwd=directory, env=env)).json()
            assert done["status"] == "done"

            async def is_shown() -> bool:
                rows = (await run_cli("spend", "u1", "--json", cwd=directory, env=env)).json()
                return bool(rows) and rows[0]["spent_usd"] == done["cost_usd"]

            assert await wait_until(is_shown, what="the projection, served by the other process")
            projector.process.kill()
            await projector.wait()
            # Nobody serves the projection any more; the file it left answers.
            spent = await run_cli("spend", "u1", "--json", cwd=directory, env=env)
            assert (spent.code, spent.stderr) == (0, "")
            assert spent.json()[0]["spent_usd"] == done["cost_usd"]


async def test_everything_goes_on_after_up_was_killed_in_the_middle_of_its_calls(tmp_path: Path) -> None:
    """G2, G3, G4: `kill -9` takes server, projector and worker at once."""
    directory = tmp_path / "here"
    directory.mkdir()
    tasks = [f"t{number}" for number in range(6)]
    async with GatedStandIn() as provider:
        env = variables(provider, TOLLBOOK_CLAIM_AFTER_S="1")
        async with staying("up", until="Tollbook is up", cwd=directory, env=env) as command:
            done = (await run_cli(*publish("before", "--wait", "20"), cwd=directory, env=env)).json()
            await provider.shut()
            for task in tasks:
                assert (await run_cli(*publish(task), cwd=directory, env=env)).code == 0
            await provider.wait_for_arrivals(1 + len(tasks), user="u1")
            command.process.kill()
            await command.wait()
        assert (await run_cli("ping", cwd=directory, env=env)).code == 1, "nothing runs"
        await provider.open()
        async with staying("up", until="Tollbook is up", cwd=directory, env=env):
            assert (await run_cli("result", "before", "--json", cwd=directory, env=env)).json() == done
            for task in tasks:
                result = (await run_cli("result", task, "--wait", "20", "--json", cwd=directory, env=env)).json()
                assert result["status"] == "done"
        row = (await run_cli("spend", "u1", "--json", cwd=directory, env=env)).json()[0]
        assert Decimal(row["spent_usd"]) * 10**9 == COST + len(tasks) * (BOUND + COST)
        assert Decimal(row["assumed_usd"]) * 10**9 == len(tasks) * BOUND
        assert Decimal(row["reserved_usd"]) == 0
        assert provider.arrived["u1"] == 1 + 2 * len(tasks)


async def test_ping_without_a_worker_gives_up_and_says_what_to_look_at(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    finished = await run_cli("ping", "--wait", "0.1", "--json", cwd=tmp_path, env={"REDIS_URL": server_url})
    assert (finished.code, finished.stdout) == (4, "")
    assert "tollbook doctor" in finished.stderr


async def test_no_password_of_the_server_is_shown(server_url: str, tmp_path: Path) -> None:
    """G10: a URL that does not work is what people paste into tickets."""
    password = "zzpasswordzz"
    refused = f"redis://nobody:{password}@{server_url.rpartition('@')[2]}"
    for env in ({"REDIS_URL": refused}, {"REDIS_URL": f"redis://:{password}@127.0.0.1:1/0"}):
        given = {**env, "OPENROUTER_BASE_URL": "http://127.0.0.1:1/v1"}
        for arguments in (("ping",), ("result", "x"), ("doctor",)):
            finished = await run_cli(*arguments, cwd=tmp_path, env=given)
            assert finished.code == 1, (arguments, finished)
            assert password not in finished.stdout + finished.stderr
            assert "Traceback" not in finished.stderr
        directory = tmp_path / str(len(env["REDIS_URL"]))
        directory.mkdir()
        # A worker waits for its server, and says what is wrong meanwhile.
        async with staying("worker", until="worker.not_ready", cwd=directory, env=given) as worker:
            worker.terminate()
            assert await worker.wait() == 0
        assert password not in worker.stdout + worker.stderr


# What CONFIG SET makes of the server -> state of the finding, and words of it or of its advice.
PERSISTENCE: Final[dict[str, tuple[dict[str, str], str, str]]] = {
    "evicting": ({"maxmemory-policy": "allkeys-lru"}, "failed", "noeviction"),
    "no append-only file": ({"appendonly": "no"}, "failed", "append-only file is off"),
    "synced every second": ({"appendfsync": "everysec"}, "warning", "everysec"),
    "synced always": ({"appendfsync": "always"}, "ok", "synced on every write"),
}


@pytest.mark.parametrize("case", PERSISTENCE)
async def test_doctor_judges_how_the_server_keeps_its_data(
    redis_client: Redis, server_url: str, tmp_path: Path, case: str
) -> None:
    changes, state, words = PERSISTENCE[case]
    before: Any = await redis_client.config_get(*changes)
    try:
        for name, value in changes.items():
            await redis_client.config_set(name, value)
        finished = await run_cli("doctor", "--json", cwd=tmp_path, env={"REDIS_URL": server_url})
    finally:
        for name, value in before.items():
            await redis_client.config_set(name, value)
    finding = next(finding for finding in finished.json() if finding["check"] == "persistence")
    assert finding["state"] == state
    assert words in finding["found"] + finding["advice"]


async def test_doctor_says_where_redis_and_the_data_directory_do_not_belong_together(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    await asyncio.to_thread(lambda: Store.open(tmp_path / "data" / "tollbook.duckdb", "ledger-1").close())
    for found, words in ((None, "holds no ledger under 'tollbook'"), ("ledger-2", "holds ledger ledger-2")):
        if found is not None:
            await redis_client.hset(Keys().meta, mapping={"ledger_id": found, "partitions": 1})
        finished = await run_cli("doctor", "--json", cwd=tmp_path, env={"REDIS_URL": server_url})
        (finding,) = (finding for finding in finished.json() if finding["check"] == "duckdb")
        assert finding["state"] == "failed"
        assert "do not belong together: the projection is of ledger ledger-1" in finding["found"]
        assert words in finding["found"]
        assert "TOLLBOOK_NAMESPACE" in finding["advice"]


async def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    """`tollbook --help | true`: no traceback, whoever closes the pipe first."""
    process = await asyncio.create_subprocess_exec(
        tollbook(),
        "publish",
        "--help",
        cwd=tmp_path,
        env=command_environment(None),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout._transport.close()  # pyright: ignore[reportAttributeAccessIssue] - there is no public way.
    errors = (await process.stderr.read()).decode()
    await process.wait()
    assert "Traceback" not in errors
    assert "BrokenPipe" not in errors


async def test_the_task_id_that_publish_makes_is_an_id(redis_client: Redis, server_url: str, tmp_path: Path) -> None:
    finished = await run_cli("publish", "monitoring", "ping", "--json", cwd=tmp_path, env={"REDIS_URL": server_url})
    answer = finished.json()
    assert check_id(answer["task_id"])
    entries: Any = await redis_client.xrange("monitoring")
    assert [(entry_id.decode(), fields[b"task_id"].decode()) for entry_id, fields in entries] == [
        (answer["entry_id"], answer["task_id"])
    ]


def test_the_command_starts_without_loading_what_only_some_commands_need() -> None:
    """It is started for every look at a result; DuckDB and Redis's client alone would double the time."""
    heavy = "{'duckdb', 'pyarrow', 'redis', 'httpx', 'faststream', 'genai_prices', 'pydantic_settings'}"
    script = f"import sys, tollbook.cli.app; assert not {heavy} & sys.modules.keys(), {heavy} & sys.modules.keys()"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
