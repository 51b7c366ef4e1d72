"""The web view in a real browser: by keyboard alone, on a phone, in the dark, for screen readers."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest
from playwright.async_api import Browser, Page, async_playwright
from redis.asyncio import Redis

from tests.chromium import CHROMIUM, FLAGS, describe_chromium, is_ci
from tests.gateway.looking import ADMIN_PAGES, call_as, new_key
from tests.gateway.serving import Served, open_served
from tollbook.views.web.sessions import Sessions

pytestmark = pytest.mark.slow

DESKTOP: Final = {"width": 1280, "height": 900}
PHONE: Final = {"width": 390, "height": 844}
LONG: Final = "a-user-with-a-very-long-name-" + "x" * 90

# Elements that can have the focus and are visible.
FOCUSABLE: Final = """
[...document.querySelectorAll('a[href], button, input:not([type=hidden]), select')]
    .filter(each => each.checkVisibility()).map(each => each.outerHTML)
"""
# The contrast of every text with what is behind it, by WCAG 2.2: the ratio of the relative luminances.
LOW_CONTRAST: Final = """
() => {
    const parse = text => {
        const found = text.match(/[\\d.]+/g).map(Number);
        return found.length < 4 ? [...found, 1] : found;
    };
    const luminance = ([r, g, b]) => {
        const [x, y, z] = [r, g, b].map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        return 0.2126 * x + 0.7152 * y + 0.0722 * z;
    };
    const behind = node => {
        for (let each = node; each; each = each.parentElement) {
            const colour = parse(getComputedStyle(each).backgroundColor);
            if (colour[3] > 0) return colour;
        }
        return [255, 255, 255, 1];
    };
    const low = [];
    for (const node of document.querySelectorAll('body *')) {
        const has_text = [...node.childNodes].some(each => each.nodeType === 3 && each.data.trim());
        if (!has_text || !node.checkVisibility()) continue;
        const [one, two] = [luminance(parse(getComputedStyle(node).color)), luminance(behind(node))];
        const ratio = (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
        if (ratio < 4.5) low.push(`${ratio.toFixed(2)}: ${node.outerHTML.slice(0, 120)}`);
    }
    return low;
}
"""


@pytest.fixture
async def served(redis_client: Redis, server_url: str, tmp_path: Path) -> AsyncIterator[Served]:
    async with open_served(server_url, tmp_path, hold_wait_s=5, gateway_wait_s=0.2) as served:
        yield served


@pytest.fixture
async def chromium() -> AsyncIterator[Browser]:
    if CHROMIUM is None:
        (pytest.fail if is_ci() else pytest.skip)(describe_chromium())
    async with async_playwright() as playwright:
        opened = await playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield opened
        await opened.close()


async def fill(served: Served) -> str:
    """Make data for every page, and return the id of a refused call."""
    for user in ("u1", LONG, "<script>alert(1)</script>"):
        await call_as(served, user)
    await new_key(served, user_id="u1", name="shop", models=("generate_draft",))
    await served.calling.set_cap(1_000)
    refused = await call_as(served, "u1")
    await served.calling.folded()
    return refused


async def open_view(served: Served, chromium: Browser, problems: list[str], **options: Any) -> Page:
    """Sign in by the link, and note whatever the browser asks other hosts for, complains about, or executes."""
    page = await (await chromium.new_context(**options)).new_page()
    page.on("pageerror", lambda error: problems.append(f"error: {error}"))
    page.on("console", lambda message: problems.append(f"console: {message.text}"))
    page.on("dialog", lambda dialog: problems.append(f"a name was executed: {dialog.message}"))
    page.on(
        "request",
        lambda request: None if request.url.startswith((served.gateway.url, "data:")) else problems.append(request.url),
    )
    sessions = Sessions(served.runtime.handle.pipeline, served.runtime.settings.namespace)
    await page.goto(f"{served.gateway.url}/ui?once={await sessions.make_link()}")
    assert page.url == f"{served.gateway.url}/ui"
    return page


async def test_everything_is_reached_by_keyboard_and_seen_when_it_is(served: Served, chromium: Browser) -> None:
    refused, problems = await fill(served), list[str]()
    page = await open_view(served, chromium, problems, viewport=DESKTOP)
    for path in (*ADMIN_PAGES, f"/ui/call?id={refused}"):
        await page.goto(served.gateway.url + path)
        expected = await page.evaluate(FOCUSABLE)
        reached, seen = list[str](), set[str]()
        while len(reached) < len(expected):
            await page.keyboard.press("Tab")
            focus = await page.evaluate(
                "(() => { const on = document.activeElement, style = getComputedStyle(on);"
                "return [on.outerHTML, style.outlineStyle, on.getBoundingClientRect().left] })()"
            )
            if focus[1] == "solid":
                seen.add(focus[0])
            assert focus[2] >= 0, f"{focus[0]} has the focus outside the page"
            if reached[-1:] != focus[:1]:  # A date has several stops, of which the last has an outline of its own.
                reached.append(focus[0])
        assert seen == set(expected), "the focus is not seen on what is missing"
        assert reached == expected, path
        assert "Skip to the content" in reached[0]
    assert problems == []


async def test_a_key_is_made_with_the_keyboard_alone(served: Served, chromium: Browser) -> None:
    problems: list[str] = []
    page = await open_view(served, chromium, problems, viewport=DESKTOP)
    await page.goto(f"{served.gateway.url}/ui/keys")
    await page.get_by_label("User").first.focus()
    await page.keyboard.type("u42")
    await page.get_by_label("Reason").focus()
    await page.keyboard.type("by hand")
    await page.keyboard.press("Enter")
    await page.get_by_role("heading", name="Key created").wait_for()
    secret = await page.locator(".secret").inner_text()
    assert secret.startswith("tb-")
    await page.get_by_role("button", name="Sign out").click()
    await page.get_by_label("Key").fill(secret)
    await page.keyboard.press("Enter")
    await page.get_by_role("heading", name="Usage").wait_for()
    assert await page.get_by_role("link", name="Keys").count() == 0
    assert [each for each in problems if "401" not in each] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_text_has_enough_contrast(served: Served, chromium: Browser, scheme: str) -> None:
    refused, problems = await fill(served), list[str]()
    page = await open_view(served, chromium, problems, viewport=DESKTOP, color_scheme=scheme)
    for path in (*ADMIN_PAGES, f"/ui/call?id={refused}", "/ui/user?id=u1&done=credit"):
        await page.goto(served.gateway.url + path)
        assert await page.evaluate(LOW_CONTRAST) == [], path
    background = await page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    assert problems == []


async def test_a_phone_shows_all_of_it_and_tables_stay_tables(served: Served, chromium: Browser) -> None:
    refused, problems = await fill(served), list[str]()
    page = await open_view(served, chromium, problems, viewport=PHONE, has_touch=True, is_mobile=True)
    for path in (*ADMIN_PAGES, f"/ui/call?id={refused}"):
        await page.goto(served.gateway.url + path)
        assert await page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], path
        wide = "[...document.querySelectorAll('section')].filter(each => each.scrollWidth > each.clientWidth).length"
        assert await page.evaluate(wide) == 0, path
    await page.goto(f"{served.gateway.url}/ui/spend")
    table = page.get_by_role("table", name="Spend in")
    assert await table.get_by_role("columnheader").count() == 9
    assert await table.get_by_role("row").count() == 4
    assert await table.get_by_role("rowheader", name=LONG).count() == 1
    heights = "[...document.querySelectorAll('nav a, button')].map(each => each.getBoundingClientRect().height)"
    assert min(await page.evaluate(heights)) >= 24
    assert problems == []
