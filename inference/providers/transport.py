"""HTTP to one server over pooled connections. No exception of the network leaves this module.

Invariant: nothing is retried, redirected or repeated here, since every request may cost money (G3). The key is in no
repr and no error (G10).
"""

import asyncio
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Final

import httpx
from httpx_aiohttp import HttpxAiohttpClient

from tollbook.inference.providers.faults import REQUEST_ERRORS, Fault, fault_of

MAX_BODY_BYTES: Final = 20 * 1024 * 1024

_STREAM_FACTOR: Final = 5
"""An event takes a few hundred bytes for each token."""
_MAX_START_BYTES: Final = 16 * 1024
WatchStart = Callable[[Mapping[str, str], bytes], bool]
"""Takes the headers of a reply, and what has come of its body; returns whether that was enough."""

# Shorter than the five seconds after which common servers (Node, uvicorn) close an idle connection: a request that is
# sent while the connection closes is lost, and is charged as if it had been answered.
_KEEP_ALIVE_S: Final = 4.0


@dataclass(frozen=True, slots=True)
class Exchange:
    """The reply to one request. With a `fault`, status and headers are there if they came; the body is empty."""

    status: int | None
    headers: Mapping[str, str]
    body: bytes
    fault: Fault | None = None


class _NoCookies(httpx.Cookies):
    """Keeps no cookies: no provider needs them, and looking for them took a fifth of a call's time."""

    def extract_cookies(self, response: httpx.Response) -> None:
        """Do nothing."""


class _Client(HttpxAiohttpClient):
    @property
    def cookies(self) -> httpx.Cookies:
        return _NO_COOKIES

    @cookies.setter
    def cookies(self, cookies: object) -> None:
        raise NotImplementedError("cookies are not kept")


_NO_COOKIES: Final = _NoCookies()


class BodyTooLarge(httpx.DecodingError):
    """The reply is larger than any completion and is not read to its end."""


class Connection:
    """Pooled connections to one server, opened when they are first needed."""

    def __init__(
        self,
        *,
        base_url: str,
        headers: Mapping[str, str],
        timeout_s: float,
        connect_timeout_s: float,
        max_connections: int,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """Prepare connections; `headers` go with each request, the key among them.

        `timeout_s` limits a whole request, from the wait for a connection to the last byte.
        """
        self.base_url = base_url.rstrip("/")
        usual = {
            "Content-Type": "application/json",
            "Accept": "application/json",
            "Accept-Encoding": "gzip, deflate",
            "User-Agent": "tollbook",
        }
        self._headers = httpx.Headers({**usual, **headers})
        self._timeout_s = timeout_s
        # The wait for a connection ends well before the request's time does, so that a request which was never sent
        # is known not to be charged.
        connect_s = min(connect_timeout_s, timeout_s / 2)
        self._extensions = {"timeout": {"connect": connect_s, "pool": connect_s, "read": timeout_s, "write": timeout_s}}
        limits = httpx.Limits(
            max_connections=max_connections, max_keepalive_connections=max_connections, keepalive_expiry=_KEEP_ALIVE_S
        )
        self._client = _Client(verify=_tls_context(), limits=limits, follow_redirects=False, transport=transport)

    def __repr__(self) -> str:  # G10
        return f"Connection(base_url={self.base_url!r})"

    def url(self, path: str, **parameters: str) -> httpx.URL:
        """Return the URL of a path under the base URL."""
        return httpx.URL(f"{self.base_url}/{path}", params=parameters or None)

    async def aclose(self) -> None:
        """Close the pooled connections."""
        await self._client.aclose()

    async def exchange(
        self, method: str, url: httpx.URL, content: bytes | None = None, *, watch_start: WatchStart | None = None
    ) -> Exchange:
        """Send one request and read the reply; whoever is cancelled meanwhile closes its connection.

        Errors: none of the network's, they are the reply's `fault`. asyncio.CancelledError passes through; the request
            may then have been sent.
        """
        request = httpx.Request(method, url, headers=self._headers, content=content, extensions=self._extensions)
        response: httpx.Response | None = None
        try:
            # httpx limits only the wait for each chunk, which a slow server could repeat for ever.
            async with asyncio.timeout(self._timeout_s):
                response = await self._client.send(request, stream=True)
                try:
                    body = await _read(response, watch_start if response.is_success else None)
                finally:
                    await response.aclose()
        except REQUEST_ERRORS as exc:
            if response is None:
                return Exchange(None, {}, b"", fault_of(exc))
            return Exchange(response.status_code, response.headers, b"", fault_of(exc))
        return Exchange(response.status_code, response.headers, body)


@cache
def _tls_context() -> ssl.SSLContext:
    """Read the trusted authorities once for all connections of the process: it takes 50 ms."""
    return httpx.create_ssl_context()


async def _read(response: httpx.Response, watch_start: WatchStart | None) -> bytes:
    """Return the unpacked body. Errors: BodyTooLarge above MAX_BODY_BYTES, of an event stream above five times that."""
    chunks: list[bytes] = []
    size = 0
    is_stream = response.headers.get("content-type", "").startswith("text/event-stream")
    max_bytes = MAX_BODY_BYTES * (_STREAM_FACTOR if is_stream else 1)
    if watch_start is not None and watch_start(response.headers, b""):
        watch_start = None
    async for chunk in response.aiter_bytes():
        chunks.append(chunk)
        size += len(chunk)
        if size > max_bytes:
            raise BodyTooLarge("the reply is too large")
        if watch_start is not None and (size > _MAX_START_BYTES or watch_start(response.headers, b"".join(chunks))):
            watch_start = None
    return b"".join(chunks)
