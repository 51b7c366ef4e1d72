"""The pages of the web view: what they show, of whom, how it is written, and with nothing to show."""

import re
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import quote

import pytest
from redis.asyncio import Redis

from tests.gateway.looking import (
    ADMIN_PAGES,
    SIGNED,
    Browser,
    Outline,
    administration,
    browser,
    call_as,
    new_key,
    text_of,
)
from tests.gateway.serving import Served, open_served
from tollbook.inference.key_changes import KeyBounds
from tollbook.schemas.money import format_usd
from tollbook.views.web import call_pages, spend_pages

pytestmark = pytest.mark.slow

HOSTILE = "</td><script>alert(1)</script><img/src=x/onerror=alert(2)>"
RIGHT_TO_LEFT = "\u05d0\u05d1\u05d2"
POLICY = """
[[budgets]]
name = "shared"
by = []
window = "total"
cap_usd = 0.009
alerts = [0.001]
"""


@pytest.fixture
async def served(redis_client: Redis, server_url: str, tmp_path: Path) -> AsyncIterator[Served]:
    async with open_served(server_url, tmp_path, hold_wait_s=5, gateway_wait_s=0.2) as served:
        yield served
        await served.calling.check_guarantees()


async def refuse(served: Served, user_id: str = "u1") -> str:
    """Let a call of a user be refused, and return its id."""
    await served.calling.set_cap(1_000, user_id)
    return await call_as(served, user_id)


def check_outline(page: str) -> None:
    """Assert what people with a screen reader need."""
    outline = Outline(page)
    assert outline.language == "en"
    assert outline.tags.count("h1") == outline.tags.count("main") == outline.tags.count("title") == 1
    assert set(outline.fields) <= outline.labelled
    assert len(outline.ids) == len(set(outline.ids))
    assert set(outline.scopes) <= {"col", "row"}
    assert outline.tags.count("caption") == outline.tags.count("table")
    assert "script" not in outline.tags
    assert 'style="' not in page
    assert 'href="#main"' in page


async def test_every_page_is_whole_with_and_without_data(served: Served) -> None:
    key = await new_key(served, name="ops")
    async with browser(served, key) as visitor:
        for path in ADMIN_PAGES:
            reply = await visitor.get(path)
            assert reply.status_code == 200, reply.text
            check_outline(reply.text)
        call = await call_as(served, "u1", model="generate_draft")
        await refuse(served)
        await served.calling.folded()
        for path in (*ADMIN_PAGES, f"/ui/call?id={call}", "/ui/calls?user=u1&status=done"):
            reply = await visitor.get(path)
            assert reply.status_code == 200, reply.text
            check_outline(reply.text)


async def test_the_page_that_is_open_is_marked_in_the_navigation(served: Served) -> None:
    async with browser(served, await new_key(served)) as visitor:
        for path in ("/ui", "/ui/calls", "/ui/keys"):
            page = (await visitor.get(path)).text
            assert re.findall(r'<a href="([^"]*)" aria-current="page">', page) == [path]


async def test_spend_is_what_the_ledger_booked(served: Served) -> None:
    key = await new_key(served)
    await call_as(served, "u1")
    await call_as(served, "u2")
    await served.calling.folded()
    async with browser(served, key) as visitor:
        spend = text_of((await visitor.get("/ui/spend")).text)
        user = text_of((await visitor.get("/ui/user?id=u2")).text)
        now = text_of((await visitor.get("/ui")).text)

    shown = format_usd(await served.calling.spent("u2"), places=4)
    assert f"u2 trial {shown} $0.0000 $5.00 0%" in spend
    assert re.search(rf"User u2, period [0-9-]{{7}} {re.escape(shown)} \$0.0000 \$5.00", user)
    assert f"u2 trial {shown}" in now
    assert "Up to date with the ledger" in spend


async def test_a_projection_that_is_behind_says_so_and_one_that_is_missing_too(served: Served) -> None:
    await call_as(served, "u1")
    await served.calling.folded()
    async with browser(served, await new_key(served)) as visitor:
        path = served.runtime.settings.projection_path
        path.rename(path.with_suffix(".away"))
        missing = await visitor.get("/ui/spend")
        of_gate = await visitor.get("/ui/user?id=u1")
        spent = format_usd(await served.calling.spent(), places=4)
        path.with_suffix(".away").rename(path)
        served.calling.projector.pause()
        await call_as(served, "u1")
        behind = await visitor.get("/ui/spend")
        served.calling.projector.resume()

    assert missing.status_code == 503
    assert "there is no projection" in text_of(missing.text).lower()
    assert "events behind the ledger" in behind.text
    assert of_gate.status_code == 200, "what the gate says is shown without the projection"
    assert f"{spent} $0.0000 $5.00" in text_of(of_gate.text)


