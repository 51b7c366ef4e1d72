"""Redis, DuckDB and settings that fail reach an application as errors of the public tree, and as nothing else."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from pydantic import BaseModel
from redis.asyncio import Redis

from tollbook import (
    AppError,
    BaselineUnavailable,
    CostTracker,
    InferenceClient,
    InvalidTask,
    LedgerUnavailable,
    Publisher,
    ResultTimeout,
    SettingsError,
    UsageService,
    connect_runtime,
)
from tollbook.inference.runtime import open_ledger
from tollbook.inference.settings import Settings, load_settings
from tollbook.ledger.errors import RedisCannotServe
from tollbook.ledger.keys import Keys
from tollbook.ledger.server.embedded import EmbeddedServer

PASSWORD = "correct-horse"


def publishing(publisher: Publisher) -> dict[str, Callable[[], Awaitable[object]]]:
    """Return every public method of a publisher that asks Redis."""
    return {
        "publish": lambda: publisher.publish("monitoring", "ping"),
        "publish_and_wait": lambda: publisher.publish_and_wait("monitoring", "ping", timeout_s=5),
        "result": lambda: publisher.result("t1"),
        "wait": lambda: publisher.wait("t1", timeout_s=5),
    }


def calling() -> dict[str, Callable[[], Awaitable[object]]]:
    """Return every public method of the classes that use the runtime."""
    tracker, usage = CostTracker(), UsageService()
    return {
        "call": lambda: InferenceClient("score_post").call("a post", "u1"),
        "check_budget": lambda: tracker.check_budget("u1"),
        "record_usage": lambda: tracker.record_usage("u1", "0.1"),
        "get_usage_summary": lambda: tracker.get_usage_summary("u1"),
        "get_usage_for_user": lambda: usage.get_usage_for_user("u1"),
        "check_action_limit": lambda: usage.check_action_limit("u1", "score_post", prompt="a post"),
    }


async def refusals(settings: Settings) -> dict[str, AppError]:
    """Return what each public method raises, by its name."""
    async with connect_runtime(settings), Publisher(settings) as publisher:
        methods = {**publishing(publisher), **calling()}
        outcomes = await asyncio.gather(*(method() for method in methods.values()), return_exceptions=True)
    errors: dict[str, AppError] = {}
    for name, outcome in zip(methods, outcomes, strict=True):
        assert isinstance(outcome, AppError), (name, outcome)
        errors[name] = outcome
    return errors


def settings_for(redis_url: str | None, data_dir: Path) -> Settings:
    return load_settings(env_file=None, redis_url=redis_url, data_dir=data_dir, openrouter_api_key="sk-or-v1-test")


@asynccontextmanager
async def speaker_of_http() -> AsyncGenerator[str]:
    """Run a server that is not Redis."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"


@pytest.mark.parametrize("url", ["redis://:hidden@127.0.0.1:1/0", "redis://:hidden@no-such-host.invalid:6379/0"])
async def test_a_server_that_is_not_there(tmp_path: Path, url: str) -> None:
    for name, error in (await refusals(settings_for(url, tmp_path))).items():
        assert type(error) is LedgerUnavailable, name
        assert "Redis did not answer" in error.message, name
        assert "hidden" not in error.message, name


async def test_a_server_that_is_no_redis(tmp_path: Path) -> None:
    async with speaker_of_http() as url:
        errors = await refusals(settings_for(url, tmp_path))
    assert {type(error) for error in errors.values()} == {LedgerUnavailable}


async def test_a_server_that_requires_a_password(tmp_path: Path, private_server: EmbeddedServer) -> None:
    address = private_server.url.rpartition("@")[2]
    for url in (f"redis://{address}", f"redis://:wrong-horse@{address}"):
        for name, error in (await refusals(settings_for(url, tmp_path))).items():
            assert type(error) is LedgerUnavailable, name
            assert "Redis refused the log-in" in error.message, name
            assert "give a user and a password in REDIS_URL" in error.message, name
            assert "wrong-horse" not in error.message, name


async def test_a_user_who_may_not_do_what_is_needed(tmp_path: Path, private_server: EmbeddedServer) -> None:
    async with Redis.from_url(private_server.url) as redis:
        await redis.execute_command("ACL", "SETUSER", "guest", "on", f">{PASSWORD}", "~*", "+info", "+ping")
    url = f"redis://guest:{PASSWORD}@{private_server.url.rpartition('@')[2]}"
    for name, error in (await refusals(settings_for(url, tmp_path))).items():
        assert type(error) is LedgerUnavailable, name
        assert "Redis refused a command" in error.message, name


async def test_keys_that_hold_something_else(tmp_path: Path, redis_client: Redis, server_url: str) -> None:
    await redis_client.set(Keys().meta, "no hash")
    await redis_client.set("monitoring", "no stream")
    for name, error in (await refusals(settings_for(server_url, tmp_path))).items():
        assert type(error) is LedgerUnavailable, name
        assert "Redis refused a command (WRONGTYPE" in error.message, name


async def test_no_ledger_and_no_projection(tmp_path: Path, redis_client: Redis, server_url: str) -> None:
    settings = settings_for(server_url, tmp_path)
    async with connect_runtime(settings):
        for method in calling().values():
            with pytest.raises(LedgerUnavailable, match="there is no ledger"):
                await method()
    async with open_ledger(settings, server_url), connect_runtime(settings):
        for method in calling().values():
            with pytest.raises(BaselineUnavailable, match="no projector runs"):
                await method()


async def test_a_system_that_does_not_run_or_left_a_damaged_file(tmp_path: Path) -> None:
    settings = settings_for(None, tmp_path)
    assert all("start `tollbook up`" in error.message for error in (await refusals(settings)).values())
    (tmp_path / "endpoint.json").write_text("{")
    for name, error in (await refusals(settings)).items():
        assert type(error) is LedgerUnavailable, name
        assert "is damaged" in error.message, name


