"""Requests as SDKs and agents were seen to send them, sent to a gateway: each is answered, Claude Code's among them."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from tests.gateway.golden import load, names
from tests.gateway.serving import KEY, MODEL, Served, open_served

pytestmark = pytest.mark.slow

# As Claude Code sends them beside the body (November 2026).
CLAUDE_CODE = {
    "authorization": "",
    "x-api-key": KEY,
    "anthropic-version": "2023-06-01",
    "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14,prompt-caching-scope-2026-01-05",
    "anthropic-dangerous-direct-browser-access": "true",
    "x-app": "cli",
    "x-stainless-retry-count": "0",
}
# It refers to what OpenAI has kept of an earlier answer; the gateway has none of it.
UNKNOWN = ["responses-vercel-references"]


@pytest.fixture
async def served(redis_client: Redis, server_url: str, tmp_path: Path) -> AsyncIterator[Served]:
    async with open_served(server_url, tmp_path, gateway_wait_s=0.2) as served:
        yield served
        await served.calling.check_guarantees()


@pytest.mark.parametrize("name", [name for name in names("bodies", "messages") if "claude-code" in name])
async def test_claude_code_is_answered_and_its_tokens_are_counted(served: Served, name: str) -> None:
    body = {**load("bodies", name), "model": MODEL, "stream": True}

    reply = await served.client.post("/v1/messages?beta=true", json=body, headers=CLAUDE_CODE)
    counted = await served.client.post("/v1/messages/count_tokens?beta=true", json=body, headers=CLAUDE_CODE)

    assert reply.status_code == 200, reply.text
    events = [line.removeprefix("event: ") for line in reply.text.splitlines() if line.startswith("event: ")]
    assert (events[0], events[-1]) == ("message_start", "message_stop")
    assert counted.json()["input_tokens"] > 0
    assert await served.calling.spent() == served.calling.booked() > 0


@pytest.mark.parametrize("api", ["messages", "responses"])
async def test_recorded_requests_of_sdks_are_answered(served: Served, api: str) -> None:
    for name in names("bodies", api):
        reply = await served.client.post(f"/v1/{api}", json={**load("bodies", name), "model": MODEL})

        assert reply.status_code == (400 if name in UNKNOWN else 200), (name, reply.text)
    assert await served.calling.spent() == served.calling.booked() > 0