async def test_the_life_of_a_call_and_its_refusal_are_explained(served: Served) -> None:
    done = await call_as(served, "u1")
    refused = await refuse(served)
    async with browser(served, await new_key(served)) as visitor:
        life = text_of((await visitor.get(f"/ui/call?id={done}")).text)
        why = text_of((await visitor.get(f"/ui/call?id={refused}")).text)
        none = await visitor.get("/ui/call?id=none")

    cost = format_usd(await served.calling.spent(), places=None)
    assert f"done, cost {cost}, 1 hold, 1 attempt" in life
    assert "Why it was let through" in life
    assert "Why it was refused" in why
    assert "over the cap" in why
    assert "Any of these would have let it pass: a cap or credit higher by" in why
    assert none.status_code == 404


async def test_refusals_and_calls_lead_to_their_reasons(served: Served) -> None:
    refused = await refuse(served)
    await served.calling.folded()
    async with browser(served, await new_key(served)) as visitor:
        for path in ("/ui/refusals", "/ui/calls?status=denied"):
            assert f'href="/ui/call?id={refused}"' in (await visitor.get(path)).text


async def test_calls_are_filtered_and_paged(served: Served) -> None:
    calls = [await call_as(served, user) for user in ("u1", "u2", "u1")]
    refused = await refuse(served, "u2")
    await served.calling.folded()

    async def found(query: str) -> list[str]:
        page = (await visitor.get(f"/ui/calls?{query}")).text
        return re.findall(r'href="/ui/call\?id=([^"]*)"', page)

    async with browser(served, await new_key(served)) as visitor:
        assert await found("") == [refused, *reversed(calls)]
        assert await found("user=u1") == [calls[2], calls[0]]
        assert await found("user=u2&status=denied") == [refused]
        assert await found("model=openai%2Fgpt-4o-mini") == [refused, *reversed(calls)]
        assert await found("model=none") == await found("campaign=none") == await found("since=2999-01-01") == []
        assert await found("since=2026-01-01&until=2998-01-01") == [refused, *reversed(calls)]
        for wrong in ("status=lost", "since=yesterday", "before=1"):
            assert (await visitor.get(f"/ui/calls?{wrong}")).status_code == 400


async def test_a_page_has_fifty_calls_and_leads_to_the_older_ones(served: Served) -> None:
    await served.calling.set_cap(1_000)
    calls = [await call_as(served, "u1") for _ in range(53)]
    await served.calling.folded()
    async with browser(served, await new_key(served)) as visitor:
        page = (await visitor.get("/ui/calls?user=u1")).text
        [older] = re.findall(r'href="([^"]*before=[^"]*)"', page)
        rest = (await visitor.get(older.replace("&amp;", "&"))).text

    shown = [re.findall(r'href="/ui/call\?id=([^"]*)"', each) for each in (page, rest)]
    assert [len(each) for each in shown] == [50, 3]
    assert [*shown[0], *shown[1]] == calls[::-1]


async def test_refusals_are_paged(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_pages, "_PAGE", 2)
    refused = [await refuse(served, "u2"), *[await call_as(served, "u2") for _ in range(2)]]
    await served.calling.folded()
    async with browser(served, await new_key(served)) as visitor:
        assert await pages_of(visitor, "/ui/refusals?user=u2") == [[refused[2], refused[1]], [refused[0]]]
        assert (await visitor.get("/ui/refusals?before=1")).status_code == 400


async def test_alerts_are_paged(
    redis_client: Redis, server_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spend_pages, "_ALERTS", 1)
    policy = POLICY.replace("alerts = [0.001]", "alerts = [0.0005, 0.001]")
    (tmp_path / "tollbook.toml").write_text(policy, encoding="utf-8")
    async with open_served(server_url, tmp_path, policy_file=tmp_path / "tollbook.toml") as served:
        booked = await call_as(served, "u1")
        await served.calling.folded()
        async with browser(served, await new_key(served)) as visitor:
            assert await pages_of(visitor, "/ui/alerts") == [[booked], [booked]]


async def pages_of(visitor: Browser, path: str) -> list[list[str]]:
    """Return the calls on each page, from the newest to the last."""
    found: list[list[str]] = []
    while path:
        page = (await visitor.get(path)).text
        found.append(re.findall(r'href="/ui/call\?id=([^"]*)"', page))
        [path] = re.findall(r'href="([^"]*)"[^>]*><bdi>Older', page) or [""]
        path = path.replace("&amp;", "&")
    return found