# What no argument is, whatever it stands for.
NOTHING = (5.5, float("nan"), True, 10**5_000, b"\xff", ["u1"], {"a": 1}, {1}, object(), int, "\ud800", "a\0b")


async def sent(publisher: Publisher, entry: Any) -> object:
    return await publisher.send(entry)


async def streamed(publisher: Publisher, **arguments: Any) -> None:
    async for _ in publisher.stream(**arguments):
        pass


def given(value: Any, publisher: Publisher) -> dict[str, Callable[[], Awaitable[object]]]:
    """Return public methods with this value as one of their arguments, each by the argument's name."""
    tracker, usage, known = CostTracker(), UsageService(), {"task_id": "t1", "timeout_s": 0}
    call = InferenceClient("score_post").call
    return {
        "response_model of call": lambda: call("a post", "u1", response_model=value),
        "stream of publish": lambda: publisher.publish(value, "ping"),
        "task of publish": lambda: publisher.publish("monitoring", value),
        "metadata of publish": lambda: publisher.publish("monitoring", "pong", metadata=value),
        "seed of publish": lambda: publisher.publish("monitoring", "pong", seed=value),
        "entry of send": lambda: sent(publisher, value),
        "task_id of wait": lambda: publisher.wait(value, timeout_s=0),
        "response_model of wait": lambda: publisher.wait(**known, response_model=value),
        "task_id of stream": lambda: streamed(publisher, task_id=value, timeout_s=0),
        "user_id of summary": lambda: tracker.get_usage_summary(value),
        "plan of summary": lambda: tracker.get_usage_summary("u1", value),
        "estimate of check": lambda: tracker.check_budget("u1", estimated_cost_usd=value),
        "user_id of record": lambda: tracker.record_usage(value, 1),
        "cost of record": lambda: tracker.record_usage("u1", value),
        "model of record": lambda: tracker.record_usage("u1", 1, model=value),
        "campaign of record": lambda: tracker.record_usage("u1", 1, campaign_id=value),
        "tags of record": lambda: tracker.record_usage("u1", 1, tags=value),
        "reason of record": lambda: tracker.record_usage("u1", 1, reason=value),
        "key of record": lambda: tracker.record_usage("u1", 1, idempotency_key=value),
        "plan of record": lambda: tracker.record_usage("u1", 1, plan=value),
        "user_id of limit": lambda: usage.check_action_limit(value, "score_post"),
        "action of limit": lambda: usage.check_action_limit("u1", value),
        "prompt of limit": lambda: usage.check_action_limit("u1", "score_post", prompt=value),
    }


async def test_arguments_of_any_type(tmp_path: Path, redis_client: Redis, server_url: str) -> None:
    settings = settings_for(server_url, tmp_path)
    async with open_ledger(settings, server_url), connect_runtime(settings), Publisher(settings) as publisher:
        for value in NOTHING:
            for name, method in given(value, publisher).items():
                (raised,) = await asyncio.gather(method(), return_exceptions=True)
                assert isinstance(raised, AppError), (name, type(value), raised)
        for value in (b"", "soon", float("nan"), [1], None):
            with pytest.raises(InvalidTask, match="'timeout_s' must be a number"):
                await publisher.publish_and_wait("monitoring", "ping", timeout_s=cast("Any", value))
        assert await redis_client.xlen("monitoring") == 0


async def test_ids_may_be_whole_numbers_as_in_tasks(tmp_path: Path, redis_client: Redis, server_url: str) -> None:
    settings = settings_for(server_url, tmp_path)
    async with open_ledger(settings, server_url), Publisher(settings) as publisher:
        task_id: Any = 42
        assert await publisher.publish("monitoring", "ping", task_id=task_id) == "42"
        assert await publisher.result(task_id) is None
        with pytest.raises(ResultTimeout, match="no result for 42"):
            await publisher.wait(task_id, timeout_s=0)


async def test_a_model_that_json_cannot_hold(tmp_path: Path, server_url: str) -> None:
    class Handler(BaseModel):
        handle: Callable[[], None]

    async with Publisher(settings_for(server_url, tmp_path)) as publisher:
        with pytest.raises(InvalidTask, match="Handler has no JSON schema"):
            await publisher.publish("scraping", "score_post", "a post", user_id="u1", response_format=Handler)


async def test_settings_that_are_none() -> None:
    for opening in (connect_runtime(cast("Any", 5)), Publisher(cast("Any", 5))):
        with pytest.raises(SettingsError, match="must be what"):
            await opening.__aenter__()


async def test_wrong_settings_are_reported_before_anything_is_connected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REDIS_URL", "http://127.0.0.1:6379")
    for opening in (connect_runtime(), Publisher()):
        with pytest.raises(SettingsError, match="REDIS_URL") as refused:
            await opening.__aenter__()
        assert refused.value.code == "SETTINGS_INVALID"


async def test_a_task_that_redis_refused_was_not_published(private_server: EmbeddedServer, tmp_path: Path) -> None:
    settings = load_settings(env_file=None, redis_url=private_server.url, data_dir=tmp_path)
    async with Publisher(settings) as publisher, Redis.from_url(private_server.url) as redis:
        await publisher.publish("monitoring", "ping")
        await redis.config_set("maxmemory", 1)
        with pytest.raises(RedisCannotServe, match=r"task t1 was not published: .* raise maxmemory"):
            await publisher.publish("monitoring", "ping", task_id="t1")
        await redis.config_set("maxmemory", 0)
        assert await redis.xlen("monitoring") == 1
