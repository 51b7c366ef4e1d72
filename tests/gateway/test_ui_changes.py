"""What admins change in the web view: keys, credit and plans, each once and with a reason."""

import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from tests.gateway.looking import Forms, administration, browser, new_key, text_of
from tests.gateway.serving import Served, open_served
from tollbook.inference.api_keys import ApiKeys
from tollbook.schemas.events import CreditGranted, KeyCreated, PlanAssigned
from tollbook.schemas.money import NANOUSD_PER_USD

pytestmark = pytest.mark.slow


@pytest.fixture
async def served(redis_client: Redis, server_url: str, tmp_path: Path) -> AsyncIterator[Served]:
    async with open_served(server_url, tmp_path, hold_wait_s=5, gateway_wait_s=0.2) as served:
        yield served


def secrets_in(page: str) -> list[str]:
    return re.findall(r"tb-[A-Za-z0-9_-]{43}", page)


async def find(served: Served, secret: str) -> object:
    """Return the key as a gateway finds it that has not seen it before."""
    handle = served.runtime.handle
    return await ApiKeys(handle.pipeline, handle.keys[0], monotonic=lambda: 0.0).find(secret)


async def test_a_key_is_created_shown_once_and_in_force(served: Served) -> None:
    fields = {
        "user": "u7", "name": "shop", "plan": "growth", "tags": "team=red tier=2", "models": "generate_draft",
        "streams": "generation", "days": "30", "allows": "campaign", "reason": "the shop",
    }  # fmt: skip
    async with browser(served, await new_key(served, name="ops")) as visitor:
        page = (await visitor.get("/ui/keys")).text
        [form] = [each for each in Forms.of(page) if each["action"] == "/ui/keys"]
        created = await visitor.client.post("/ui/keys", data=form["hidden"] | fields)
        again = await visitor.client.post("/ui/keys", data=form["hidden"] | fields)
        listed = (await visitor.get("/ui/keys")).text

    [secret] = secrets_in(created.text)
    assert again.status_code == 200
    assert "cannot be shown again" in text_of(again.text)
    assert secrets_in(again.text) == secrets_in(listed) == []
    issued = (await administration(served).keys.list())[-1]
    assert (issued.key.user_id, issued.key.plan, issued.key.tags) == ("u7", "growth", {"team": "red", "tier": "2"})
    assert (issued.key.models, issued.key.streams, issued.key.allows) == (
        ("generate_draft",), ("generation",), frozenset({"campaign"}),
    )  # fmt: skip
    assert issued.key.expires_ms is not None
    assert not issued.key.is_admin
    assert issued.created_by.startswith("ops (key-")
    assert issued.reason == "the shop"
    assert await find(served, secret) == issued.key
    created_events = [event for event in await served.calling.events() if isinstance(event.payload, KeyCreated)]
    assert len(created_events) == 2
    assert secret not in str(await served.calling.raw_events())


async def test_an_impossible_key_is_refused_with_the_reason(served: Served) -> None:
    wrong = (
        {"user": "u1", "reason": ""},
        {"reason": "nobody's"},
        {"user": "u1", "plan": "none", "reason": "x"},
        {"user": "u1", "models": "no-such-task", "reason": "x"},
        {"user": "u1", "tags": "team", "reason": "x"},
        {"user": "u1", "days": "7000", "reason": "x"},
        {"user": "a\x01b", "reason": "x"},
    )
    async with browser(served, await new_key(served)) as visitor:
        for fields in wrong:
            reply = await visitor.send("/ui/keys", "/ui/keys", **fields)
            assert reply.status_code == 400, fields
            assert 'role="alert"' in reply.text
    assert len(await administration(served).keys.list()) == 1


