"""Access to the web view: keys, links that work once, sessions, forms of other sites, and what a browser may do."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from tests.gateway.looking import ADMIN_PAGES, SIGNED, administration, browser, new_key, text_of
from tests.gateway.serving import Served, open_served
from tests.servers import wait_until
from tollbook.inference.api_keys import hash_of
from tollbook.views.web.sessions import LINK_S, SESSION_S, Sessions
from tollbook.views.web.visitors import COOKIE


@pytest.fixture
async def served(redis_client: Redis, server_url: str, tmp_path: Path) -> AsyncIterator[Served]:
    async with open_served(server_url, tmp_path, hold_wait_s=5, gateway_wait_s=0.2) as served:
        yield served


def sessions(served: Served) -> Sessions:
    return Sessions(served.runtime.handle.pipeline, served.runtime.settings.namespace)


async def test_every_page_needs_a_key(served: Served) -> None:
    async with browser(served) as nobody:
        for path in (*ADMIN_PAGES, "/ui/call?id=x", "/ui/key?id=x", "/ui/none"):
            reply = await nobody.get(path)
            assert reply.status_code == 401, path
            assert "Sign in" in reply.text


async def test_nobody_changes_anything_without_a_key(served: Served) -> None:
    async with browser(served) as nobody:
        for path in ("/ui/keys", "/ui/key/revoke?id=x", "/ui/user/credit?id=u1", "/ui/user/plan?id=u1"):
            reply = await nobody.client.post(path, data={"reason": "mine", "user": "u1", "amount": "1"})
            assert reply.status_code == 401, path

    assert await administration(served).keys.list() == ()


async def test_a_key_opens_a_session_that_no_script_and_no_other_site_can_use(
    served: Served, redis_client: Redis
) -> None:
    key = await new_key(served)
    async with browser(served) as visitor:
        reply = await visitor.sign_in(key, to="/ui/keys")
        cookie = reply.headers["set-cookie"]
        page = await visitor.get("/ui/keys")

    assert (reply.status_code, reply.headers["location"]) == (303, "/ui/keys")
    assert {part.strip().lower() for part in cookie.split(";")[1:]} == {
        "httponly", "samesite=strict", "path=/ui", f"max-age={SESSION_S}",
    }  # fmt: skip
    assert key not in cookie
    assert page.status_code == 200
    # The data in Redis gives no access: neither the key nor the session's id is there.
    session_id = cookie.partition("=")[2].partition(";")[0]
    kept: dict[Any, Any] = {
        name: await redis_client.get(name) async for name in redis_client.scan_iter("*web-session*")
    }
    [(name, value)] = kept.items()
    assert json.loads(value) == {"key_hash": hash_of(key)}
    assert session_id.encode() not in name
    assert 0 < await redis_client.ttl(name) <= SESSION_S


@pytest.mark.slow
async def test_after_signing_in_only_pages_of_the_view_are_opened(served: Served) -> None:
    key = await new_key(served)
    async with browser(served) as visitor:
        for to in ("https://elsewhere.example/", "//elsewhere.example", "/ui\\..\\x", "/v1/key", "/ui\n", ""):
            assert (await visitor.sign_in(key, to=to)).headers["location"] == "/ui", to


@pytest.mark.slow
async def test_a_wrong_key_opens_nothing_and_is_not_repeated(served: Served) -> None:
    wrong = "tb-" + "x" * 43
    async with browser(served) as visitor:
        reply = await visitor.sign_in(wrong)

    assert reply.status_code == 401
    assert "This key is unknown" in reply.text
    assert wrong not in reply.text
    assert "set-cookie" not in reply.headers


@pytest.mark.slow
async def test_an_unknown_key_opens_nothing(served: Served) -> None:
    key = await new_key(served, user_id=None, allows=frozenset({"user"}))
    async with browser(served) as visitor:
        reply = await visitor.sign_in(key)

    assert reply.status_code == 403
    assert "set-cookie" not in reply.headers


async def test_a_key_in_a_header_opens_pages_too(served: Served) -> None:
    key = await new_key(served)
    async with browser(served) as visitor:
        by_bearer = await visitor.client.get("/ui/keys", headers={"authorization": f"Bearer {key}"})
        wrong = await visitor.client.get("/ui/keys", headers={"x-api-key": "tb-wrong"})

    assert (by_bearer.status_code, wrong.status_code) == (200, 401)


@pytest.mark.slow
async def test_signing_out_ends_the_session_for_everybody_who_has_its_cookie(served: Served) -> None:
    key = await new_key(served)
    async with browser(served, key) as visitor, browser(served) as thief:
        thief.client.cookies.set(COOKIE, visitor.client.cookies[COOKIE], path="/ui")
        before = await thief.get("/ui/keys")
        reply = await visitor.send("/ui", "/ui/sign-out")
        after = await thief.get("/ui/keys")

    assert (before.status_code, after.status_code) == (200, 401)
    assert reply.status_code == 303
    assert COOKIE not in visitor.client.cookies


@pytest.mark.slow
async def test_another_gateway_of_the_ledger_knows_the_session(served: Served, server_url: str, tmp_path: Path) -> None:
    key = await new_key(served)
    async with browser(served, key) as visitor, open_served(server_url, tmp_path / "other") as other:
        cookies = {COOKIE: visitor.client.cookies[COOKIE]}
        async with httpx.AsyncClient(base_url=other.gateway.url, cookies=cookies, trust_env=False) as client:
            assert (await client.get("/ui/keys")).status_code == 200


@pytest.mark.slow
async def test_a_session_ends_with_its_key(served: Served) -> None:
    key = await new_key(served)
    [issued] = await administration(served).keys.list()
    async with browser(served, key) as visitor:
        assert (await visitor.get("/ui/keys")).status_code == 200
        await administration(served).keys.revoke(issued.key.key_id, SIGNED)
        statuses: list[int] = []

        async def has_ended() -> bool:
            statuses.append((await visitor.get("/ui/keys")).status_code)
            return statuses[-1] == 401

        await wait_until(has_ended, what="the end of the session")


async def test_a_link_works_once_and_opens_an_admins_session(served: Served, redis_client: Redis) -> None:
    once = await sessions(served).make_link()
    [name] = [name async for name in redis_client.scan_iter("*web-link*")]
    assert 0 < await redis_client.ttl(name) <= LINK_S
    assert once.encode() not in name
    with capture_logs() as logs:
        async with browser(served) as visitor, browser(served) as second:
            looked = await visitor.client.head(f"/ui?once={once}")
            first = await visitor.get(f"/ui?once={once}")
            page = await visitor.get("/ui/keys")
            again = await second.get(f"/ui?once={once}")

    assert looked.status_code == 401, "a preview does not use it up"
    assert (first.status_code, first.headers["location"]) == (303, "/ui")
    assert page.status_code == 200
    assert again.status_code == 401
    assert "was already used" in again.text
    assert "set-cookie" not in again.headers
    assert once not in str(logs)


@pytest.mark.slow
async def test_a_wrong_link_opens_nothing(served: Served) -> None:
    async with browser(served) as visitor:
        for once in ("", "x", "x" * 5_000, "%00", "a b"):
            assert (await visitor.get(f"/ui?once={once}")).status_code == 401, once


async def test_forms_of_other_sites_change_nothing(served: Served) -> None:
    key = await new_key(served)
    async with browser(served, key) as visitor:
        page = (await visitor.get("/ui/keys")).text
        token = page.partition('name="form_token" value="')[2].partition('"')[0]
        assert len(token) == 64
        data = {"form_token": token, "user": "u1", "reason": "mine"}
        for headers in (
            {"sec-fetch-site": "cross-site"},
            {"sec-fetch-site": "same-site"},
            {"origin": "https://elsewhere.example"},
            {"origin": "null"},
        ):
            refused = await visitor.client.post("/ui/keys", data=data, headers=headers)
            signed_in = await visitor.client.post("/ui/session", data={"key": key}, headers=headers)
            assert (refused.status_code, signed_in.status_code) == (403, 403), headers
            assert "another site" in refused.text

    assert len(await administration(served).keys.list()) == 1


async def test_a_form_without_the_sessions_token_changes_nothing(served: Served) -> None:
    async with browser(served, await new_key(served)) as visitor:
        for token in ("", "x", "0" * 64, "\u0663"):
            data = {"form_token": token, "user": "u1", "reason": "mine"}
            reply = await visitor.client.post("/ui/keys", data=data)
            out = await visitor.client.post("/ui/sign-out", data={"form_token": token})
            assert (reply.status_code, out.status_code) == (403, 403), token

    assert len(await administration(served).keys.list()) == 1


@pytest.mark.slow
async def test_bodies_that_are_no_form_are_refused(served: Served) -> None:
    form = "application/x-www-form-urlencoded"
    async with browser(served, await new_key(served)) as visitor:
        for content, kind, status in (
            (b"{}", "application/json", 415),
            (b"a=" + b"x" * 70_000, form, 413),
            (b"a=%ff", form, 400),
            (b"&".join(b"a=1" for _ in range(500)), form, 400),
        ):
            reply = await visitor.client.post("/ui/keys", content=content, headers={"content-type": kind})
            assert reply.status_code == status, content[:20]


async def test_answers_are_not_kept_not_framed_and_run_no_script(served: Served) -> None:
    async with browser(served, await new_key(served)) as visitor:
        for path in ("/ui", "/ui/keys", "/ui/none", "/ui/call?id=none"):
            headers = (await visitor.get(path)).headers
            policy = headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "script-src" not in policy
            assert "frame-ancestors 'none'" in policy
            assert headers["cache-control"] == "no-store"
            assert headers["x-content-type-options"] == "nosniff"
            assert "no-referrer" not in headers["referrer-policy"], "then browsers would not say whose form it is"


@pytest.mark.slow
async def test_the_stylesheet_needs_no_key_and_no_other_host(served: Served) -> None:
    async with browser(served) as visitor:
        reply = await visitor.get("/ui/style.css")

    assert reply.headers["content-type"].startswith("text/css")
    assert "url(" not in reply.text
    assert "@import" not in reply.text


async def test_an_address_without_a_page_says_so(served: Served) -> None:
    async with browser(served, await new_key(served)) as visitor:
        reply = await visitor.get("/ui/nowhere")

    assert reply.status_code == 404
    assert "There is no such page" in text_of(reply.text)
