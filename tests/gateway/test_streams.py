"""Streams over HTTP: the first byte as soon as the provider's, an exact end, and what happens when somebody leaves."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis

from tests.gateway.serving import KEY, MODEL, Served, open_served
from tests.quick import first_quick
from tests.servers import wait_until
from tollbook.gateway.chat import ChatEvents
from tollbook.schemas.money import nanousd_from_usd

MODEL_BODY: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "stream": True}


@pytest.fixture
async def served(redis_client: Redis, server_url: str, tmp_path: Path) -> AsyncIterator[Served]:
    async with open_served(server_url, tmp_path, gateway_wait_s=0.2, attempt_timeout_s=2) as served:
        # Token by token.
        served.calling.provider.config = replace(served.calling.provider.config, chunk_ms=0)
        yield served
        await wait_until(lambda: served.gateway.calls.under_way == 0)
        await served.calling.check_guarantees()


def events_in(text: str) -> list[dict[str, Any]]:
    """Return the documents of a stream's events; it must have ended."""
    data = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    return [json.loads(each) for each in data[:-1]]


def text_of(events: list[dict[str, Any]]) -> str:
    return "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])


async def test_a_stream_has_the_answer_in_parts_and_usage_in_the_end(served: Served) -> None:
    asked = {"stream": True, "stream_options": {"include_usage": True}}
    reply = await served.chat("Hello [[completion_tokens=30]]", **asked)

    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = events_in(reply.text)
    assert len(events) > 5
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert len(text_of(events)) > 30
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert [event["choices"][0]["finish_reason"] for event in events if event["choices"]].count("stop") == 1
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 30
    assert round(events[-1]["usage"]["cost"] * 1e9) == await served.calling.spent() == served.calling.booked()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"stream_options": None}, {"stream_options": {"include_usage": False}}])
async def test_without_usage_every_chunk_has_a_choice(served: Served, options: dict[str, Any]) -> None:
    events = events_in((await served.chat("Hello [[completion_tokens=30]]", stream=True, **options)).text)

    choices = [event["choices"][0] for event in events]
    assert [choice["finish_reason"] for choice in choices[-2:]] == [None, "stop"]
    assert choices[-1]["delta"] == {}
    assert ["usage" in event for event in events].count(True) == 1
    assert round(events[-1]["usage"]["cost"] * 1e9) == served.calling.booked() > 0


async def test_the_finish_reason_is_sent_once_the_cost_is_booked(served: Served) -> None:
    async with served.client.stream("POST", "/v1/chat/completions", json=MODEL_BODY) as reply:
        async for line in reply.aiter_lines():
            if '"finish_reason":"stop"' in line:
                break
        is_booked = served.gateway.calls.under_way == 0

    assert is_booked
    assert await served.calling.spent() == served.calling.booked() > 0
    assert served.calling.provider.cut_off == set()


async def test_log_probabilities_are_sent_whole_and_streamed(served: Served) -> None:
    whole = (await served.chat(logprobs=True)).json()["choices"][0]
    events = events_in((await served.chat(logprobs=True, stream=True)).text)

    streamed = [choice["logprobs"] for event in events for choice in event["choices"] if choice["logprobs"]]
    assert [each["token"] for each in whole["logprobs"]["content"]] == whole["message"]["content"].split()
    assert [each["token"] for part in streamed for each in part["content"]] == text_of(events).split()


async def test_the_first_part_comes_before_the_provider_has_ended(served: Served) -> None:
    served.calling.script("stream_hang")

    async with served.client.stream("POST", "/v1/chat/completions", json=MODEL_BODY) as reply:
        lines = reply.aiter_lines()
        first = [await anext(lines) for _ in range(6)]

    assert any('"content"' in line for line in first)


async def test_a_refusal_is_sent_before_any_stream(served: Served) -> None:
    await served.calling.set_cap(1_000)

    reply = await served.chat(stream=True)

    assert (reply.status_code, reply.json()["error"]["code"]) == (402, "plan_limit_reached")


async def test_a_fallback_comes_before_the_first_part(served: Served) -> None:
    served.calling.script("http_500", "http_500", None)

    reply = await served.chat(model="generate_draft", stream=True)

    assert reply.status_code == 200
    assert events_in(reply.text)[-1]["model"] == "openai/gpt-4o-mini"


@pytest.mark.parametrize(
    "fault", first_quick(2, ["stream_cut", "stream_half_event", "stream_hang", "stream_reset", "stream_error"])
)
async def test_a_provider_that_breaks_off_ends_the_stream_with_an_error(served: Served, fault: str) -> None:
    served.calling.script(fault)

    reply = await served.chat("Hello [[completion_tokens=30]]", stream=True)

    assert reply.status_code == 200
    events = events_in(reply.text)
    assert text_of(events[:-1])
    assert events[-2]["error"]["code"] == "inference_failed"
    assert events[-2]["choices"][0]["finish_reason"] == "error"
    assert events[-1] == {"error": events[-2]["error"]}  # Vercel's AI SDK sees no error beside choices.
    assert served.calling.provider.requests == 1


