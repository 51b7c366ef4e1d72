"""The routes of the web view, and the checks of every request: the visitor, what that visitor may see, and headers."""

import hashlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import structlog
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from tollbook.gateway.problems import Problem
from tollbook.inference.api_keys import ApiKeys
from tollbook.inference.runtime import InferenceRuntime
from tollbook.ledger.errors import LedgerError
from tollbook.views.web.call_pages import call_page, calls_page, refusals_page
from tollbook.views.web.changes import grant_credit, set_plan
from tollbook.views.web.drawing import draw, stylesheet
from tollbook.views.web.key_pages import create_key, key_page, keys_page, revoke_key, rotate_key
from tollbook.views.web.parts import Notice, Page, sentence
from tollbook.views.web.sessions import Sessions
from tollbook.views.web.sources import Sources, open_sources
from tollbook.views.web.spend_pages import alerts_page, own_page, spend_page, user_page
from tollbook.views.web.system_pages import health_page, now_page
from tollbook.views.web.visit import Visit
from tollbook.views.web.visitors import (
    PATH,
    Refused,
    Visitor,
    Visitors,
    check_form,
    check_origin,
    drop_cookie,
    read_form,
    set_cookie,
)

_HEADERS: Final = {
    "content-security-policy": "default-src 'none'; style-src 'self'; img-src data:; form-action 'self'; "
    "frame-ancestors 'none'; base-uri 'none'",
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    # Without a referrer, browsers would not send which site a form comes from.
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}
_ADMIN: Final = (
    ("/ui", "Now"),
    ("/ui/spend", "Spend"),
    ("/ui/calls", "Calls"),
    ("/ui/refusals", "Refusals"),
    ("/ui/alerts", "Alerts"),
    ("/ui/keys", "Keys"),
    ("/ui/health", "Health"),
)
_OWNER: Final = (("/ui", "Usage"), ("/ui/calls", "Calls"), ("/ui/refusals", "Refusals"))
_log = structlog.get_logger(__name__)

Show = Callable[[Visit], Awaitable[Page | str]]
"""Returns a page, or the address to redirect to."""


@dataclass(frozen=True, slots=True)
class _Place:
    path: str
    show: Show
    change: Show | None = None
    is_for_all: bool = False


_PLACES: Final = (
    _Place("/ui", now_page),
    _Place("/ui/spend", spend_page),
    _Place("/ui/user", user_page),
    _Place("/ui/user/credit", user_page, grant_credit),
    _Place("/ui/user/plan", user_page, set_plan),
    _Place("/ui/calls", calls_page, is_for_all=True),
    _Place("/ui/call", call_page, is_for_all=True),
    _Place("/ui/refusals", refusals_page, is_for_all=True),
    _Place("/ui/alerts", alerts_page),
    _Place("/ui/keys", keys_page, create_key),
    _Place("/ui/key", key_page),
    _Place("/ui/key/revoke", key_page, revoke_key),
    _Place("/ui/key/rotate", key_page, rotate_key),
    _Place("/ui/health", health_page),
)


@asynccontextmanager
async def open_site(runtime: InferenceRuntime) -> AsyncGenerator[Sequence[BaseRoute]]:
    """Open the web view over a gateway's runtime, and yield its routes."""
    handle = runtime.handle
    keys = ApiKeys(handle.pipeline, handle.keys[0], monotonic=time.monotonic)
    visitors = Visitors(Sessions(handle.pipeline, runtime.settings.namespace), keys)
    async with open_sources(runtime, keys) as sources:
        yield _Site(visitors, sources).routes()


