"""What applications and SDKs put into tasks, through a worker to the provider: executed as meant, and bounded."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

import pytest
from aiohttp import web
from redis.asyncio import Redis

from tests.system import REPLIES, GatedStandIn, RunningSystem, running_system
from tollbook.inference.provider_users import ledger_user_key
from tollbook.inference.runtime import open_ledger
from tollbook.schemas.events import BudgetReserved
from tollbook.schemas.results import ErrorCode, TaskStatus
from tollbook.standin.apis import Api
from tollbook.views.audit.texts import bound_text

REPORTED: Final[list[dict[str, Any]]] = json.loads(
    (Path(__file__).parents[1] / "data" / "reported_tasks.json").read_text(encoding="utf-8")
)
HELLO: Final = {"role": "user", "content": "hello"}
TOOL: Final = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL: Final = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
IMAGE: Final = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
VISION: Final = {"model": "anthropic/claude-sonnet-4"}

# Task -> the fields that are sent.
SENT: Final[dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {
    "an assistant's tool call without content": (
        {"messages": [HELLO, {"role": "assistant", "content": None, "tool_calls": [CALL]},
                      {"role": "tool", "tool_call_id": "c1", "content": "rain"}], "tools": [TOOL]},
        {"messages": [HELLO, {"role": "assistant", "content": None, "tool_calls": [CALL]},
                      {"role": "tool", "tool_call_id": "c1", "content": "rain"}], "tools": [TOOL]},
    ),
    "a reply of openai-python, sent back whole": (
        {"messages": [HELLO, {"role": "assistant", "content": "hi", "refusal": None, "annotations": [], "audio": None,
                              "function_call": None, "tool_calls": None, "parsed": None}, HELLO]},
        {"messages": [HELLO, {"role": "assistant", "content": "hi"}, HELLO]},
    ),
    "a tool call of a parsed reply": (
        {"messages": [HELLO, {"role": "assistant", "content": [], "tool_calls": [
            {**CALL, "index": 0, "function": {**CALL["function"], "parsed_arguments": {"city": "Oslo"}}}]}]},
        {"messages": [HELLO, {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
    ),
    "arguments that are an object": (
        {"messages": [HELLO, {"role": "assistant", "tool_calls": [
            {"id": "c1", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}]}]},
        {"messages": [HELLO, {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
    ),
    "the older form of functions": (
        {"messages": [HELLO, {"role": "assistant", "content": None, "function_call": CALL["function"]},
                      {"role": "function", "name": "weather", "content": "rain"}],
         "functions": [TOOL["function"]], "function_call": {"name": "weather"}},
        {"functions": [TOOL["function"]], "function_call": {"name": "weather"}},
    ),
    "an image by its plain address": (
        {**VISION, "messages": [{"role": "user", "content": [
            {"type": "text", "text": "what?"}, {"type": "image_url", "image_url": "https://x.test/a.png"}]}]},
        {"messages": [{"role": "user", "content": [
            {"type": "text", "text": "what?"}, {"type": "image_url", "image_url": {"url": "https://x.test/a.png"}}]}]},
    ),
    "an image as data": (
        {**VISION, "messages": [{"role": "user", "content": [IMAGE]}]},
        {"messages": [{"role": "user", "content": [IMAGE]}]},
    ),
    "max_completion_tokens, as LangChain sends it": ({"max_completion_tokens": 17}, {"max_tokens": 17}),
    "nulls are absent": (
        {"system": None, "stop": None, "seed": None, "tools": None, "metadata": None, "campaign_id": None, "n": None},
        {"stop": None, "seed": None, "tools": None, "n": None},
    ),
    "what an SDK says that is so anyway": (
        {"n": 1, "stream": False, "modalities": ["text"], "service_tier": "default", "plugins": [], "extra_body": {}},
        {"n": None, "modalities": None, "service_tier": None, "plugins": None},
    ),
    "a schema": (
        {"response_format": {"type": "json_schema", "json_schema": {
            "name": "haiku", "strict": True,
            "schema": {"type": "object", "properties": {"a": {"enum": ["x", None], "default": None}}}}}},
        {"response_format": {"type": "json_schema", "json_schema": {
            "name": "haiku", "strict": True,
            "schema": {"type": "object", "properties": {"a": {"enum": ["x", None], "default": None}}}}}},
    ),
    "every way to sample": (
        {"top_k": 40, "min_p": 0.1, "top_a": 0.2, "frequency_penalty": -1, "presence_penalty": 2,
         "repetition_penalty": 1.1, "logit_bias": {"50256": -100}, "logprobs": True, "top_logprobs": 3},
        {"top_k": 40, "min_p": 0.1, "top_a": 0.2, "frequency_penalty": -1, "presence_penalty": 2,
         "repetition_penalty": 1.1, "logit_bias": {"50256": -100}, "logprobs": True, "top_logprobs": 3},
    ),
    "reasoning and what goes with it": (
        {"reasoning": {"effort": "high", "exclude": True}, "verbosity": "low", "parallel_tool_calls": False,
         "tool_choice": "none", "tools": [TOOL], "prediction": {"type": "content", "content": "hello"}},
        {"reasoning": {"effort": "high", "exclude": True}, "verbosity": "low", "parallel_tool_calls": False,
         "tool_choice": "none", "tools": [TOOL], "prediction": {"type": "content", "content": "hello"}},
    ),
    "one stop text": ({"stop": "END"}, {"stop": "END"}),
    "tags": ({"tags": {"team": "red", "cost_center": 42}}, {"tags": None}),
}  # fmt: skip


class RecordingStandIn(GatedStandIn):
    """The stand-in that keeps each request's body, and describes its models as a test wants."""

    def __init__(self, models: Sequence[Mapping[str, Any]] | None = None) -> None:
        super().__init__()
        self.bodies: list[dict[str, Any]] = []
        self.described = models

    async def _complete(self, request: web.Request, api: Api) -> web.StreamResponse:
        self.bodies.append(json.loads(await request.read()))
        return await super()._complete(request, api)

    async def _models(self, request: web.Request, api: Api) -> web.Response:
        if self.described is None:
            return await super()._models(request, api)
        return web.json_response({"data": list(self.described)})


