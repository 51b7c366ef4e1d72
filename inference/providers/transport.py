"""HTTP to one server over pooled connections. No exception of the network leaves this module.

Invariant: nothing is retried, redirected or repeated here, since every request may cost money (G3). The key is in no
repr and no error (G10).
"""

import asyncio
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Final

import httpx
from httpx_aiohttp import HttpxAiohttpClient

from tollbook.inference.providers.bodies import Body
from tollbook.inference.providers.faults import REQUEST_ERRORS, Fault, fault_of
from tollbook.inference.providers.receiver import Receiver

MAX_BODY_BYTES: Final = 20 * 1024 * 1024

_STREAM_FACTOR: Final = 5
"""An event takes a few hundred bytes for each token."""
_AFTER_THE_END_S: Final = 1.0
"""How long the end of a stream is waited for that says it is over, so that its connection can be used again."""

# Shorter than the five seconds after which common servers (Node, uvicorn) close an idle connection: a request that is
# sent while the connection closes is lost, and is charged as if it had been answered.
_KEEP_ALIVE_S: Final = 4.0
# aiohttp's word for it; None is taken for its default of 100.
_UNLIMITED: Final = 0


@dataclass(frozen=True, slots=True)
class Exchange:
    """The reply to one request. With a `fault`, status, headers and body are there as far as they came."""

    status: int | None
    headers: Mapping[str, str]
    body: Body
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
        idle_timeout_s: float | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """Prepare connections; `headers` go with each request, the key among them.

        `timeout_s` limits a whole request, from the wait for a connection to the last byte; `idle_timeout_s` limits
        the wait for the next byte of an event stream. Whoever reads along does not use it up.
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
        self._idle_timeout_s = idle_timeout_s
        # The wait for a connection ends well before the request's time does, so that a request which was never sent
        # is known not to be charged.
        connect_s = min(connect_timeout_s, timeout_s / 2, (idle_timeout_s or timeout_s) / 2)
        self._extensions = {"timeout": {"connect": connect_s, "pool": connect_s, "read": timeout_s, "write": timeout_s}}
        # Callers limit their concurrency; a wait for a connection would look like a provider that is unreachable.
        limits = httpx.Limits(max_connections=_UNLIMITED, keepalive_expiry=_KEEP_ALIVE_S)
        self._client = _Client(verify=tls_context(), limits=limits, follow_redirects=False, transport=transport)

    def __repr__(self) -> str:  # G10
        return f"Connection(base_url={self.base_url!r})"

    def url(self, path: str, **parameters: str) -> httpx.URL:
        """Return the URL of a path under the base URL."""
        return httpx.URL(f"{self.base_url}/{path}", params=parameters or None)

    async def aclose(self) -> None:
        """Close the pooled connections."""
        await self._client.aclose()

    async def exchange(
        self,
        method: str,
        url: httpx.URL,
        content: bytes | None = None,
        *,
        receiver: Receiver | None = None,
        is_streamed: bool = False,
    ) -> Exchange:
        """Send one request and receive the reply; whoever is cancelled meanwhile closes its connection.

        `is_streamed`: the reply was asked for as an event stream.
        Errors: none of the network's, they are the reply's `fault`; ReaderFailed. asyncio.CancelledError passes
            through; the request may then have been sent.
        """
        request = httpx.Request(method, url, headers=self._headers, content=content, extensions=self._extensions)
        receiver = receiver or Receiver()
        response: httpx.Response | None = None
        try:
            # httpx limits only the wait for each chunk, which a slow server could repeat for ever.
            async with asyncio.timeout(self._timeout_s) as timeout:
                limits = _Limits(timeout, self._idle_timeout_s if is_streamed else None)
                limits.begin_wait()
                response = await self._client.send(request, stream=True)
                try:
                    await _receive(response, receiver, limits)
                finally:
                    await response.aclose()
        except REQUEST_ERRORS as exc:
            await receiver.end(is_broken=True)
            if response is None:
                return Exchange(None, {}, receiver.body, fault_of(exc))
            return Exchange(response.status_code, response.headers, receiver.body, fault_of(exc))
        return Exchange(response.status_code, response.headers, receiver.body)


class _Limits:
    """The limits of one request: until when it must be complete, and how long the next byte may take."""

    def __init__(self, timeout: asyncio.Timeout, idle_s: float | None) -> None:
        self._timeout = timeout
        self._idle_s = idle_s
        self._clock = asyncio.get_running_loop().time
        self._until_s = timeout.when() or 0.0

    def begin_wait(self) -> None:
        """Wait for the next byte."""
        if self._idle_s is not None:
            self._timeout.reschedule(min(self._until_s, self._clock() + self._idle_s))

    def end_wait(self) -> None:
        """Go on without the idle limit: a byte has come."""
        if self._idle_s is not None:
            self._timeout.reschedule(self._until_s)

    def shorten(self, seconds: float) -> None:
        """Wait for so long at most."""
        self._until_s = min(self._until_s, self._clock() + seconds)
        self._timeout.reschedule(self._until_s)


@cache
def tls_context() -> ssl.SSLContext:
    """Read the trusted authorities once for all connections of the process: it takes 50 ms."""
    return httpx.create_ssl_context()


async def _receive(response: httpx.Response, receiver: Receiver, limits: _Limits) -> None:
    """Receive the unpacked body. Errors: BodyTooLarge above MAX_BODY_BYTES; an event stream may be larger."""
    size = 0
    is_stream = response.headers.get("content-type", "").startswith("text/event-stream")
    max_bytes = MAX_BODY_BYTES * (_STREAM_FACTOR if is_stream else 1)
    is_over = False
    if response.is_success:
        receiver.begin(response.headers)
    async for piece in response.aiter_bytes():
        size += len(piece)
        if size > max_bytes:
            raise BodyTooLarge("the reply is too large")
        limits.end_wait()
        await receiver.take(piece)
        if receiver.body.is_over and not is_over:
            is_over = True
            limits.shorten(_AFTER_THE_END_S)
        limits.begin_wait()
    limits.end_wait()
    await receiver.end()
