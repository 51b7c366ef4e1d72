"""Responses and Messages over HTTP: translated both ways, refused in their own form, on the same ledger."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from tests.gateway.serving import KEY, MODEL, Served, open_served

MESSAGES: dict[str, Any] = {
    "model": MODEL,
    "max_tokens": 500,
    "system": "Be brief.",
    "messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
}


@pytest.fixture
async def served(redis_client: Redis, server_url: str, tmp_path: Path) -> AsyncIterator[Served]:
    async with open_served(server_url, tmp_path, gateway_wait_s=0.2) as served:
        yield served
        await served.calling.check_guarantees()


async def test_responses_are_answered_in_their_form(served: Served) -> None:
    reply = await served.client.post(
        "/v1/responses", json={"model": MODEL, "input": "Hello", "instructions": "Be brief."}
    )

    assert reply.status_code == 200, reply.text
    document = reply.json()
    assert (document["object"], document["status"]) == ("response", "completed")
    assert document["output"][-1]["content"][0]["type"] == "output_text"
    assert document["usage"]["output_tokens"] > 0
    assert await served.calling.spent() == served.calling.booked() > 0


async def test_a_response_may_have_to_call_a_tool_by_name(served: Served) -> None:
    tool = {"type": "function", "name": "look_up", "parameters": {"type": "object", "properties": {}}}
    choice = {"type": "function", "name": "look_up"}

    reply = await served.client.post(
        "/v1/responses", json={"model": MODEL, "input": "Hello", "tools": [tool], "tool_choice": choice}
    )

    assert reply.status_code == 200, reply.text
    assert reply.json()["tool_choice"] == choice
    assert reply.json()["output"][0]["name"] == "look_up"


async def test_messages_are_answered_in_their_form(served: Served) -> None:
    reply = await served.client.post("/v1/messages", json=MESSAGES, headers={"x-api-key": KEY})

    assert reply.status_code == 200, reply.text
    document = reply.json()
    assert (document["type"], document["role"], document["stop_reason"]) == ("message", "assistant", "end_turn")
    assert document["content"][0]["type"] == "text"
    assert document["usage"]["input_tokens"] > 0
    assert await served.calling.spent() == served.calling.booked() > 0


async def test_refusals_have_the_form_of_their_api(served: Served) -> None:
    await served.calling.set_cap(1_000)

    anthropic = await served.client.post("/v1/messages", json=MESSAGES)
    openai = await served.client.post("/v1/responses", json={"model": MODEL, "input": "Hello"})
    wrong = await served.client.post("/v1/messages", json={**MESSAGES, "max_tokens": 0})
    keyless = await served.client.post("/v1/messages", json=MESSAGES, headers={"authorization": ""})

    assert (anthropic.status_code, openai.status_code) == (402, 402)
    assert anthropic.json()["type"] == "error"
    assert anthropic.json()["error"]["type"] == "billing_error"
    assert anthropic.json()["request_id"] == anthropic.headers["x-request-id"]
    assert openai.json()["error"]["code"] == "plan_limit_reached"
    assert (wrong.status_code, wrong.json()["error"]["type"]) == (400, "invalid_request_error")
    assert (keyless.status_code, keyless.json()["error"]["type"]) == (401, "authentication_error")


@pytest.mark.parametrize("thread", [{"type": "create"}, {"type": "continue", "previous_message_id": "msg_1"}])
async def test_a_thread_is_refused_with_the_code_at_which_sdks_send_the_conversation(
    served: Served, thread: dict[str, str]
) -> None:
    reply = await served.client.post("/v1/messages", json={**MESSAGES, "thread": thread})

    assert reply.status_code == 400
    error = reply.json()["error"]
    assert (error["type"], error["details"]) == (
        "invalid_request_error", {"error_code": "thread_unsupported_request"},
    )  # fmt: skip
    assert reply.headers["x-should-retry"] == "false"
    assert await served.calling.events() == []


async def test_every_answer_has_its_request_id_where_both_sdks_look(served: Served) -> None:
    for reply in (await served.client.post("/v1/messages", json=MESSAGES), await served.client.get("/v1/none")):
        assert reply.headers["request-id"] == reply.headers["x-request-id"]
        assert reply.headers["request-id"].startswith("req-")


async def test_a_response_to_nothing_is_refused_by_the_name_of_its_field(served: Served) -> None:
    reply = await served.client.post("/v1/responses", json={"model": MODEL, "input": []})

    assert (reply.status_code, reply.json()["error"]["message"]) == (400, "'input' must not be empty")


async def test_tokens_are_counted_without_a_call(served: Served) -> None:
    body = {name: value for name, value in MESSAGES.items() if name != "max_tokens"}

    reply = await served.client.post("/v1/messages/count_tokens", json=body)

    assert reply.status_code == 200, reply.text
    assert reply.json()["input_tokens"] > 3
    assert reply.headers["x-tollbook-token-count"] == "estimate"
    assert await served.calling.events() == []