@asynccontextmanager
async def recording(
    server_url: str, data: Path, *, models: Sequence[Mapping[str, Any]] | None = None, **values: Any
) -> AsyncIterator[tuple[RunningSystem, RecordingStandIn]]:
    standin = RecordingStandIn(models)
    async with running_system(data, server_url, provider=standin, **values) as running:
        yield running, standin


async def run(running: RunningSystem, task_id: str | int, task: Mapping[str, Any]) -> Any:
    """Publish a task as JSON and return its result."""
    task_id = str(task_id)
    has_input = "prompt" in task or "messages" in task
    fields = {"task": "score_post", "user_id": "u1", "task_id": task_id, "reply_to": REPLIES, **task}
    document = fields if has_input else {**fields, "prompt": "hello"}
    await running.publish("generation", [{"data": json.dumps(document)}])
    return (await running.answers([task_id]))[0]


async def test_every_reported_task_is_executed(redis_client: Redis, server_url: str, tmp_path: Path) -> None:
    async with recording(server_url, tmp_path / "data") as (running, standin):
        for number, case in enumerate(REPORTED):
            result = await run(running, number, case["task"])
            assert case["right"] == "executed"
            assert (result.status, result.error) == (TaskStatus.DONE, None), case["name"]
            sent = standin.bodies[-1]
            asked = {name: value for name, value in case["task"].items() if name not in ("prompt", "user_id")}
            assert {name: sent.get(name) for name in asked} == asked, case["name"]
            assert sent["user"] == str(case["task"].get("user_id", "u1"))
        users = await running.query("SELECT DISTINCT user_id FROM spend ORDER BY user_id")
        assert [row["user_id"] for row in users] == ["42", "O'Brien", "u1"]