async def test_a_users_key_shows_that_user_alone(served: Served) -> None:
    own, others = await call_as(served, "u1"), await call_as(served, "u2")
    refused = await refuse(served, "u2")
    await served.calling.folded()
    async with browser(served, await new_key(served, user_id="u1", name="shop")) as visitor:
        usage = text_of((await visitor.get("/ui")).text)
        calls = (await visitor.get("/ui/calls")).text
        asked = (await visitor.get("/ui/calls?user=u2")).text
        refusals = (await visitor.get("/ui/refusals?user=u2")).text
        life = await visitor.get(f"/ui/call?id={own}")
        foreign = await visitor.get(f"/ui/call?id={others}")
        for path in ADMIN_PAGES:
            expected = 200 if path in ("/ui", "/ui/calls", "/ui/refusals") else 403
            assert (await visitor.get(path)).status_code == expected, path
        for path in ("/ui/keys", "/ui/user/credit?id=u1", "/ui/user/plan?id=u1", "/ui/key/revoke?id=x"):
            reply = await visitor.client.post(path, data={"reason": "more", "amount": "5"})
            assert reply.status_code == 403, path

    assert format_usd(await served.calling.spent("u1"), places=4) in usage
    for page in (calls, asked):
        assert own in page
        assert others not in page
        assert "u2" not in text_of(page)
    assert refused not in refusals
    assert life.status_code == 200
    assert foreign.status_code == 404
    assert "u2" not in text_of(foreign.text)
    assert "Keys" not in text_of(calls)


async def test_others_that_hold_money_of_a_shared_budget_have_no_names(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    (tmp_path / "tollbook.toml").write_text(POLICY, encoding="utf-8")
    settings = {"policy_file": tmp_path / "tollbook.toml", "gateway_wait_s": 0.2}
    async with open_served(server_url, tmp_path, **settings) as served:
        booked = await call_as(served, "somebody-else")
        held = "held-by-another"
        async with served.calling.runner() as (runner, _):
            await runner.reserve(served.calling.call(held, user_id="somebody-else", task="extract_patterns"))
        own = await call_as(served, "u1", max_tokens=4_000)
        await served.calling.folded()
        async with browser(served, await new_key(served, user_id="u1")) as visitor:
            page = text_of((await visitor.get(f"/ui/call?id={own}")).text)
        async with browser(served, await new_key(served)) as visitor:
            of_admin = text_of((await visitor.get(f"/ui/call?id={own}")).text)
            alerts = (await visitor.get("/ui/alerts")).text
            spend = text_of((await visitor.get("/ui/spend")).text)

        assert f"Held by {held}" in of_admin
        assert "Held by 1 other call" in page
        assert held not in page
        assert "somebody-else" not in page
        assert f'href="/ui/call?id={booked}"' in alerts
        assert "shared all total" in spend


async def test_names_with_markup_are_shown_as_text(served: Served) -> None:
    name, reason = "<b>bold</b>", "because <i>so</i> \u202egnihton"
    bounds = KeyBounds(user_id=HOSTILE, name=name, campaign_id=RIGHT_TO_LEFT)
    await administration(served).keys.create(bounds, SIGNED.__class__("tests", reason))
    await call_as(served, HOSTILE)
    await call_as(served, RIGHT_TO_LEFT)
    await served.calling.folded()
    async with browser(served, await new_key(served)) as visitor:
        user, other = quote(HOSTILE, safe=""), quote(RIGHT_TO_LEFT, safe="")
        for path in ("/ui", "/ui/spend", f"/ui/user?id={user}", f"/ui/calls?user={user}&model={user}", "/ui/keys"):
            page = (await visitor.get(path)).text
            check_outline(page)
            assert "<img" not in page
            assert "<b>" not in page
            assert HOSTILE in text_of(page) or f'value="{HOSTILE}"'.replace("<", "&lt;").replace(">", "&gt;") in page
        [issued] = [each for each in await administration(served).keys.list() if each.key.name == name]
        key = (await visitor.get(f"/ui/key?id={issued.key.key_id}")).text
        spend = (await visitor.get("/ui/spend")).text
        unknown = (await visitor.get(f"/ui/call?id={user}")).text

    assert "\u202e" not in key
    assert "because <i>so</i> \\x202egnihton" in text_of(key).replace("&lt;", "<")
    assert f"<bdi>{RIGHT_TO_LEFT}</bdi>" in spend
    assert other in spend
    assert "<img" not in unknown


async def test_users_whose_ids_are_hashed_are_named_to_admins_and_to_themselves(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    (tmp_path / "tollbook.toml").write_text('user_ids = "hashed"\n', encoding="utf-8")
    async with open_served(server_url, tmp_path, policy_file=tmp_path / "tollbook.toml") as served:
        admin, own = await new_key(served), await new_key(served, user_id="ann@example.com")
        call = await call_as(served, "ann@example.com")
        await served.calling.folded()
        async with browser(served, admin) as visitor:
            for path in ("/ui", "/ui/spend", "/ui/keys", "/ui/calls?user=ann%40example.com", f"/ui/call?id={call}"):
                assert "ann@example.com" in (await visitor.get(path)).text, path
            granted = await visitor.send(
                "/ui/user?id=ann%40example.com", "/ui/user/credit?id=ann%40example.com", amount="1", reason="x"
            )
        async with browser(served, own) as visitor:
            usage = await visitor.get("/ui")
            life = await visitor.get(f"/ui/call?id={call}")

        assert granted.status_code == 303
        assert "ann@example.com" in usage.text
        assert "$6.00" in usage.text
        assert life.status_code == 200
        assert "ann@example.com" not in str(await served.calling.raw_events())
