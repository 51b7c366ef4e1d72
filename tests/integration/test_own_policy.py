"""A user's own product: task types, plans and streams that are only in a policy file, not in the code."""

import json
import tomllib
from pathlib import Path

import pytest
from redis.asyncio import Redis

from tests.system import REPLIES, RunningSystem, run_cli, running_system
from tollbook.inference.publisher import Publisher
from tollbook.inference.settings import load_settings
from tollbook.schemas.policy import default_policy
from tollbook.schemas.results import ErrorCode, TaskStatus
from tollbook.schemas.tasks import InvalidTask
from tollbook.views.top.redis_reader import RedisReader

FILE = """
default_plan = "gold"
[plans.gold]
cap_usd = 3
[tasks.summarize]
model = "openai/gpt-4o-mini"
max_tokens = 50
[streams.emails]
concurrency = 2
"""
SUMMARIZE = {"task": "summarize", "user_id": "u1", "prompt": "a long text", "reply_to": REPLIES}


@pytest.fixture
def policy_file(tmp_path: Path) -> Path:
    path = tmp_path / "tollbook.toml"
    path.write_text(FILE, encoding="utf-8")
    return path


async def test_a_product_runs_by_its_own_names(
    redis_client: Redis, server_url: str, tmp_path: Path, policy_file: Path
) -> None:
    async with running_system(tmp_path / "data", server_url, policy_file=policy_file) as running:
        await running.publish("emails", [{**SUMMARIZE, "task_id": "t1"}])
        (result,) = await running.answers(["t1"])
        assert (result.status, result.task_type) == (TaskStatus.DONE, "summarize")
        await running.publish("emails", [{**SUMMARIZE, "task_id": "t2", "task": "sumarize"}])
        (refused,) = await running.answers(["t2"])
        assert refused.error_code is ErrorCode.INVALID_TASK
        assert "'summarize', 'ping', not 'sumarize'; did you mean 'summarize'?" in (refused.error or "")
        # A reply stream may be no task stream of this policy.
        await running.publish("emails", [{**SUMMARIZE, "task_id": "t3", "reply_to": "emails"}])
        async with Publisher(running.system.runtime.settings) as publisher:
            mistaken = await publisher.wait("t3", timeout_s=30)
        assert mistaken.error_code is ErrorCode.INVALID_TASK
        assert await redis_client.xlen("emails") == 3
        await _check_plan(running)


async def _check_plan(running: RunningSystem) -> None:
    rows = await running.query("FROM spend WHERE user_id = 'u1'")
    assert [(row["plan"], row["cap_usd"]) for row in rows] == [("gold", 3)]


async def test_a_program_without_the_file_takes_the_ledgers_names(
    redis_client: Redis, server_url: str, tmp_path: Path, policy_file: Path
) -> None:
    async with running_system(tmp_path / "data", server_url, policy_file=policy_file) as running:
        elsewhere = load_settings(env_file=None, redis_url=running.system.redis_url, data_dir=tmp_path / "elsewhere")
        async with Publisher(elsewhere) as publisher:
            result = await publisher.publish_and_wait("emails", "summarize", "a text", user_id="u1", timeout_s=30)
            assert result.status is TaskStatus.DONE
            with pytest.raises(InvalidTask, match="did you mean 'emails'"):
                await publisher.publish("email", "summarize", "a text", user_id="u1")
        reader = RedisReader(elsewhere)
        try:
            seen = await reader.look()
        finally:
            await reader.aclose()
        assert [stream.name for stream in seen.redis.streams] == [*default_policy().streams, "emails"]


async def test_init_writes_a_file_once_and_the_schema_is_json(tmp_path: Path) -> None:
    made = await run_cli("init", cwd=tmp_path)
    text = (tmp_path / "tollbook.toml").read_text(encoding="utf-8")
    assert made.code == 0
    assert set(tomllib.loads(text)["plans"]) == set(default_policy().plans)
    (tmp_path / "tollbook.toml").write_text("[plans.trial]\ncap_usd = 1\n", encoding="utf-8")
    again = await run_cli("init", cwd=tmp_path)
    assert (again.code, "already exists" in again.stderr) == (1, True)
    assert "cap_usd = 1" in (tmp_path / "tollbook.toml").read_text(encoding="utf-8")
    schema = await run_cli("policy", "schema", cwd=tmp_path)
    assert json.loads(schema.stdout)["title"] == "Tollbook policy file"


async def test_a_mistake_in_the_file_is_one_line_of_any_command(tmp_path: Path) -> None:
    (tmp_path / "tollbook.toml").write_text("[plans.gold]\n\ncap_usd = -1\n", encoding="utf-8")
    finished = await run_cli("spend", cwd=tmp_path)
    assert finished.code == 1
    assert finished.stderr == (
        "tollbook: tollbook.toml:3: 'plans.gold.cap_usd' must be dollars from 0 to 1000000, not -1\n"
    )
