"""Stores that are away or went back, and rules that change, under a gateway that goes on running (G1, G4, G8, G11)."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from redis.asyncio import Redis

from tests.gateway.serving import KEY, MODEL, KeysOfTests, Served, open_served
from tests.proxy import faulty_proxy
from tests.recovery.test_going_back import put_back, take_backup
from tests.servers import wait_until
from tollbook.gateway.server import serve_gateway
from tollbook.inference.administration import Administration
from tollbook.inference.key_changes import KeyBounds
from tollbook.inference.policy_changes import apply_policy
from tollbook.inference.runtime import build_gates, open_runtime
from tollbook.ledger.errors import BaselineUnavailable
from tollbook.ledger.signature import Signature
from tollbook.schemas.events import BudgetReserved
from tollbook.schemas.policy import default_policy

pytestmark = pytest.mark.slow

PATH: Final = "/v1/chat/completions"
ME: Final = Signature("ops", "test")
# gpt-4o-mini at $0.15 and $0.60 a million. The bound counts every byte, 32 for the message and 128 for the request.
PROMPT: Final = "Hello [[completion_tokens=50]]"
COST: Final = (-(-len(PROMPT) // 4) + 4) * 150 + 50 * 600
BOUND: Final = (len(PROMPT) + 32 + 128) * 150 + 100 * 600


def asked(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 100, **fields}


def is_unavailable(reply: httpx.Response) -> bool:
    return (
        reply.status_code == 503
        and reply.json()["error"]["code"] == "ledger_unavailable"
        and int(reply.headers["retry-after"]) <= 5
    )


@asynccontextmanager
async def second_gateway(served: Served) -> AsyncIterator[str]:
    """Serve another gateway of the same ledger; yield its address."""
    store = served.calling.store
    async with (
        open_runtime(
            served.runtime.settings,
            served.runtime.handle,
            lambda names: asyncio.to_thread(store.baselines, names),
            max_call_s=served.runtime.settings.gateway_timeout_s,
        ) as runtime,
        serve_gateway(runtime, port=0, keys=served.keys) as gateway,
    ):
        yield gateway.url


@asynccontextmanager
async def many_clients(url: str, key: str = KEY) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(
        base_url=url, headers={"authorization": f"Bearer {key}"}, limits=httpx.Limits(max_connections=None), timeout=120
    ) as client:
        yield client


async def test_two_gateways_in_a_burst_spend_a_cap_to_the_last_call(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    """G1, G9: 500 calls, money for 50: not one more, and not one fewer."""
    async with (
        open_served(server_url, tmp_path, attempt_timeout_s=60, gateway_wait_s=100) as served,
        second_gateway(served) as other_url,
        many_clients(served.gateway.url) as first,
        many_clients(other_url) as second,
    ):
        await served.calling.set_cap(49 * COST + BOUND)
        replies = await asyncio.gather(
            *((first if n % 2 else second).post(PATH, json=asked(stream=n % 3 == 0)) for n in range(500))
        )
        statuses = [reply.status_code for reply in replies]
        assert (statuses.count(200), statuses.count(402)) == (50, 450)
        assert await served.calling.spent() == served.calling.booked() == 50 * COST
        await served.calling.check_guarantees()


async def test_without_redis_nothing_is_paid_and_the_gateway_goes_on_once_it_is_back(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    async with (
        faulty_proxy(server_url) as proxy,
        open_served(proxy.url, tmp_path, attempt_timeout_s=5, claim_after_s=1.5) as served,
    ):
        assert (await served.client.post(PATH, json=asked())).status_code == 200
        await proxy.stop()
        replies = await asyncio.gather(*(served.client.post(PATH, json=asked(stream=n % 2 == 0)) for n in range(4)))
        assert all(map(is_unavailable, replies)), [reply.text for reply in replies]
        assert served.calling.provider.requests == 1
        await proxy.start()

        async def answers() -> bool:
            return (await served.client.post(PATH, json=asked())).status_code == 200

        await wait_until(answers, what="an answer")
        await wait_until(lambda: served.gateway.calls.under_way == 0)
        await served.calling.check_guarantees()


async def test_a_hold_whose_reply_was_lost_is_resumed_by_the_retry(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    """No hold is left for a call that nobody makes any more: the client was told to retry, and does."""
    async with (
        faulty_proxy(server_url) as proxy,
        open_served(proxy.url, tmp_path, attempt_timeout_s=5, claim_after_s=1.5) as served,
    ):
        assert (await served.client.post(PATH, json=asked())).status_code == 200
        held = served.runtime.handle.keys[0].holds
        proxy.holds_replies_to = b"_reserve"
        asking = asyncio.create_task(served.client.post(PATH, json=asked(), headers={"idempotency-key": "a"}))
        await wait_until(lambda: redis_client.zcard(held), what="the hold")
        proxy.loses_replies = True
        proxy.let_replies_pass()
        await proxy.stop()
        refused = await asking
        assert is_unavailable(refused), refused.text
        proxy.loses_replies = False
        await proxy.start()

        again = await served.client.post(PATH, json=asked(), headers={"idempotency-key": "a"})

        assert again.status_code == 200
        assert served.calling.provider.requests == 2
        assert await served.calling.spent() == 2 * COST
        await wait_until(lambda: served.gateway.calls.under_way == 0)
        await served.calling.check_guarantees()


@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "streamed"])
async def test_an_answer_that_comes_while_redis_is_away_is_booked(
    redis_client: Redis, server_url: str, tmp_path: Path, is_streamed: bool
) -> None:
    """G3: its client may get an error or a late answer; in the end the ledger has its cost."""
    async with (
        faulty_proxy(server_url) as proxy,
        open_served(proxy.url, tmp_path, attempt_timeout_s=10, claim_after_s=1.5) as served,
    ):
        served.calling.provider.config = replace(served.calling.provider.config, slow_ms=1_500)
        served.calling.script("slow")
        asking = asyncio.create_task(served.client.post(PATH, json=asked(stream=is_streamed)))
        await wait_until(lambda: served.calling.provider.requests == 1)
        await wait_until(lambda: len(served.calling.provider.book.entries) == 1)
        await proxy.stop()
        await asyncio.wait({asking}, timeout=3)
        await proxy.start()
        await asking
        await wait_until(lambda: served.gateway.calls.under_way == 0)
        held = served.runtime.handle.keys[0].holds

        async def is_settled() -> bool:
            return await redis_client.zcard(held) == 0

        await wait_until(is_settled, what="the settlement")
        assert await served.calling.spent() == served.calling.booked() == COST
        await served.calling.check_guarantees()


async def test_on_a_ledger_that_went_back_nothing_is_paid_until_the_newer_data_is_there_again(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    """G8: an older backup is restored under a running gateway."""
    async with open_served(server_url, tmp_path, attempt_timeout_s=5) as served:
        assert (await served.client.post(PATH, json=asked())).status_code == 200
        await served.calling.folded()
        older = await take_backup(redis_client)
        assert (await served.client.post(PATH, json=asked())).status_code == 200
        newer = await take_backup(redis_client)
        await put_back(redis_client, older)

        for headers in ({}, {"idempotency-key": "a"}, {"x-stainless-retry-count": "1"}):
            for is_streamed in (False, True):
                reply = await served.client.post(PATH, json=asked(stream=is_streamed), headers=headers)
                assert is_unavailable(reply), reply.text
        assert served.calling.provider.requests == 2

        await put_back(redis_client, newer)
        assert (await served.client.post(PATH, json=asked())).status_code == 200
        assert await served.calling.spent() == 3 * COST


async def test_without_a_projector_known_users_go_on_and_new_ones_are_told_so(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    """G6, G8."""
    is_away = False
    async with open_served(server_url, tmp_path, attempt_timeout_s=5) as served:
        keys = KeysOfTests()
        newcomer = "tb-" + "n" * 43
        keys.by_secret[newcomer] = replace(keys.by_secret[KEY], user_id="new", key_id="key-2")

        async def read(names: Sequence[str]) -> Any:
            if is_away:
                raise BaselineUnavailable("the projector is away")
            return await asyncio.to_thread(served.calling.store.baselines, names)

        async with (
            open_runtime(served.runtime.settings, served.runtime.handle, read, max_call_s=60) as runtime,
            serve_gateway(runtime, port=0, keys=keys) as gateway,
            many_clients(gateway.url) as known,
            many_clients(gateway.url, newcomer) as new,
        ):
            assert (await known.post(PATH, json=asked())).status_code == 200
            is_away = True
            assert (await known.post(PATH, json=asked())).status_code == 200
            assert is_unavailable(await new.post(PATH, json=asked(stream=True)))
            assert served.calling.booked("new") == 0
            is_away = False
            assert (await new.post(PATH, json=asked(stream=True))).status_code == 200
        await served.calling.check_guarantees()


async def test_a_policy_that_changes_in_a_burst_counts_at_once(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    """G11: no restart, no call by the old caps after the change, and no error either."""
    async with (
        open_served(server_url, tmp_path, attempt_timeout_s=60, gateway_wait_s=60) as served,
        many_clients(served.gateway.url) as client,
    ):
        policy = default_policy({"plans": {"trial": {"cap_usd": "0.0015"}}})
        statuses: list[int] = []

        async def ask_on(number: int) -> None:
            for _ in range(20):
                statuses.append((await client.post(PATH, json=asked(stream=number % 2 == 0))).status_code)

        asking = [asyncio.create_task(ask_on(number)) for number in range(8)]
        await wait_until(lambda: len(statuses) > 10, what="answers")
        await apply_policy(build_gates(served.runtime.handle, served.runtime.settings), policy, ME)
        await asyncio.gather(*asking)
        late = await client.post(PATH, json=asked())

        assert set(statuses) == {200, 402}
        assert late.status_code == 402
        events = await served.calling.events()
        changed = [number for number, event in enumerate(events) if event.type == "policy-applied"][-1]
        caps = {event.payload.cap_nanousd for event in events[changed:] if isinstance(event.payload, BudgetReserved)}
        assert caps == {1_500_000}
        await wait_until(lambda: served.gateway.calls.under_way == 0)
        await served.calling.check_guarantees()


async def test_a_key_that_is_revoked_in_a_burst_is_refused_within_two_seconds(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    async with open_served(server_url, tmp_path, attempt_timeout_s=20) as served:
        calling = served.calling
        changes = Administration(calling.runtime.ledger, calling.runtime.policies, calling.runtime.user_ids).keys
        created = await changes.create(KeyBounds(user_id="u1"), ME)
        assert created.secret is not None
        async with (
            serve_gateway(served.runtime, port=0) as gateway,
            many_clients(gateway.url, created.secret) as client,
        ):
            now, begun = asyncio.get_running_loop().time, list[tuple[float, int]]()
            is_over = asyncio.Event()

            async def ask_on() -> None:
                while not is_over.is_set():
                    began = now()
                    reply = await client.post(PATH, json=asked())
                    begun.append((began, reply.status_code))
                    if reply.status_code == 401:
                        is_over.set()

            asking = [asyncio.create_task(ask_on()) for _ in range(8)]
            await wait_until(lambda: len(begun) > 20, what="answers")
            await changes.revoke(created.key_id, ME)
            revoked = now()
            await asyncio.gather(*asking)
            assert {status for _, status in begun} == {200, 401}
            assert max(began for began, status in begun if status == 200) < revoked + 2
        await served.calling.check_guarantees()
