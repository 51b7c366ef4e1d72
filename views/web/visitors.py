"""Authentication of the web view: by a session's cookie, or by a key in a header; and the checks of forms.

A key is valid while the ledger accepts it, and a session no longer than its key. A change must come from a page of this
view: the form's token and the browser's headers about the origin are checked.
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
    """A page or a change is refused. `text` says why and what to do."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


@dataclass(frozen=True, slots=True)
class Visitor:
    """A visitor. `key` is None for the link of `tollbook up`; `session` is None if the key came in a header.

    `user_id` is the id on the ledger, and None for an admin.
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
        """The author of this visitor's changes."""
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
        """The token of forms; '' for a key in a header, which no page of another site can send."""
        return "" if self.session is None else self.session.form_token


class Visitors:
    """Finds visitors, and begins and ends their sessions. Errors of what asks Redis: LedgerUnavailable."""

    def __init__(self, sessions: Sessions, keys: ApiKeys) -> None:
        self._sessions = sessions
        self._keys = keys
        self._callers = Callers(keys, GatewayCounts())  # Its own counts, separate from those of the API.

    async def find(self, request: Request) -> Visitor | None:
        """Return the visitor of a request; None without a valid session. Errors: Problem for a wrong key."""
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
        """Begin a session with a key. Errors: Problem for a wrong key; Refused for a key without user and rights."""
        key = await self._callers.admit({"x-api-key": secret}, address_of(request))
        _visitor(key, None)
        return await self._sessions.begin(hash_of(secret.strip()))

    async def use_link(self, secret: str) -> Session | None:
        """Begin an admin's session with the link of `tollbook up`; None if the link is not valid any more."""
        return await self._sessions.begin(None) if await self._sessions.use_link(secret) else None

    async def sign_out(self, visitor: Visitor) -> None:
        """End a visitor's session."""
        if visitor.session is not None:
            await self._sessions.end(visitor.session)


def _visitor(key: ApiKey, session: Session | None) -> Visitor:
    if not key.is_admin and key.user_id is None:
        raise Refused(403, "this key has no user and is not an admin's, so there is nothing to show")
    return Visitor(key, session)


def set_cookie(response: Response, session: Session, request: Request) -> None:
    """Store a session in the browser's cookie: no script can read it, and no other site can send it."""
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
    """Remove the session's cookie from the browser."""
    response.delete_cookie(COOKIE, path=PATH, httponly=True, samesite="strict")


def check_origin(request: Request) -> None:
    """Refuse a form that a page of another site sends. Errors: Refused."""
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    # Browsers send sec-fetch-site only on trusted connections: TLS, and the local machine.
    is_own = site == "same-origin" if site else origin is None or urlsplit(origin).netloc == request.headers.get("host")
    if not is_own:
        raise Refused(403, "this form was sent by another site, so nothing was done")


async def read_form(request: Request) -> dict[str, list[str]]:
    """Return the fields of a form. Errors: Refused."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise Refused(415, "this is not a form of these pages")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_FORM:
            raise Refused(413, f"the form is too large: at most {_MAX_FORM:,} bytes")
    try:
        return parse_qs(body.decode(), keep_blank_values=True, max_num_fields=_MAX_FIELDS, errors="strict")
    except ValueError:
        raise Refused(400, "the form cannot be read") from None


def check_form(form: Mapping[str, list[str]], visitor: Visitor) -> None:
    """Refuse a form that is not from a page of this session. Errors: Refused."""
    given = form.get("form_token", [""])[0]
    if visitor.session is not None and not hmac.compare_digest(given.encode(), visitor.form_token.encode()):
        raise Refused(403, "this form is from another session, so nothing was done: open the page again")
