"""Connections of clients: so many at a time, and each request's head is small and comes soon.

Whoever connects has shown no key yet. Without these limits a stranger could take every file descriptor of the process,
with which it also speaks to Redis and to providers, or its memory with one endless header: httptools has no limits.
"""

import asyncio
import resource
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES: Final = 64 * 1024
HEAD_TIMEOUT_S: Final = 30.0
# What a process has open besides: Redis, DuckDB, the archive, a provider's connection for each call.
_DESCRIPTORS_PER_CONNECTION: Final = 3
_MIN_CONNECTIONS: Final = 64


def connections_at_most() -> int:
    """Return how many clients may be connected, by the limit of the process for open files."""
    open_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = open_files == resource.RLIM_INFINITY
    return 65_536 if unlimited else max(_MIN_CONNECTIONS, open_files // _DESCRIPTORS_PER_CONNECTION)


def limited_http(
    *, max_connections: int, head_timeout_s: float = HEAD_TIMEOUT_S, max_head_bytes: int = MAX_HEAD_BYTES
) -> type[asyncio.Protocol]:
    """Return uvicorn's protocol with these limits. A connection that passes one is closed.

    A head that came whole in one read of the socket (at most 256 KiB) is taken whatever its length.
    """

    class LimitedHttp(HttpToolsProtocol):
        _head_bytes = 0
        _is_in_head = True
        _head_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > max_connections:
                transport.abort()
                return
            self._begin_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._end_head()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            self._head_bytes += len(data)
            super().data_received(data)
            if self._is_in_head and self._head_bytes > max_head_bytes and not self.transport.is_closing():
                self.send_400_response(f"The head of a request has at most {max_head_bytes} bytes.")

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._begin_head()

        def on_headers_complete(self) -> None:
            self._end_head()
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            # What comes next is the next request's head.
            self._is_in_head, self._head_bytes = True, 0
            super().on_message_complete()

        def _begin_head(self) -> None:
            self._is_in_head, self._head_bytes = True, 0
            if self._head_timer is None:
                self._head_timer = self.loop.call_later(head_timeout_s, self._give_up)

        def _end_head(self) -> None:
            self._is_in_head = False
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

        def _give_up(self) -> None:
            # Of the request before, on the same connection, the answer may still be on its way.
            cycle: Any = self.cycle
            if cycle is None or cycle.response_complete:
                self.transport.close()

    return LimitedHttp