async def test_a_stream_without_usage_is_booked(served: Served) -> None:
    served.calling.script("missing_usage")

    reply = await served.chat(stream=True)

    assert reply.status_code == 200
    assert await served.calling.spent() >= served.calling.booked() > 0


async def test_a_client_that_leaves_cancels_the_request_and_pays_its_cost(served: Served) -> None:
    served.calling.script("stream_hang")

    async with served.client.stream("POST", "/v1/chat/completions", json=MODEL_BODY) as reply:
        call_id = reply.headers["x-tollbook-call-id"]
        await anext(reply.aiter_bytes())

    await wait_until(lambda: served.gateway.calls.under_way == 0)
    assert len(served.calling.provider.cut_off) == 1
    [settled] = [event for event in await served.calling.events(call_id) if event.type == "cost-recorded"]
    assert settled.amount == served.calling.booked()
    assert await served.calling.assumed() == 0


@pytest.mark.slow
async def test_an_answer_that_is_known_is_streamed_again(served: Served) -> None:
    first = await served.chat("Hello", stream=True, headers={"idempotency-key": "a"})
    again = await served.chat("Hello", stream=True, headers={"idempotency-key": "a"})
    whole = await served.chat("Hello", headers={"idempotency-key": "a"})

    assert text_of(events_in(first.text)) == text_of(events_in(again.text))
    assert whole.json()["choices"][0]["message"]["content"] == text_of(events_in(first.text))
    assert served.calling.provider.requests == 1


async def test_a_retry_joins_a_stream_whose_client_left_before_its_first_byte(served: Served) -> None:
    served.calling.script("slow")
    headers = {"x-stainless-retry-count": "0"}
    asking = asyncio.create_task(served.client.post("/v1/chat/completions", json=MODEL_BODY, headers=headers))
    await wait_until(lambda: served.calling.provider.requests == 1)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)

    retried = await served.client.post(
        "/v1/chat/completions", json=MODEL_BODY, headers={"x-stainless-retry-count": "1"}
    )

    assert text_of(events_in(retried.text))
    assert served.calling.provider.requests == 1


async def test_a_gateway_that_stops_ends_its_streams_with_an_error(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    async with httpx.AsyncClient(headers={"authorization": f"Bearer {KEY}"}, trust_env=False) as client:
        async with open_served(server_url, tmp_path, attempt_timeout_s=20, stop_grace_s=0) as served:
            served.calling.script("stream_hang")
            asking = asyncio.create_task(client.post(f"{served.gateway.url}/v1/chat/completions", json=MODEL_BODY))
            await wait_until(lambda: bool(served.calling.provider.book.totals()) or served.calling.provider.requests)
        reply = await asking

    assert events_in(reply.text)[-1]["error"]["code"] == "gateway_stopping"


@pytest.mark.slow
async def test_a_stream_that_cannot_be_written_on_ends_with_an_error(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An internal error must not look like the end of an answer either."""

    def fail(_self: object, _chunk: object) -> bytes:
        raise TypeError("a delta of another form")

    monkeypatch.setattr(ChatEvents, "delta", fail)
    reply = await served.chat(stream=True)

    assert reply.status_code == 200
    assert events_in(reply.text)[-1]["error"]["code"] == "internal_error"
    await wait_until(lambda: served.gateway.calls.under_way == 0)


async def test_slow_readers_slow_the_provider_down(served: Served) -> None:
    """Unread data takes no memory in the gateway: the provider's connection fills up instead."""
    body = {**MODEL_BODY, "messages": [{"role": "user", "content": "Hello [[completion_tokens=20000]]"}]}
    body["max_tokens"] = 30_000
    async with served.client.stream("POST", "/v1/chat/completions", json=body) as reply:
        await anext(reply.aiter_bytes())
        assert served.gateway.calls.under_way == 1
    await wait_until(lambda: served.gateway.calls.under_way == 0)


async def test_messages_and_responses_stream_in_their_forms(served: Served) -> None:
    message = {"model": MODEL, "max_tokens": 500, "messages": [{"role": "user", "content": "Hello"}], "stream": True}
    messages = await served.client.post("/v1/messages", json=message)
    responses = await served.client.post("/v1/responses", json={"model": MODEL, "input": "Hello", "stream": True})

    assert names_in(messages)[0] == "message_start"
    assert names_in(messages)[-1] == "message_stop"
    assert names_in(responses)[0] == "response.created"
    assert names_in(responses)[-1] == "response.completed"
    assert nanousd_from_usd(0) < await served.calling.spent() == served.calling.booked()


def names_in(reply: httpx.Response) -> list[str]:
    return [line.removeprefix("event: ") for line in reply.text.splitlines() if line.startswith("event: ")]
