"""Who looks at the web view: by a session's cookie, or by a key in a header; and what every form must show.

A key counts as long as the ledger accepts it, a session no longer than its key. What is changed comes from a page of
this view: by the token in its form, and by what the browser says of the page that it comes from.
"""

import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qs, urlsplit

from starlette.requests import Request
from starlette.responses import Response

from tollbook.gateway.callers import Callers, secret_in
from tollbook.gateway.endpoints import address_of
from tollbook.inference.api_keys import ApiKey, ApiKeys, hash_of
from tollbook.observability.gateway_counts import GatewayCounts
from tollbook.views.web.sessions import SESSION_S, Session, Sessions

COOKIE: Final = "tollbook_session"
PATH: Final = "/ui"
_MAX_FORM: Final = 64 * 1024
_MAX_FIELDS: Final = 100


class Refused(Exception):
    """A page is not shown, or nothing is changed. `text` says why and what to do."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


@dataclass(frozen=True, slots=True)
class Visitor:
    """Who looks. `key` is None for the link of `tollbook up`, `session` where the key came in a header.

    `user_id` is as on the ledger, and None for who sees everybody.
    """

    key: ApiKey | None
    session: Session | None

    @property
    def is_admin(self) -> bool:
        """Whether this visitor sees everything, and may change keys, credit, plans and caps."""
        return self.key is None or self.key.is_admin

    @property
    def user_id(self) -> str | None:
        """The one user whose calls this visitor sees; None for an admin."""
        return None if self.key is None or self.key.is_admin else self.key.user_id

    @property
    def author(self) -> str:
        """Who signs what this visitor changes."""
        if self.key is None:
            return "web view, by the link of tollbook up"
        return f"{self.key.name} ({self.key.key_id})" if self.key.name else self.key.key_id

    @property
    def label(self) -> str:
        """The visitor's name on the pages."""
        if self.key is None:
            return "by the link of tollbook up"
        return self.key.name or self.key.key_id

    @property
    def form_token(self) -> str:
        """What forms bear; '' for a key in a header, which no page can send."""
        return "" if self.session is None else self.session.form_token


class Visitors:
    """Finds visitors, and begins and ends their sessions. Errors of what asks Redis: LedgerUnavailable."""

    def __init__(self, sessions: Sessions, keys: ApiKeys) -> None:
        self._sessions = sessions
        self._keys = keys
        self._callers = Callers(keys, GatewayCounts())  # Of its own: what the API refuses is counted apart.

    async def find(self, request: Request) -> Visitor | None:
        """Return who sends a request; None without a session that counts. Errors: Problem for a wrong key."""
        if secret_in(request.headers):
            key = await self._callers.admit(request.headers, address_of(request))
            return _visitor(key, None)
        session = await self._sessions.find(request.cookies.get(COOKIE, ""))
        if session is None:
            return None
        if session.key_hash is None:
            return Visitor(None, session)
        key = await self._keys.find_by_hash(session.key_hash)
        return None if key is None else _visitor(key, session)

    async def sign_in(self, secret: str, request: Request) -> Session:
        """Begin a session for who shows a key. Errors: Problem for a wrong one; Refused for one of nobody."""
        key = await self._callers.admit({"x-api-key": secret}, address_of(request))
        _visitor(key, None)
        return await self._sessions.begin(hash_of(secret.strip()))

    async def use_link(self, secret: str) -> Session | None:
        """Begin an admin's session for who has the link of `tollbook up`; None where that does not work any more."""
        return await self._sessions.begin(None) if await self._sessions.use_link(secret) else None

    async def sign_out(self, visitor: Visitor) -> None:
        """End a visitor's session."""
        if visitor.session is not None:
            await self._sessions.end(visitor.session)


def _visitor(key: ApiKey, session: Session | None) -> Visitor:
    if not key.is_admin and key.user_id is None:
        raise Refused(403, "this key is for no user and for no admin, so there is nothing that it could show")
    return Visitor(key, session)


def set_cookie(response: Response, session: Session, request: Request) -> None:
    """Let the browser keep a session: no script reads it, and no other site sends it."""
    response.set_cookie(
        COOKIE,
        session.session_id,
        max_age=SESSION_S,
        path=PATH,
        secure=request.url.scheme == "https",
        httponly=True,
        samesite="strict",
    )


def drop_cookie(response: Response) -> None:
    """Let the browser forget its session."""
    response.delete_cookie(COOKIE, path=PATH, httponly=True, samesite="strict")


def check_origin(request: Request) -> None:
    """Refuse a form that a page of another site sends. Errors: Refused."""
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    # Browsers name the relation only where they trust the connection: over TLS, and on the machine itself.
    is_own = site == "same-origin" if site else origin is None or urlsplit(origin).netloc == request.headers.get("host")
    if not is_own:
        raise Refused(403, "this form was sent by another site, so nothing was done")


async def read_form(request: Request) -> dict[str, list[str]]:
    """Return the fields of a form. Errors: Refused."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise Refused(415, "this is no form of these pages")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_FORM:
            raise Refused(413, f"a form has at most {_MAX_FORM:,} bytes")
    try:
        return parse_qs(body.decode(), keep_blank_values=True, max_num_fields=_MAX_FIELDS, errors="strict")
    except ValueError:
        raise Refused(400, "the form cannot be read") from None


def check_form(form: Mapping[str, list[str]], visitor: Visitor) -> None:
    """Refuse a form that is not of this session's pages. Errors: Refused."""
    given = form.get("form_token", [""])[0]
    if visitor.session is not None and not hmac.compare_digest(given.encode(), visitor.form_token.encode()):
        raise Refused(403, "this form is of another session, so nothing was done: open the page again")
