"""A repeated request is not paid again, whichever way a client repeats it."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis

from tests.gateway.serving import MODEL, Served, api_key, open_served
from tests.servers import wait_until
from tollbook.gateway import endpoints
from tollbook.gateway.idempotency import _digest
from tollbook.gateway.requests import task_of
from tollbook.inference.calls.call import Call, RunId
from tollbook.inference.calls.reservations import WaitLimits
from tollbook.schemas.events import CostRecorded

RETRY = "x-stainless-retry-count"


@pytest.fixture
async def served(redis_client: Redis, server_url: str, tmp_path: Path) -> AsyncIterator[Served]:
    async with open_served(server_url, tmp_path, hold_wait_s=5, attempt_timeout_s=5) as served:
        yield served
        await wait_until(lambda: served.gateway.calls.under_way == 0)
        await served.calling.check_guarantees()


async def leave(served: Served, content: str, headers: dict[str, str]) -> None:
    """Send a request, and close the connection once the provider has it."""
    before = served.calling.provider.requests
    asking = asyncio.create_task(served.chat(content, headers=headers))
    await wait_until(lambda: served.calling.provider.requests > before)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)


def call_id(reply: httpx.Response) -> str:
    return reply.headers["x-tollbook-call-id"]


async def test_a_key_of_the_client_names_the_call(served: Served) -> None:
    first = await served.chat("Hello", headers={"idempotency-key": "a"})
    again = await served.chat("Hello", headers={"idempotency-key": "a"})
    other = await served.chat("Hello", headers={"idempotency-key": "b"})
    changed = await served.chat("Good bye", headers={"idempotency-key": "a"})

    assert first.json()["choices"] == again.json()["choices"]
    assert call_id(first) == call_id(again) != call_id(other)
    assert served.calling.provider.requests == 2
    assert (changed.status_code, changed.json()["error"]["code"]) == (409, "idempotency_conflict")
    assert changed.headers["x-should-retry"] == "false"
    assert "`Idempotency-Key` was already used with other content" in changed.json()["error"]["message"]


async def test_requests_at_a_time_with_one_key_are_one_call(served: Served) -> None:
    replies = await asyncio.gather(*(served.chat("Hi", headers={"idempotency-key": "a"}) for _ in range(5)))

    assert {reply.status_code for reply in replies} == {200}
    assert len({call_id(reply) for reply in replies}) == 1
    assert served.calling.provider.requests == 1


async def test_a_retry_of_an_sdk_joins_the_call_whose_client_left(served: Served) -> None:
    served.calling.script("slow")
    await leave(served, "Hello", {RETRY: "0"})

    retried = await served.chat("Hello", headers={RETRY: "1"})
    later = await served.chat("Hello", headers={RETRY: "1"})

    assert retried.status_code == later.status_code == 200
    assert served.calling.provider.requests == 2  # The first was joined once; the third is a call of its own.
    assert call_id(retried) != call_id(later)


@pytest.mark.slow
async def test_no_retry_joins_a_delivered_call_or_one_with_another_body(served: Served) -> None:
    delivered = await served.chat("Hello", headers={RETRY: "0"})
    again = await served.chat("Hello", headers={RETRY: "1"})
    served.calling.script("slow")
    await leave(served, "Hello", {RETRY: "0"})
    other = await served.chat("Good bye", headers={RETRY: "1"})

    assert len({call_id(reply) for reply in (delivered, again, other)}) == 3


@pytest.mark.slow
async def test_two_clients_of_one_body_do_not_get_each_others_answer(served: Served) -> None:
    served.calling.script("slow", "slow")
    first = asyncio.create_task(served.chat("Hello", headers={RETRY: "0"}))
    await wait_until(lambda: served.calling.provider.requests > 0)
    second = await served.chat("Hello", headers={RETRY: "1"})

    assert call_id(await first) != call_id(second)


async def test_a_whole_answer_is_finished_without_its_client_and_kept(served: Served) -> None:
    served.calling.script("slow")
    await leave(served, "Hello", {"idempotency-key": "a"})

    again = await served.chat("Hello", headers={"idempotency-key": "a"})

    assert again.status_code == 200
    assert served.calling.provider.requests == 1
    assert await served.calling.assumed() == 0


@pytest.mark.slow
async def test_a_named_stream_is_finished_although_its_client_left(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G4: its retry may wait for it at another gateway, which nobody here can see."""
    monkeypatch.setattr(endpoints, "RETRY_GRACE_S", 0.0)
    served.calling.script("slow")
    headers = {"idempotency-key": "a"}
    asking = asyncio.create_task(served.chat("Hello", stream=True, headers=headers))
    await wait_until(lambda: served.calling.provider.requests == 1)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await wait_until(lambda: served.gateway.calls.under_way == 0)

    again = await served.chat("Hello", stream=True, headers=headers)

    assert again.status_code == 200
    assert served.calling.provider.requests == 1
    assert await served.calling.assumed() == 0