async def test_a_key_is_replaced_and_revoked(served: Served) -> None:
    async with browser(served, await new_key(served)) as visitor:
        old = secrets_in((await visitor.send("/ui/keys", "/ui/keys", user="u1", reason="x")).text)[0]
        old_id = (await administration(served).keys.list())[-1].key.key_id
        page = f"/ui/key?id={old_id}"
        replaced = await visitor.send(page, f"/ui/key/rotate?id={old_id}", hours="0", reason="every quarter")
        [new] = secrets_in(replaced.text)
        gone = (await visitor.get(page)).text
        new_id = (await administration(served).keys.list())[-1].key.key_id
        revoked = await visitor.send(f"/ui/key?id={new_id}", f"/ui/key/revoke?id={new_id}", hours="0", reason="lost")
        page_text = (await visitor.get(revoked.headers["location"])).text

    assert await find(served, old) is None
    assert await find(served, new) is None
    assert not [form for form in Forms.of(gone) if form["action"].startswith("/ui/key/")]
    assert "The key was revoked." in page_text
    assert (await administration(served).keys.list())[-1].revoked_by is not None


async def test_credit_is_granted_once_however_often_the_form_is_sent(served: Served) -> None:
    async with browser(served, await new_key(served, name="ops")) as visitor:
        page = (await visitor.get("/ui/user?id=u1")).text
        [form] = [each for each in Forms.of(page) if each["action"] == "/ui/user/credit?id=u1"]
        data = form["hidden"] | {"amount": "2.50", "reason": "sorry"}
        first = await visitor.client.post(form["action"], data=data)
        second = await visitor.client.post(form["action"], data=data)
        other = await visitor.client.post(form["action"], data=data | {"amount": "3"})
        page_text = text_of((await visitor.get(first.headers["location"])).text)

    assert first.headers["location"] == "/ui/user?id=u1&done=credit"
    assert second.headers["location"] == "/ui/user?id=u1&done=repeated"
    assert other.status_code == 400
    [(amount, payload)] = [
        (event.amount, event.payload)
        for event in await served.calling.events()
        if isinstance(event.payload, CreditGranted)
    ]
    assert amount == 2_500_000_000
    assert payload.reason == "sorry"
    assert payload.author.startswith("ops (key-")
    assert "The credit was granted." in page_text
    assert "$7.50" in page_text


async def test_a_large_amount_needs_a_tick(served: Served) -> None:
    action = "/ui/user/credit?id=u1"
    async with browser(served, await new_key(served)) as visitor:
        refused = await visitor.send("/ui/user?id=u1", action, amount="100.01", reason="x")
        wrong = [
            (await visitor.send("/ui/user?id=u1", action, amount=amount, reason="x")).status_code
            for amount in ("", "0", "-1", "a lot", "1e99", "NaN")
        ]
        granted = await visitor.send("/ui/user?id=u1", action, amount="$1,000", reason="x", sure="yes")

    assert refused.status_code == 400
    assert "more than $100.00" in text_of(refused.text)
    assert wrong == [400] * 6
    assert granted.status_code == 303
    events = [event for event in await served.calling.events() if isinstance(event.payload, CreditGranted)]
    assert [event.amount for event in events] == [1_000 * NANOUSD_PER_USD]


async def test_a_plan_is_set_with_its_cap_or_another(served: Served) -> None:
    action = "/ui/user/plan?id=u1"
    async with browser(served, await new_key(served)) as visitor:
        first = await visitor.send("/ui/user?id=u1", action, plan="growth", reason="upgrade")
        second = await visitor.send("/ui/user?id=u1", action, plan="growth", cap="12.5", reason="less")
        wrong = await visitor.send("/ui/user?id=u1", action, plan="none", reason="x")
        without_reason = await visitor.send("/ui/user?id=u1", action, plan="growth", reason=" ")

    assert (first.status_code, second.status_code, wrong.status_code) == (303, 303, 400)
    assert without_reason.status_code == 400
    payloads = [event.payload for event in await served.calling.events()]
    caps = [each.cap_nanousd for each in payloads if isinstance(each, PlanAssigned)]
    assert caps == [40 * NANOUSD_PER_USD, 12_500_000_000]
