"""HTTP to one server over pooled connections. No network exception leaves this module.

Invariant: no request is retried or redirected here, since every request may cost money (G3). The key is in no repr and
no error (G10).
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
"""A stream may be this many times larger than other bodies: it has a few hundred bytes for each token."""
_AFTER_THE_END_S: Final = 1.0
"""How long to wait for the end of a stream after its last event, so that its connection can be used again."""

# Shorter than the five seconds after which common servers (Node, uvicorn) close an idle connection: a request that is
# sent while the connection closes is lost, and would be charged as if it had been answered.
_KEEP_ALIVE_S: Final = 4.0
# aiohttp's value for no limit; None would mean its default of 100.
_UNLIMITED: Final = 0


@dataclass(frozen=True, slots=True)
class Exchange:
    """The reply to one request. With a `fault`, it has only the part of status, headers and body that came."""

    status: int | None
    headers: Mapping[str, str]
    body: Body
    fault: Fault | None = None


class _NoCookies(httpx.Cookies):
    """Ignores cookies: no provider needs them, and looking for them took a fifth of a call's time."""

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
    """The reply is larger than any completion, so it is not read to its end."""


class Connection:
    """Pooled connections to one server, opened at their first use."""

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
        """Prepare connections; `headers` are sent with each request, including the key.

        `timeout_s` limits a whole request, from the wait for a connection to the last byte. `idle_timeout_s` limits the
        wait for the next byte of an event stream, without the time that the reader of its deltas takes.
        """
        self.base_url = base_url.rstrip("/")
        defaults = {
            "Content-Type": "application/json",
            "Accept": "application/json",
            "Accept-Encoding": "gzip, deflate",
            "User-Agent": "tollbook",
        }
        self._headers = httpx.Headers({**defaults, **headers})
        self._timeout_s = timeout_s
        self._idle_timeout_s = idle_timeout_s
        # The limit for connecting is well below the limit of the request, so that a request that was never sent is
        # known not to be charged.
        connect_s = min(connect_timeout_s, timeout_s / 2, (idle_timeout_s or timeout_s) / 2)
        self._extensions = {"timeout": {"connect": connect_s, "pool": connect_s, "read": timeout_s, "write": timeout_s}}
        # No limit: callers limit their concurrency, and waiting for a connection would look like an unreachable
        # provider.
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
        """Send one request and receive the reply; a cancellation closes the connection.

        `is_streamed`: the reply was requested as an event stream.
        Errors: ReaderFailed; asyncio.CancelledError, when the request may have been sent. Network errors are the
            exchange's `fault`.
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
    """The limits of one request: its deadline, and how long the next byte may take."""

    def __init__(self, timeout: asyncio.Timeout, idle_s: float | None) -> None:
        self._timeout = timeout
        self._idle_s = idle_s
        self._clock = asyncio.get_running_loop().time
        self._until_s = timeout.when() or 0.0

    def begin_wait(self) -> None:
        """Set the limit for the next byte."""
        if self._idle_s is not None:
            self._timeout.reschedule(min(self._until_s, self._clock() + self._idle_s))

    def end_wait(self) -> None:
        """Remove the limit for the next byte: a byte has come."""
        if self._idle_s is not None:
            self._timeout.reschedule(self._until_s)

    def shorten(self, seconds: float) -> None:
        """Limit the rest of the request to `seconds`."""
        self._until_s = min(self._until_s, self._clock() + seconds)
        self._timeout.reschedule(self._until_s)


@cache
def tls_context() -> ssl.SSLContext:
    """Return a TLS context, made once per process: reading the trusted authorities takes 50 ms."""
    return httpx.create_ssl_context()


async def _receive(response: httpx.Response, receiver: Receiver, limits: _Limits) -> None:
    """Receive the decompressed body. Errors: BodyTooLarge above MAX_BODY_BYTES; an event stream may be larger."""
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
