"""Retries under an Idempotency-Key: a paid call is never paid again, and a call without an effect may still succeed."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from redis.asyncio import Redis

from tests.gateway.serving import Served, open_served
from tests.quick import first_quick
from tests.servers import wait_until

NAMED = {"idempotency-key": "order-7"}


@pytest.fixture
async def served(redis_client: Redis, server_url: str, tmp_path: Path) -> AsyncIterator[Served]:
    async with open_served(server_url, tmp_path, gateway_wait_s=0.2, attempt_timeout_s=5) as served:
        served.calling.provider.config = replace(served.calling.provider.config, slow_ms=1_500)
        yield served
        await wait_until(lambda: served.gateway.calls.under_way == 0)
        await served.calling.check_guarantees()


@pytest.mark.slow
@pytest.mark.parametrize("is_streamed", first_quick(1, [True, False]))
async def test_a_call_that_waited_for_holds_too_long_is_made_by_its_retry(served: Served, is_streamed: bool) -> None:
    await served.calling.set_cap(2_600_000)
    served.calling.script("slow")
    other = asyncio.create_task(served.chat("Hello"))
    await wait_until(lambda: served.calling.provider.requests > 0)

    refused = await asyncio.gather(*(served.chat("Hi", headers=NAMED, stream=is_streamed) for _ in range(3)))
    await other
    retried = await asyncio.gather(*(served.chat("Hi", headers=NAMED, stream=is_streamed) for _ in range(3)))

    assert {(reply.status_code, reply.headers["retry-after"]) for reply in refused} == {(429, "5")}
    assert {reply.status_code for reply in retried} == {200}
    assert served.calling.provider.requests == 2


@pytest.mark.parametrize("fault", ["http_429", "http_500"])
async def test_a_provider_that_refused_without_a_charge_is_asked_again(served: Served, fault: str) -> None:
    served.calling.script(*[fault] * 2)

    refused = await served.chat("Hi", headers=NAMED)
    asked = served.calling.provider.requests
    served.calling.script()
    retried = await served.chat("Hi", headers=NAMED)
    again = await served.chat("Hi", headers=NAMED)

    assert refused.status_code in (429, 502)
    assert "x-should-retry" not in refused.headers
    assert retried.status_code == again.status_code == 200
    assert retried.headers["x-tollbook-call-id"] == again.headers["x-tollbook-call-id"]
    assert served.calling.provider.requests == asked + 1


async def test_a_charged_call_without_an_answer_is_not_paid_again(served: Served) -> None:
    served.calling.script("broken_json", "broken_json")

    refused = await served.chat("Hi", headers=NAMED)
    asked = served.calling.provider.requests
    served.calling.script()
    again = await served.chat("Hi", headers=NAMED)

    assert (refused.status_code, again.status_code) == (502, 502)
    assert refused.headers["x-should-retry"] == again.headers["x-should-retry"] == "false"
    assert served.calling.provider.requests == asked


async def test_a_used_up_budget_is_the_answer_of_its_call(served: Served) -> None:
    await served.calling.set_cap(1_000)

    replies = [await served.chat("Hi", headers=NAMED) for _ in range(2)]

    assert [reply.status_code for reply in replies] == [402, 402]
    assert len({reply.headers["x-tollbook-call-id"] for reply in replies}) == 1
