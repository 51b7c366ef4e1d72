"""Workers, a gateway and a program that know the address of Redis, and nothing else of the projector's machine."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis

from tests.proxy import faulty_proxy
from tests.recovery.apart import kill, start_projector
from tests.servers import PATIENCE_S, wait_until
from tests.system import REPLIES, STREAMS, BackgroundCommand, GatedStandIn, make_settings, run_cli
from tollbook.inference.client import InferenceClient
from tollbook.inference.current_runtime import connect_runtime
from tollbook.inference.settings import Settings
from tollbook.ledger.server.connection import connect
from tollbook.schemas.results import InferenceResult, TaskStatus

pytestmark = pytest.mark.slow
PARTITIONS = 3
DELAY_S = 0.1  # In each direction: 200 ms until a command's reply is there.


@dataclass
class Elsewhere:
    """The projector's machine, and the folder of another machine, with the address of Redis as it is seen there."""

    here: Path
    there: Path
    settings: Settings
    projector: BackgroundCommand
    environment: dict[str, str]
    redis: Redis
    stack: AsyncExitStack
    last_reply: str = "0"

    async def start(self, name: str, *arguments: str, waits_for: str, **environment: str) -> BackgroundCommand:
        """Start a command in an empty folder of its own on the other machine."""
        folder = self.there / name
        folder.mkdir()
        command = await BackgroundCommand.start(*arguments, cwd=folder, env={**self.environment, **environment})
        self.stack.push_async_callback(command.end)
        await wait_until(lambda: waits_for in command.stderr or command.process.returncode is not None, what=waits_for)
        assert command.process.returncode is None, command.stderr
        return command

    async def finish(self, name: str, users: int) -> list[InferenceResult]:
        """Publish a task of each of so many users, whose budgets nobody has asked for; return the results."""
        wanted = {f"{name}-{number}" for number in range(users)}
        for task_id in wanted:
            task = {"task": "score_post", "task_id": task_id, "user_id": task_id, "prompt": "a post"}
            await self.redis.xadd(STREAMS[1], {**task, "reply_to": REPLIES})
        return await self.results(wanted)

    async def results(self, wanted: set[str]) -> list[InferenceResult]:
        found: dict[str, InferenceResult] = {}
        async with asyncio.timeout(2 * PATIENCE_S):
            while not found.keys() >= wanted:
                reply: Any = await self.redis.xread({REPLIES: self.last_reply}, block=1000, count=1000)
                for entry_id, fields in reply[0][1] if reply else ():
                    result = InferenceResult.model_validate_json(fields[b"result"])
                    found[result.task_id] = result
                    self.last_reply = entry_id.decode()
        return list(found.values())


@pytest.fixture
async def elsewhere(redis_client: Redis, server_url: str, tmp_path: Path) -> AsyncIterator[Elsewhere]:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    async with AsyncExitStack() as stack:
        provider = await stack.enter_async_context(GatedStandIn())
        proxy = await stack.enter_async_context(faulty_proxy(server_url))
        proxy.delay_s = DELAY_S
        settings = make_settings(here / "data", provider, redis_url=server_url)
        projector = await start_projector(settings, server_url, TOLLBOOK_PARTITIONS=str(PARTITIONS))
        stack.push_async_callback(kill, projector)
        environment = {
            "REDIS_URL": proxy.url, "OPENROUTER_BASE_URL": provider.base_url, "TOLLBOOK_DIALECT": "openrouter",
        }  # fmt: skip
        redis = await stack.enter_async_context(connect(server_url))
        yield Elsewhere(here, there, settings, projector, environment, redis, stack)


async def test_redis_is_all_that_workers_gateways_and_programs_need(elsewhere: Elsewhere) -> None:
    """With 200 ms between them and Redis; a fresh baseline for each user, three partitions that nobody told them of."""
    for number in range(2):
        await elsewhere.start(f"worker-{number}", "worker", waits_for="worker.started")
    results = await elsewhere.finish("early", 30)
    assert {result.status for result in results} == {TaskStatus.DONE}

    # The projector is killed: what needs a new baseline waits for the next one.
    await kill(elsewhere.projector)
    running = asyncio.create_task(elsewhere.finish("late", 10))
    projector = await start_projector(
        elsewhere.settings, str(elsewhere.settings.redis_url), TOLLBOOK_PARTITIONS=str(PARTITIONS)
    )
    elsewhere.stack.push_async_callback(kill, projector)
    assert {result.status for result in await running} == {TaskStatus.DONE}

    await use_gateway(elsewhere)
    async with connect_runtime(settings_there(elsewhere)):
        result = await InferenceClient("score_post").call("a post", user_id="program")
        assert result.status is TaskStatus.DONE

    files = {path.name for path in elsewhere.there.rglob("*") if path.is_file()}
    assert not [name for name in files if name.endswith((".duckdb", ".token")) or name == "endpoint.json"], files
    await projector.end()
    settled = await run_cli("verify", "--json", cwd=elsewhere.here, env=projector_environment(elsewhere))
    assert settled.code == 0, settled


async def use_gateway(elsewhere: Elsewhere) -> None:
    made = await run_cli("keys", "create", "--user", "caller", "--json", cwd=elsewhere.there, env=elsewhere.environment)
    assert made.code == 0, made
    gateway = await elsewhere.start("gateway", "gateway", waits_for="gateway.served", TOLLBOOK_GATEWAY_PORT="0")
    (address,) = set(
        re.findall(r"http://127\.0\.0\.1:\d+", gateway.stderr.partition("gateway.served")[2].splitlines()[0])
    )
    async with httpx.AsyncClient(base_url=address, trust_env=False) as client:
        answer = await client.post(
            "/v1/chat/completions",
            json={"model": "score_post", "messages": [{"role": "user", "content": "a post"}]},
            headers={"authorization": f"Bearer {json.loads(made.stdout)['key']}"},
            timeout=PATIENCE_S,
        )
    assert answer.status_code == 200, answer.text


def settings_there(elsewhere: Elsewhere) -> Settings:
    values = {
        "redis_url": elsewhere.environment["REDIS_URL"],
        "openrouter_base_url": elsewhere.environment["OPENROUTER_BASE_URL"],
        "dialect": "openrouter",
        "data_dir": elsewhere.there / "program",
    }
    return Settings(_env_file=None, **values)  # pyright: ignore[reportCallIssue]


def projector_environment(elsewhere: Elsewhere) -> dict[str, str]:
    return {"REDIS_URL": str(elsewhere.settings.redis_url), "TOLLBOOK_PARTITIONS": str(PARTITIONS)}
