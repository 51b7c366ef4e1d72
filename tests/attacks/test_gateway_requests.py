"""Hostile requests to the gateway: no answer is paid and lost, nothing is charged to others, nothing blocks it."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis

from tests.gateway.serving import MODEL, Served, api_key, open_served
from tests.quick import first_quick
from tests.servers import wait_until

SHARED = "tb-" + "s" * 43
RETRY = "x-stainless-retry-count"
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]},
    "/v1/responses": {"model": MODEL, "input": "Hi"},
    "/v1/messages": {"model": MODEL, "max_tokens": 50, "messages": [{"role": "user", "content": "Hi"}]},
}


@pytest.fixture
async def served(redis_client: Redis, server_url: str, tmp_path: Path) -> AsyncIterator[Served]:
    async with open_served(server_url, tmp_path, gateway_wait_s=0.2, attempt_timeout_s=5) as served:
        everything = frozenset({"user", "plan", "campaign", "tags"})
        served.keys.by_secret[SHARED] = api_key("key-shared", user_id=None, allows=everything)
        yield served
        await wait_until(lambda: served.gateway.calls.under_way == 0)
        await served.calling.check_guarantees()


async def post(served: Served, path: str, content: bytes | str, **headers: Any) -> httpx.Response:
    headers = {"content-type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    return await served.client.post(path, content=content, headers=headers)


async def charged_user(served: Served, reply: httpx.Response) -> str | None:
    assert reply.status_code == 200, reply.text
    return (await served.calling.events(reply.headers["x-tollbook-call-id"]))[0].user_id


@pytest.mark.slow
@pytest.mark.parametrize("value", ['"\\ud83d"', '{"half": "\\ud83d"}'])
@pytest.mark.parametrize("field", first_quick(1, ["metadata", "user", "prompt_cache_key", "safety_identifier"]))
async def test_an_answer_with_half_a_character_is_delivered_and_paid_once(
    served: Served, field: str, value: str
) -> None:
    reply = await post(served, "/v1/responses", f'{{"model": "{MODEL}", "input": "Hi", "{field}": {value}}}')

    assert reply.status_code == 200 or served.calling.provider.requests == 0, reply.text


async def test_a_cut_off_emoji_in_instructions_or_tools_is_answered(served: Served) -> None:
    tools = '[{"type": "function", "name": "f", "description": "\\ud83d", "parameters": {"type": "object"}}]'
    body = f'{{"model": "{MODEL}", "input": "Hi", "instructions": "\\ud83d", "tools": {tools}}}'

    reply = await post(served, "/v1/responses", body)

    assert reply.status_code == 200, reply.text
    assert reply.json()["instructions"] == "\ufffd"


@pytest.mark.parametrize("path", BODIES)
async def test_a_number_past_all_numbers_is_refused_before_anything_is_paid(served: Served, path: str) -> None:
    body = json.dumps(BODIES[path])[:-1] + ', "metadata": {"size": 1e999}}'

    reply = await post(served, path, body)

    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_task")
    assert served.calling.provider.requests == 0


@pytest.mark.slow
@pytest.mark.parametrize("model", first_quick(1, ["\ud800", "@preset/x", " " + MODEL, "a" * 300, "a\nb"]))
@pytest.mark.parametrize("path", [*BODIES, "/v1/messages/count_tokens"])
async def test_a_malformed_model_name_is_a_wrong_request(served: Served, path: str, model: str) -> None:
    body = {**BODIES.get(path, BODIES["/v1/messages"]), "model": model}

    reply = await post(served, path, json.dumps(body))

    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_task")
    assert reply.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("path", first_quick(1, BODIES))
async def test_the_user_of_a_body_is_charged_in_every_api(served: Served, path: str) -> None:
    body = json.dumps({**BODIES[path], "user": "u7"})

    assert await charged_user(served, await post(served, path, body, authorization=f"Bearer {SHARED}")) == "u7"
    # A key that does not allow the field ignores it.
    assert await charged_user(served, await post(served, path, body)) == "u1"


async def test_a_malformed_user_in_a_body_is_refused(served: Served) -> None:
    for user in ({"a": 1}, True, ["u1"], 1.5):
        body = json.dumps({**BODIES["/v1/chat/completions"], "user": user})
        reply = await post(served, "/v1/chat/completions", body, authorization=f"Bearer {SHARED}")
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_task"), user


async def test_a_user_is_the_same_in_a_header_and_in_a_body(served: Served) -> None:
    body, path = BODIES["/v1/chat/completions"], "/v1/chat/completions"
    key = f"Bearer {SHARED}"

    in_header = await post(served, path, json.dumps(body), authorization=key, x_tollbook_user="Zoë".encode())
    in_body = await post(served, path, json.dumps({**body, "user": "Zoë"}), authorization=key)
    other = await post(served, path, json.dumps(body), authorization=key, x_tollbook_user="Zoë".encode("latin-1"))

    assert await charged_user(served, in_header) == await charged_user(served, in_body) == "Zoë"
    assert other.status_code == 400


@pytest.mark.slow
async def test_a_retry_for_another_user_joins_no_call(served: Served) -> None:
    """One key serves many users, who may ask the same."""
    served.calling.script("slow")
    headers = {"authorization": f"Bearer {SHARED}"}
    asking = asyncio.create_task(served.chat(headers={**headers, "x-tollbook-user": "a", RETRY: "0"}))
    await wait_until(lambda: served.calling.provider.requests > 0)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)

    other = await served.chat(headers={**headers, "x-tollbook-user": "b", RETRY: "1"})
    same = await served.chat(headers={**headers, "x-tollbook-user": "a", RETRY: "1"})

    assert (await charged_user(served, other), await charged_user(served, same)) == ("b", "a")
    assert served.calling.provider.requests == 2


@pytest.mark.slow
@pytest.mark.parametrize("count", first_quick(2, ["9" * 5000, "²", "-1", "1.5", "one"]))
async def test_a_retry_count_that_is_not_a_number_is_ignored(served: Served, count: str) -> None:
    body = json.dumps(BODIES["/v1/chat/completions"])

    reply = await post(served, "/v1/chat/completions", body, x_stainless_retry_count=count.encode("latin-1"))

    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize("path", first_quick(1, [*BODIES, "/v1/embeddings", "/v1/messages/count_tokens"]))
@pytest.mark.parametrize("value", first_quick(1, ['{"a": 1}', "1", "[]", '"abcd"']))
async def test_a_million_small_values_are_refused_at_once(served: Served, path: str, value: str) -> None:
    """Validating them one by one took minutes, in which the process did nothing else."""
    name = "input" if path in ("/v1/responses", "/v1/embeddings") else "messages"
    body = f'{{"model": "{MODEL}", "max_tokens": 5, "{name}": [{",".join([value] * 1_000_000)}]}}'

    async with asyncio.timeout(10):
        reply = await post(served, path, body)

    assert reply.status_code == 400
    assert len(reply.content) < 1_000


async def test_a_request_may_refer_to_a_limited_number_of_earlier_answers(served: Served) -> None:
    items = [{"type": "item_reference", "id": f"msg_gw-{number}_0"} for number in range(10_000)]

    reply = await post(served, "/v1/responses", json.dumps({"model": MODEL, "input": items}))

    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_task")
    assert "10,000 earlier answers" in reply.json()["error"]["message"]