class _Site:
    def __init__(self, visitors: Visitors, sources: Sources) -> None:
        self._visitors = visitors
        self._sources = sources
        self._style = stylesheet()
        self._style_version = hashlib.sha256(self._style.encode()).hexdigest()[:12]

    def routes(self) -> list[BaseRoute]:
        return [
            Route("/ui/", self._to_start, methods=["GET"]),
            Route("/ui/style.css", self._stylesheet, methods=["GET"]),
            Route("/ui/session", self._sign_in, methods=["POST"]),
            Route("/ui/sign-out", self._sign_out, methods=["POST"]),
            *(Route(place.path, self._endpoint(place), methods=_methods(place)) for place in _PLACES),
            Route("/ui/{path:path}", self._nowhere, methods=["GET", "POST"]),
        ]

    def _endpoint(self, place: _Place) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            return await self._answer(request, place)

        return answer

    async def _answer(self, request: Request, place: _Place) -> Response:
        visitor: Visitor | None = None
        try:
            if request.method == "GET" and (secret := request.query_params.get("once")) is not None:
                return await self._use_link(secret, request)
            visitor = await self._visitors.find(request)
            if visitor is None:
                return self._ask_for_key(request)
            _check_rights(place, visitor)
            return await self._show(request, place, visitor)
        except Exception as exc:  # noqa: BLE001 - the edge of the server.
            return self._problem(request, exc, visitor)

    async def _show(self, request: Request, place: _Place, visitor: Visitor) -> Response:
        form: Mapping[str, list[str]] = {}
        show = place.show if visitor.is_admin or place.is_for_all else own_page
        if request.method == "POST":
            assert place.change is not None, "a place without changes takes no POST"
            check_origin(request)
            form, show = await read_form(request), place.change
            check_form(form, visitor)
        page = await show(Visit(visitor, self._sources, request.query_params, form))
        if isinstance(page, str):
            return self._redirect(page)
        address = str(request.url.path) + (f"?{request.url.query}" if request.url.query else "")
        return self._page(page, visitor, {"address": address})

    async def _use_link(self, secret: str, request: Request) -> Response:
        """Begin the session of a link. A HEAD request, such as for a chat's preview, does not use it up."""
        session = await self._visitors.use_link(secret)
        if session is None:
            text = (
                "This link was already used, or is older than 15 minutes. Sign in with a key, or restart `tollbook up`."
            )
            return self._ask_for_key(request, text, to=PATH)
        response = self._redirect(PATH)
        set_cookie(response, session, request)
        return response

    async def _sign_in(self, request: Request) -> Response:
        to = PATH
        try:
            check_origin(request)
            form = await read_form(request)
            to = _own_address(form.get("to", [""])[0])
            session = await self._visitors.sign_in(form.get("key", [""])[0], request)
        except Problem as exc:
            text = "This key is unknown, has expired or was revoked."
            return self._ask_for_key(request, text if exc.status == 401 else exc.message, to=to)
        except Exception as exc:  # noqa: BLE001 - the edge of the server.
            return self._problem(request, exc, None)
        response = self._redirect(to)
        set_cookie(response, session, request)
        return response

    async def _sign_out(self, request: Request) -> Response:
        try:
            check_origin(request)
            visitor = await self._visitors.find(request)
            if visitor is not None:
                check_form(await read_form(request), visitor)
                await self._visitors.sign_out(visitor)
        except Exception as exc:  # noqa: BLE001 - the edge of the server.
            return self._problem(request, exc, None)
        response = self._redirect(PATH)
        drop_cookie(response)
        return response

    async def _to_start(self, _request: Request) -> Response:
        return self._redirect(PATH)

    async def _nowhere(self, request: Request) -> Response:
        try:
            visitor = await self._visitors.find(request)
        except Exception as exc:  # noqa: BLE001 - the edge of the server.
            return self._problem(request, exc, None)
        if visitor is None:
            return self._ask_for_key(request)
        return self._problem(request, Refused(404, "there is no such page"), visitor)

    async def _stylesheet(self, _request: Request) -> Response:
        # Its address has its digest, so browsers may cache it.
        headers = {**_HEADERS, "cache-control": "public, max-age=86400"}
        return Response(self._style, media_type="text/css", headers=headers)

    def _ask_for_key(self, request: Request, problem: str = "", *, to: str | None = None) -> Response:
        query = f"?{request.url.query}" if request.url.query else ""
        to = to or _own_address(request.url.path + query if request.method == "GET" else PATH)
        return self._page(_sign_in_page(problem), None, {"to": to, "address": PATH})

    def _problem(self, request: Request, exc: Exception, visitor: Visitor | None) -> Response:
        match exc:
            case Refused():
                status, text = exc.status, exc.text
            case Problem():
                status, text = exc.status, exc.message
            case LedgerError():
                status, text = 503, exc.message
            case _:
                status, text = 500, "the page failed; the log of the gateway says why"
                _log.exception("web_view.failed", path=request.url.path)
        return self._page(_problem_page(status, text), visitor, {"address": PATH})

    def _page(self, page: Page, visitor: Visitor | None, values: dict[str, Any]) -> Response:
        navigation = () if visitor is None else _ADMIN if visitor.is_admin else _OWNER
        shown = {"page": page, "visitor": visitor, "navigation": navigation, "style_version": self._style_version}
        return HTMLResponse(draw(page.template, {**shown, **values}), status_code=page.status, headers=dict(_HEADERS))

    def _redirect(self, to: str) -> Response:
        return RedirectResponse(to, status_code=303, headers=dict(_HEADERS))


def _check_rights(place: _Place, visitor: Visitor) -> None:
    if not (place.is_for_all or visitor.is_admin or place.path == PATH):
        raise Refused(403, "this page is for admins: sign in with a key of `tollbook keys create --admin`")


def _methods(place: _Place) -> list[str]:
    return ["GET"] if place.change is None else ["GET", "POST"]


def _own_address(address: str) -> str:
    """Return where to go after signing in; always a page of this view, whatever the form says."""
    is_own = address == PATH or address.startswith((f"{PATH}/", f"{PATH}?"))
    return address if is_own and address.isascii() and address.isprintable() and "\\" not in address else PATH


def _sign_in_page(problem: str) -> Page:
    notices = [Notice(problem, "bad")] if problem else []
    return Page("Sign in", (), notices=notices, status=401, template="sign_in.html")


def _problem_page(status: int, text: str) -> Page:
    titles = {403: "Not allowed", 404: "Not found", 503: "Not available now"}
    return Page(titles.get(status, "This did not work"), (), notices=[Notice(sentence(text), "bad")], status=status)
