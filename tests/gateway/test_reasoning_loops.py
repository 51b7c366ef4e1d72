"""Loops of tools with a model that reasons: what its provider wants back of the first turn, it gets with the second.

Over the gateway, by each of the three APIs, streamed and whole, before a router and before Anthropic's own API.
"""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
from aiohttp import web
from redis.asyncio import Redis

from tests.gateway.serving import Served, open_served
from tollbook.standin import SCENARIOS, FaultPlan, StandIn
from tollbook.standin.apis import Api

pytestmark = pytest.mark.slow

POLICY: Final = """
[providers.router]
base_url = "{url}/openrouter/v1"
key_env = "TEST_PROVIDER_KEY"
dialect = "openrouter"

[providers.claude]
base_url = "{url}/anthropic/v1"
key_env = "TEST_PROVIDER_KEY"
dialect = "anthropic"

[tasks.routed]
provider = "router"
model = "anthropic/claude-sonnet-4"
max_tokens = 500

[tasks.direct]
provider = "claude"
model = "claude-haiku-4-5"
max_tokens = 500
"""
CHOICE: Final = SCENARIOS["signed_thinking"].choice or {}
DETAILS: Final[list[dict[str, Any]]] = CHOICE["message"]["reasoning_details"]
SIGNED, ENCRYPTED = DETAILS
BLOCKS: Final = [
    {"type": "thinking", "thinking": SIGNED["text"], "signature": SIGNED["signature"]},
    {"type": "redacted_thinking", "data": ENCRYPTED["data"]},
]
QUESTION: Final = {"role": "user", "content": "Who is seven?"}
FUNCTION: Final[dict[str, Any]] = {"name": "look_up", "parameters": {"type": "object", "properties": {}}}


class RecordingStandIn(StandIn):
    """A router and Anthropic's own API, which keeps each request's body."""

    def __init__(self) -> None:
        super().__init__()
        self.bodies: list[dict[str, Any]] = []

    async def _complete(self, request: web.Request, api: Api) -> web.StreamResponse:
        self.bodies.append(json.loads(await request.read()))
        return await super()._complete(request, api)