async def test_requests_of_sdks_and_applications_are_sent_as_meant(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    async with recording(server_url, tmp_path / "data") as (running, standin):
        for number, (name, (task, expected)) in enumerate(SENT.items()):
            result = await run(running, number, task)
            assert (result.status, result.error) == (TaskStatus.DONE, None), name
            assert {field: standin.bodies[-1].get(field) for field in expected} == expected, name


async def test_ids_with_spaces_and_apostrophes_are_ids_everywhere(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    """G1 G2: a budget's name has the user's id in it; holds, tails and the projection go by it."""
    async with recording(server_url, tmp_path / "data") as (running, _):
        ids = {"user_id": "Mary O'Hara", "campaign_id": "spring sale '26"}
        result = await run(running, "order 17", ids)
        assert (result.status, result.task_id, result.user_id) == (TaskStatus.DONE, "order 17", "Mary O'Hara")
        rows = await running.query("SELECT user_id, reserved_usd, spent_usd > 0 AS has_spent FROM spend")
        assert [(row["user_id"], float(row["reserved_usd"]), row["has_spent"]) for row in rows] == [
            ("Mary O'Hara", 0.0, True)
        ]


MODELS: Final = [
    {
        "id": "anthropic/claude-3-haiku",
        "context_length": 300,
        "supported_parameters": ["max_tokens", "tools", "tool_choice", "stop"],
        "architecture": {"input_modalities": ["text"], "output_modalities": ["text"]},
    },
    {
        "id": "google/gemini-2.5-flash",
        "context_length": 10_000,
        "supported_parameters": ["max_tokens", "temperature", "seed", "tools"],
        "architecture": {"input_modalities": ["text"], "output_modalities": ["text"]},
    },
    {"id": "openai/gpt-4o-mini", "supported_parameters": ["max_tokens", "logprobs"]},
]


async def test_an_unsupported_parameter_is_refused_before_money_is_held(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    async with recording(server_url, tmp_path / "data", models=MODELS) as (running, standin):
        refused = await run(running, 1, {"logprobs": True})
        assert (refused.status, refused.error_code) == (TaskStatus.INVALID, ErrorCode.INVALID_TASK)
        assert refused.error == "anthropic/claude-3-haiku does not support 'logprobs'"
        pictured = await run(running, 2, {"messages": [{"role": "user", "content": [IMAGE]}]})
        assert pictured.error == "anthropic/claude-3-haiku does not support 'images'"
        assert standin.bodies == []
        assert await running.query("SELECT * FROM events WHERE type <> 'policy-applied'") == []
        # What the route sets is left out; a parameter that no model lists is not judged.
        done = await run(running, 3, {"tools": [TOOL], "min_p": 0.1})
        assert done.status is TaskStatus.DONE
        assert "temperature" not in standin.bodies[-1]
        assert standin.bodies[-1]["min_p"] == 0.1


async def test_a_fallback_that_supports_what_the_task_sets_is_asked_first(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    """G1: by its own price, and held against the budgets of that model."""
    async with recording(server_url, tmp_path / "data", models=MODELS) as (running, standin):
        done = await run(running, 1, {"seed": 7})
        assert (done.status, done.model_used) == (TaskStatus.DONE, "google/gemini-2.5-flash")
        assert [(body["model"], body["seed"]) for body in standin.bodies] == [("google/gemini-2.5-flash", 7)]
        rows = await running.query("SELECT type, model FROM events WHERE call_id = '1' ORDER BY seq")
        assert [row["type"] for row in rows] == ["budget-reserved", "model-called", "cost-recorded"]
        assert {row["model"] for row in rows} == {"google/gemini-2.5-flash"}
        # Its own fallbacks are those after it, and the first model is none of them.
        failed = await run(running, 2, {"seed": 7, "prompt": "[[fault=http_404]]"})
        assert (failed.status, len(standin.bodies)) == (TaskStatus.FAILED, 2)


@pytest.mark.slow
async def test_a_prompt_is_bounded_by_what_the_model_can_read(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    async with recording(server_url, tmp_path / "data", models=MODELS) as (running, _):
        assert (await run(running, 1, {"prompt": "x" * 500})).status is TaskStatus.DONE
        rows = await running.query("SELECT payload FROM events WHERE type = 'budget-reserved'")
        bound = BudgetReserved.model_validate_json(rows[0]["payload"]).bound
        assert (bound.prompt_tokens, bound.prompt_basis) == (300, "context_length")
        assert bound_text(bound).startswith("300 prompt tokens (all that the model can read) x ")


MEDIA: Final = [
    {"type": "input_audio", "input_audio": {"data": "//uQ", "format": "mp3"}},
    {"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,AAAA"}},
    {"type": "video_url", "video_url": {"url": "https://x.test/a.mp4"}},
    IMAGE,
]
MEDIA_POLICY: Final = """
[models."google/gemini-2.5-flash"]
image_tokens = 1_000
audio_tokens_per_second = 32
file_tokens = 2_000
video_tokens = 3_000

[prices."google/gemini-2.5-flash"]
prompt = 0.3
completion = 2.5
audio = 1
video = 0.3
web_search = 0.035
"""


async def test_media_and_searches_are_sent_where_the_policy_bounds_them(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    """G1 G8."""
    policy = tmp_path / "tollbook.toml"
    policy.write_text(MEDIA_POLICY)
    task = {"messages": [{"role": "user", "content": MEDIA}], "model": "google/gemini-2.5-flash"}
    async with recording(server_url, tmp_path / "data", policy_file=policy) as (running, standin):
        result = await run(running, 1, task)
        assert (result.status, result.error) == (TaskStatus.DONE, None)
        assert standin.bodies[-1]["messages"] == task["messages"]
        rows = await running.query("SELECT payload FROM events WHERE type = 'budget-reserved'")
        bound = BudgetReserved.model_validate_json(rows[0]["payload"]).bound
        surcharge = -(-32 * (1_000 - 300) // 300)  # A second of sound costs more than other tokens.
        assert bound.prompt_tokens == 128 + 32 + 1_000 + 32 + 2_000 + 3_000 + surcharge
        refused = await run(running, 2, {**task, "model": "anthropic/claude-sonnet-4"})
        assert refused.error_code is ErrorCode.PRICE_UNKNOWN
        assert "has no upper bound: set its audio_tokens in the policy's [models]" in refused.error
        searched = await run(running, 3, {"model": task["model"], "web_search_options": {}})
        assert "a web search by google/gemini-2.5-flash has no upper bound" in searched.error
        assert len(standin.bodies) == 1


FILES_POLICY: Final = """
[models."anthropic/claude-3-haiku"]
file_tokens = 100
[models."google/gemini-2.5-flash"]
file_tokens = 100

[prices."anthropic/claude-3-haiku"]
prompt = 1
completion = 2
file = 0.002
"""


async def test_files_are_read_by_the_provider_only_where_the_policy_pays_for_it(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    """G1 G8: both models take text alone, and one has a price of reading."""
    policy = tmp_path / "tollbook.toml"
    policy.write_text(FILES_POLICY)
    task = {"messages": [{"role": "user", "content": [{"type": "text", "text": "?"}, MEDIA[1]]}]}
    parser = [{"id": "file-parser", "pdf": {"engine": "mistral-ocr"}}]
    async with recording(server_url, tmp_path / "data", models=MODELS, policy_file=policy) as (running, standin):
        refused = await run(running, 1, {**task, "model": "google/gemini-2.5-flash"})
        assert refused.error == "google/gemini-2.5-flash does not support 'files'"
        named = await run(running, 2, {**task, "plugins": parser})
        assert named.error_code is ErrorCode.INVALID_TASK
        assert "'plugins' cannot be set" in named.error
        assert await running.query("SELECT * FROM events WHERE type <> 'policy-applied'") == []
        done = await run(running, 3, {**task, "model": "anthropic/claude-3-haiku"})
        assert (done.status, len(standin.bodies)) == (TaskStatus.DONE, 1)
        rows = await running.query("SELECT amount_usd FROM events WHERE type = 'budget-reserved'")
        limit = standin.bodies[0]["max_tokens"]
        prompt = 1 + 128 + 32 + 100
        assert rows[0]["amount_usd"] == Decimal(prompt + 2 * limit) / 1_000_000 + Decimal("0.002")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["hashed", "none", "plain"])
async def test_the_provider_gets_a_hashed_name_for_a_user(
    form: str, redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    """G10."""
    async with recording(server_url, tmp_path / "data", provider_user=form) as (running, standin):
        for number, user in enumerate(("ann", "ann", "bob")):
            assert (await run(running, number, {"user_id": user})).status is TaskStatus.DONE
        names = [body.get("user") for body in standin.bodies]
        if form != "hashed":
            assert names == (["ann", "ann", "bob"] if form == "plain" else [None] * 3)
            return
        assert names[0] == names[1] != names[2]
        assert all(re.fullmatch("[0-9a-f]{64}", str(name)) for name in names)
        # The key is in Redis alone: in no event, and so in no archive and no projection.
        key = running.system.handle.user_key.hex()
        events = await redis_client.xrange(running.keys.ledger)
        assert key not in str(events)
        assert await redis_client.hgetall(running.keys.secrets) == {b"provider_user_key": key.encode()}


@pytest.mark.slow
async def test_an_older_ledger_gets_its_key_once(redis_client: Redis, server_url: str, tmp_path: Path) -> None:
    async with recording(server_url, tmp_path / "data") as (running, _):
        await redis_client.delete(running.keys.secrets)
        pipeline, settings = running.system.handle.pipeline, running.system.runtime.settings
        made = await asyncio.gather(*(ledger_user_key(pipeline, running.keys) for _ in range(8)))
        assert len(set(made)) == 1
        async with open_ledger(settings, server_url, may_create=False) as again:
            assert again.user_key == made[0]
            assert made[0].hex() not in repr(again)


@pytest.mark.slow
async def test_a_temperature_is_sent_only_where_the_route_or_the_task_sets_one(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    async with recording(server_url, tmp_path / "data", routes={"score_post": {"temperature": None}}) as (
        running,
        sent,
    ):
        assert (await run(running, 1, {})).status is TaskStatus.DONE
        assert (await run(running, 2, {"temperature": 0.5})).status is TaskStatus.DONE
        assert (await run(running, 3, {"task": "generate_draft"})).status is TaskStatus.DONE
        assert [body.get("temperature") for body in sent.bodies] == [None, 0.5, 0.7]
        # Replies are streamed, so that their ids are known early.
        streamed = {"stream", "stream_options"}
        assert sent.bodies[0].keys() == {"model", "messages", "max_tokens", "user", "provider"} | streamed
