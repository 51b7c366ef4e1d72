"""Several providers as operators meet them: keys that are missing, `doctor`, the stand-in, a task through a worker."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
from redis.asyncio import Redis

from tests.servers import wait_until
from tests.system import BackgroundCommand, run_cli
from tests.two_providers import TWO_PROVIDERS, addresses_of
from tollbook.standin import StandIn, StandInConfig

POLICY: Final = (
    TWO_PROVIDERS
    + """
[tasks.classify_archetype]
provider = "openai"
model = "gpt-5-mini"
fallback = {{ provider = "claude", model = "claude-haiku-4-5" }}
max_tokens = 200
[tasks.generate_draft]
provider = "claude"
model = "claude-haiku-4-5"
max_tokens = 200
[tasks.score_post]
provider = "claude"
model = "claude-gone"
max_tokens = 200
[tasks.extract_patterns]
provider = "openai"
model = "gpt-4o-mini"
max_tokens = 200
"""
)
REAL: Final = {"openai": "https://api.openai.com/v1", "claude": "https://api.anthropic.com/v1"}
PUBLISH: Final = ("publish", "generation", "generate_draft", "Write", "--user", "u1", "--json", "--wait", "30")


@asynccontextmanager
async def up(*arguments: str, cwd: Path, env: dict[str, str]) -> AsyncGenerator[None]:
    command = await BackgroundCommand.start("up", *arguments, cwd=cwd, env=env)
    try:
        await wait_until(
            lambda: "Tollbook is up" in command.stdout or command.process.returncode is not None, what="tollbook up"
        )
        assert "Tollbook is up" in command.stdout, command.stderr
        yield
    finally:
        await command.end()


@pytest.mark.slow
async def test_the_default_providers_key_is_not_needed_if_no_route_names_it(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    assert await redis_client.ping()
    async with StandIn(StandInConfig(api_key="sk-one")) as server:
        (tmp_path / "tollbook.toml").write_text(POLICY.format(**addresses_of(openai=server, claude=server)))
        env = {"REDIS_URL": server_url, "TEST_OPENAI_KEY": "sk-one"}

        refused = await run_cli("up", cwd=tmp_path, env=env)
        assert (refused.code, refused.stdout) == (1, "")
        assert "provider claude: TEST_CLAUDE_KEY is not set" in refused.stderr
        assert "OPENROUTER_API_KEY" not in refused.stderr

        env["TEST_CLAUDE_KEY"] = "sk-one"
        async with up(cwd=tmp_path, env=env):
            result: dict[str, Any] = (await run_cli(*PUBLISH, cwd=tmp_path, env=env)).json()
            assert (result["status"], result["model_used"]) == ("done", "claude-haiku-4-5")
            assert result["cost_usd"] == f"{sum(server.book.totals().values()) / 1e9:.9f}"
            shown = await run_cli("audit", "call", result["task_id"], cwd=tmp_path, env=env)
            assert "claude-haiku-4-5 at claude" in shown.stdout

            # A worker elsewhere takes the policy from the ledger, and needs the keys that it names.
            elsewhere = tmp_path / "elsewhere"
            elsewhere.mkdir()
            env["TOLLBOOK_DATA_DIR"] = str(tmp_path / "data")
            worker = await run_cli("worker", cwd=elsewhere, env={**env, "TEST_OPENAI_KEY": ""})
            assert worker.code == 1
            assert "provider openai: TEST_OPENAI_KEY is not set" in worker.stderr

            findings = {
                each["check"]: each for each in (await run_cli("doctor", "--json", cwd=tmp_path, env=env)).json()
            }
            assert "provider" not in findings
            assert (findings["provider openai"]["state"], findings["provider claude"]["state"]) == ("ok", "ok")
            assert "the key is accepted" in findings["provider claude"]["found"]
            assert "claude-gone at claude is no longer offered" in findings["route score_post"]["found"]

            wrong = await run_cli("doctor", "--json", cwd=tmp_path, env={**env, "TEST_CLAUDE_KEY": "sk-two"})
            findings = {each["check"]: each for each in wrong.json()}
            assert (wrong.code, findings["provider claude"]["state"]) == (1, "failed")
            assert "check TEST_CLAUDE_KEY" in findings["provider claude"]["advice"]
            gone = await run_cli("doctor", "--json", cwd=tmp_path, env={**env, "TEST_CLAUDE_KEY": ""})
            findings = {each["check"]: each for each in gone.json()}
            assert "TEST_CLAUDE_KEY is not set" in findings["provider claude"]["found"]
            assert "sk-one" not in wrong.stdout + gone.stdout + shown.stdout


@pytest.mark.slow
async def test_the_stand_in_stands_in_for_every_provider(redis_client: Redis, server_url: str, tmp_path: Path) -> None:
    """With the stand-in, nobody must pay a provider of the policy, even if its key is set."""
    assert await redis_client.ping()
    (tmp_path / "tollbook.toml").write_text(POLICY.format(**REAL))
    env = {"REDIS_URL": server_url, "TEST_OPENAI_KEY": "sk-real", "TEST_CLAUDE_KEY": "sk-real"}
    for workers in ((), ("--workers", "1")):
        async with up("--stand-in", *workers, cwd=tmp_path, env=env):
            result = (await run_cli(*PUBLISH, cwd=tmp_path, env=env)).json()
            assert (result["status"], result["model_used"]) == ("done", "claude-haiku-4-5"), result
            assert "[stand-in]" in result["content"]
            findings = {
                each["check"]: each for each in (await run_cli("doctor", "--json", cwd=tmp_path, env=env)).json()
            }
            assert "http://127.0.0.1" in findings["provider claude"]["found"]


@pytest.mark.slow
async def test_mistakes_about_providers_are_one_line_each(tmp_path: Path) -> None:
    (tmp_path / "tollbook.toml").write_text(POLICY.format(**REAL).replace('provider = "openai"', 'provider = "opnai"'))
    refused = await run_cli("up", cwd=tmp_path)
    assert refused.code == 1
    assert (
        "tollbook.toml:13: 'tasks.classify_archetype.provider': unknown provider 'opnai'; did you mean"
        in refused.stderr
    )