@dataclass(frozen=True, slots=True)
class Loop:
    """A gateway and its providers."""

    served: Served
    provider: RecordingStandIn

    def script(self, *faults: str | None) -> None:
        self.provider.faults = FaultPlan(script=faults)

    async def post(self, path: str, body: dict[str, Any], **headers: str) -> Any:
        """Return a whole answer, or the data of an answer's events."""
        reply = await self.served.client.post(path, json=body, headers=headers)
        assert reply.status_code == 200, reply.text
        if not body.get("stream"):
            return reply.json()
        lines = [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: ")]
        return [json.loads(line) for line in lines if line != "[DONE]"]

    def sent_back(self, task: str) -> list[dict[str, Any]]:
        """Return what the provider got of its reasoning with the last request."""
        said = next(each for each in self.provider.bodies[-1]["messages"] if each["role"] == "assistant")
        if task == "routed":
            return said["reasoning_details"]
        return [block for block in said["content"] if "thinking" in block["type"]]


@pytest.fixture
async def loop(
    redis_client: Redis, server_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Loop]:
    assert await redis_client.ping()
    monkeypatch.setenv("TEST_PROVIDER_KEY", "sk-secret")
    async with RecordingStandIn() as provider:
        policy = tmp_path / "providers.toml"
        policy.write_text(POLICY.format(url=provider.root_url))
        async with open_served(server_url, tmp_path, policy_file=policy) as served:
            yield Loop(served, provider)
            await served.calling.check_guarantees(is_exact=False)


def joined_message(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """Join chunks as client libraries do: by index, texts go on."""
    message: dict[str, Any] = {"role": "assistant", "content": None}
    lists: dict[str, dict[int, dict[str, Any]]] = {"reasoning_details": {}, "tool_calls": {}}
    for chunk in chunks:
        for choice in chunk["choices"]:
            for name, known in lists.items():
                for piece in choice["delta"].get(name, ()):
                    add_piece(known.setdefault(piece["index"], {}), piece)
    for call in lists["tool_calls"].values():
        del call["index"]
    return {**message, **{name: list(known.values()) for name, known in lists.items()}}


def add_piece(known: dict[str, Any], piece: dict[str, Any]) -> None:
    for name, value in piece.items():
        if name == "function":
            add_piece(known.setdefault(name, {}), value)
        elif name in ("text", "arguments"):
            known[name] = known.get(name, "") + value
        else:
            known[name] = value


def joined_blocks(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join the events of a message as Anthropic's client libraries do."""
    blocks: list[dict[str, Any]] = []
    for event in events:
        if event["type"] == "content_block_start":
            blocks.append({**event["content_block"], "partial": ""})
        elif event["type"] == "content_block_delta":
            delta, block = event["delta"], blocks[event["index"]]
            block["partial"] += delta.get("partial_json", "")
            for name in ("thinking", "signature", "text"):
                if name in delta:
                    block[name] += delta[name]
    for block in blocks:
        partial = block.pop("partial")
        if block["type"] == "tool_use":
            block["input"] = json.loads(partial)
    return blocks


STREAMED: Final = pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "streamed"])
TASKS: Final = pytest.mark.parametrize("task", ["routed", "direct"])
EXPECTED: Final = {"routed": DETAILS, "direct": BLOCKS}


@TASKS
@STREAMED
async def test_chat_completions(loop: Loop, task: str, is_streamed: bool) -> None:
    loop.script("signed_thinking", None)
    body: dict[str, Any] = {"model": task, "tools": [{"type": "function", "function": FUNCTION}]}
    first = await loop.post("/v1/chat/completions", {**body, "messages": [QUESTION], "stream": is_streamed})

    said = joined_message(first) if is_streamed else first["choices"][0]["message"]
    assert said["reasoning_details"] == DETAILS
    result = {"role": "tool", "tool_call_id": said["tool_calls"][0]["id"], "content": "Seven is a number."}
    await loop.post("/v1/chat/completions", {**body, "messages": [QUESTION, said, result]})

    assert loop.sent_back(task) == EXPECTED[task]


@TASKS
@STREAMED
async def test_messages(loop: Loop, task: str, is_streamed: bool) -> None:
    loop.script("signed_thinking", None)
    tool = {"name": FUNCTION["name"], "input_schema": FUNCTION["parameters"]}
    body: dict[str, Any] = {"model": task, "max_tokens": 500, "tools": [tool]}
    first = await loop.post("/v1/messages", {**body, "messages": [QUESTION], "stream": is_streamed})

    said = joined_blocks(first) if is_streamed else first["content"]
    thought, called = said
    assert (thought["type"], thought["thinking"]) == ("thinking", SIGNED["text"])
    result = {"type": "tool_result", "tool_use_id": called["id"], "content": "Seven is a number."}
    turns = [QUESTION, {"role": "assistant", "content": said}, {"role": "user", "content": [result]}]
    await loop.post("/v1/messages", {**body, "messages": turns})

    assert loop.sent_back(task) == EXPECTED[task]


@TASKS
@STREAMED
async def test_responses(loop: Loop, task: str, is_streamed: bool) -> None:
    loop.script("signed_thinking", None)
    body: dict[str, Any] = {"model": task, "tools": [{"type": "function", **FUNCTION}]}
    first = await loop.post("/v1/responses", {**body, "input": [QUESTION], "stream": is_streamed})

    said = first[-1]["response"]["output"] if is_streamed else first["output"]
    assert [item["type"] for item in said] == ["reasoning", "function_call"]
    result = {"type": "function_call_output", "call_id": said[1]["call_id"], "output": "Seven is a number."}
    await loop.post("/v1/responses", {**body, "input": [QUESTION, *said, result]})

    assert loop.sent_back(task) == EXPECTED[task]


@TASKS
async def test_an_answer_from_the_stored_result_has_its_reasoning_too(loop: Loop, task: str) -> None:
    loop.script("signed_thinking")
    named = {"idempotency-key": "a"}
    body = {"model": task, "messages": [QUESTION]}
    first = await loop.post("/v1/chat/completions", body, **named)
    again = await loop.post("/v1/chat/completions", body, **named)
    assert again["choices"][0]["message"] == first["choices"][0]["message"]
    assert again["choices"][0]["message"]["reasoning_details"] == DETAILS
    streamed = await loop.post("/v1/chat/completions", {**body, "stream": True}, **named)
    assert joined_message(streamed)["reasoning_details"] == DETAILS