@pytest.mark.slow
async def test_a_retry_settles_a_hold_that_this_gateway_left_behind(served: Served) -> None:
    """G2: no request of this gateway makes that call any more, and no other gateway has it."""
    call_id = await hold_of_a_run_that_is_gone(served)

    reply = await served.chat("Hello", headers={"idempotency-key": "a"})

    assert reply.status_code == 200, reply.text
    outcomes = [event.payload for event in await served.calling.events(call_id) if event.type == "cost-recorded"]
    assert [each.outcome for each in outcomes if isinstance(each, CostRecorded)] == ["taken_over", "done"]


async def test_a_failed_try_is_not_repeated_if_another_run_may_have_paid(served: Served) -> None:
    """G4: a gateway was killed in mid-call, and the one that took the call over could not reach the provider."""
    call_id = await hold_of_a_run_that_is_gone(served)
    served.calling.script("http_500", "http_500")

    failed = await served.chat("Hello", headers={"idempotency-key": "a"})
    requests = served.calling.provider.requests
    again = await served.chat("Hello", headers={"idempotency-key": "a"})

    assert (failed.status_code, failed.headers["x-should-retry"]) == (502, "false")
    assert (again.status_code, again.json()) == (502, failed.json())
    assert served.calling.provider.requests == requests
    assert [event.call_id for event in await served.calling.events() if event.type == "cost-recorded"] == [call_id] * 2


async def hold_of_a_run_that_is_gone(served: Served) -> str:
    """Hold money for the call that its client named `a`, by a run that this gateway does not have; return its id."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}
    call_id = f"gw-{_digest('key-1', 'a')}"
    task, _ = task_of(body, body, call_id=call_id, key=api_key(), headers={}, policy=served.runtime.rules)
    policy = served.runtime.policies.of("u1")
    call = Call.of_task(task, call_id=call_id, run_id=RunId(served.runtime.name, "gone"), policy=policy)
    assert (await served.runtime.reservations.acquire(call, WaitLimits(hold_wait_s=0))).hold is not None
    return call_id


async def test_a_gateway_that_stops_keeps_its_calls_for_retries_and_takes_no_more(
    served: Served, redis_client: Redis
) -> None:
    """G4: such a call may be paid and settled; its retry finds it at another gateway."""
    served.calling.script("hang")
    asking = asyncio.create_task(served.chat("Hello", headers={RETRY: "0"}))
    await wait_until(lambda: served.calling.provider.requests == 1)
    await served.gateway.calls.stop(0, settling_s=5)

    replies = [await asking, await served.chat("Good bye")]

    assert [(each.status_code, each.json()["error"]["code"]) for each in replies] == [(503, "gateway_stopping")] * 2
    [shelf] = [key async for key in redis_client.scan_iter("tollbook:gateway:*")]
    await wait_until(lambda: is_left(redis_client, shelf), what="the call kept for a retry")


async def is_left(redis: Redis, shelf: bytes) -> bool:
    kept: Any = await redis.hgetall(shelf)
    return [value.endswith(b" ") for value in kept.values()] == [True]
