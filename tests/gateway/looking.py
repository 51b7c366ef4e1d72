"""Users of the web view in tests: keys of a real ledger, and browsers without a screen."""

import html
import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import Any

import httpx

from tests.gateway.serving import KEY, Served, api_key
from tollbook.inference.administration import Administration
from tollbook.inference.key_changes import KeyBounds
from tollbook.ledger.signature import Signature

ADMIN_PAGES = (
    "/ui", "/ui/spend", "/ui/user?id=u1", "/ui/calls", "/ui/refusals", "/ui/alerts", "/ui/keys", "/ui/health",
)  # fmt: skip
SIGNED = Signature("tests", "a test")


def administration(served: Served) -> Administration:
    return Administration(served.runtime.ledger, served.runtime.policies, served.runtime.user_ids)


async def new_key(served: Served, **bounds: Any) -> str:
    """Create a key on the ledger; for an admin unless `bounds` name a user."""
    chosen: dict[str, Any] = {"is_admin": "user_id" not in bounds, **bounds}
    created = await administration(served).keys.create(KeyBounds(**chosen), SIGNED)
    assert created.secret is not None
    return created.secret


async def call_as(served: Served, user_id: str, **fields: Any) -> str:
    """Make a call for a user, and return its id."""
    served.keys.by_secret[KEY] = api_key(user_id=user_id)
    reply = await served.chat(**fields)
    return reply.headers["x-tollbook-call-id"]


@dataclass(frozen=True, slots=True)
class Browser:
    """A client with cookies, which sends forms as they stand on pages."""

    client: httpx.AsyncClient

    async def get(self, path: str) -> httpx.Response:
        return await self.client.get(path)

    async def send(self, page: str, action: str, **fields: str) -> httpx.Response:
        """Fill a form of a page in, and send it."""
        shown = (await self.get(page)).text
        forms = [form for form in Forms.of(shown) if form["action"] == action]
        assert forms, f"{page} has no form for {action}"
        return await self.client.post(action, data=forms[0]["hidden"] | fields)

    async def sign_in(self, key: str, *, to: str = "/ui") -> httpx.Response:
        return await self.client.post("/ui/session", data={"key": key, "to": to})


@asynccontextmanager
async def browser(served: Served, key: str | None = None) -> AsyncGenerator[Browser]:
    """Open a browser, signed in where a key is given."""
    async with httpx.AsyncClient(base_url=served.gateway.url, timeout=30, trust_env=False) as client:
        opened = Browser(client)
        if key is not None:
            assert (await opened.sign_in(key)).status_code == 303
        yield opened


class Forms(HTMLParser):
    """Reads the forms of a page: where they lead, and their hidden fields."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[dict[str, Any]] = []

    @classmethod
    def of(cls, text: str) -> list[dict[str, Any]]:
        parser = cls()
        parser.feed(text)
        return parser.found

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        if tag == "form":
            self.found.append({"action": known["action"], "method": known["method"], "hidden": {}})
        elif tag == "input" and known.get("type") == "hidden":
            self.found[-1]["hidden"][known["name"]] = known["value"]


class Outline(HTMLParser):
    """Reads what a screen reader needs: headings, language, labels, captions, column headings."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.language = ""
        self.labelled: set[str] = set()
        self.fields: list[str] = []
        self.ids: list[str] = []
        self.scopes: list[str | None] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        self.tags.append(tag)
        if identity := known.get("id"):
            self.ids.append(identity)
        if tag == "html":
            self.language = known.get("lang") or ""
        elif tag == "label":
            self.labelled.add(known["for"] or "")
        elif tag == "th":
            self.scopes.append(known.get("scope"))
        elif tag in ("input", "select") and known.get("type") != "hidden" and "hidden" not in known:
            self.fields.append(known["id"] or "")


def text_of(page: str) -> str:
    """Return what a page says, without its markup, with single spaces."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())
