"""Connections of clients: so many at a time, each request's head small and soon there, each answer read in time.

Whoever connects has shown no key yet. Without these limits, which httptools has not, a stranger could take every file
descriptor of the process, with which it also speaks to Redis and to providers, or its memory with one endless header;
and a response that nobody reads would wait for ever with what it holds.
"""

import asyncio
import resource
from typing import Any, Final

import structlog
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

MAX_HEAD_BYTES: Final = 64 * 1024
"""Of a request's line and headers together."""
HEAD_TIMEOUT_S: Final = 30.0
UNREAD_S: Final = 600.0
# What a process has open besides: Redis, DuckDB, the archive, a provider's connection for each call.
_DESCRIPTORS_PER_CONNECTION: Final = 3
_MIN_CONNECTIONS: Final = 64
_log = structlog.get_logger(__name__)


def connections_at_most() -> int:
    """Return how many clients may be connected, by the limit of the process for open files."""
    open_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = open_files == resource.RLIM_INFINITY
    return 65_536 if unlimited else max(_MIN_CONNECTIONS, open_files // _DESCRIPTORS_PER_CONNECTION)


class _HeadTooLong(Exception):
    """A request's line and headers are longer than is taken."""


class BoundedConnection(HttpToolsProtocol):
    """One connection. A head that is too long is answered with 431; what passes another limit is closed.

    Units: seconds. `unread_s`: how long a client may read nothing of what waits for it.
    """

    def __init__(
        self,
        *arguments: Any,
        max_connections: int,
        head_timeout_s: float = HEAD_TIMEOUT_S,
        max_head_bytes: int = MAX_HEAD_BYTES,
        unread_s: float = UNREAD_S,
        **named: Any,
    ) -> None:
        super().__init__(*arguments, **named)
        self._max_connections = max_connections
        self._head_timeout_s = head_timeout_s
        self._max_head_bytes = max_head_bytes
        self._unread_s = unread_s
        self._is_in_head = True
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._unread_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin a connection, unless there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self._max_connections:
            transport.abort()
            return
        self._begin_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """End with the connection."""
        self._end_head()
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what the client sends."""
        self._head_bytes += len(data)
        super().data_received(data)
        if self._is_in_head and self._head_bytes > self._max_head_bytes and not self.transport.is_closing():
            self._refuse_head()

    def on_message_begin(self) -> None:
        """Begin a request."""
        super().on_message_begin()
        self._begin_head()

    def on_headers_complete(self) -> None:
        """End a request's head. Errors: _HeadTooLong, which the parser hands on as its own."""
        self._end_head()
        if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > self._max_head_bytes:
            self._refuse_head()
            raise _HeadTooLong
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """End a request: what comes next is the next one's head."""
        self._is_in_head, self._head_bytes = True, 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, unless it is refused already."""
        if not self.transport.is_closing():
            super().send_400_response(msg)

    def pause_writing(self) -> None:
        """Wait for the client to read, but not for ever."""
        super().pause_writing()
        if self._unread_timer is None:
            self._unread_timer = self.loop.call_later(self._unread_s, self._cut_off)

    def resume_writing(self) -> None:
        """Go on: the client has read."""
        self._stop_waiting()
        super().resume_writing()

    def _begin_head(self) -> None:
        self._is_in_head, self._head_bytes = True, 0
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self._head_timeout_s, self._give_up)

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

    def _refuse_head(self) -> None:
        text = f"the headers of a request have at most {self._max_head_bytes} bytes".encode()
        headers = b"content-type: text/plain\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(text)
        self.transport.write(STATUS_LINE[431] + headers + text)
        self.transport.close()

    def _cut_off(self) -> None:
        _log.info("gateway.client_cut_off", unread_s=self._unread_s)
        # Closed in good order, it would first wait for the client to read what is left.
        self.transport.abort()

    def _stop_waiting(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None
