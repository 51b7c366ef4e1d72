"""Limits of client connections: how many, the size and arrival time of a request's head, the time to read an answer.

A client that connects has not shown a key yet. Without these limits, which httptools does not have, a stranger could
use up every file descriptor of the process (Redis and providers need them too), or its memory with one endless header.
A response that nobody reads would keep its memory forever.
"""

import asyncio
import resource
from typing import Any, Final

import structlog
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

MAX_HEAD_BYTES: Final = 64 * 1024
"""Of the request line and headers together."""
HEAD_TIMEOUT_S: Final = 30.0
UNREAD_S: Final = 600.0
# Leaves room for other open files: Redis, DuckDB, the archive, a provider's connection for each call.
_DESCRIPTORS_PER_CONNECTION: Final = 3
_MIN_CONNECTIONS: Final = 64
_log = structlog.get_logger(__name__)


def max_client_connections() -> int:
    """Return how many clients may be connected, from the process's limit of open files."""
    open_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = open_files == resource.RLIM_INFINITY
    return 65_536 if unlimited else max(_MIN_CONNECTIONS, open_files // _DESCRIPTORS_PER_CONNECTION)


class _HeadTooLong(Exception):
    """A request's line and headers are too long."""


class BoundedConnection(HttpToolsProtocol):
    """One connection. A head that is too long is answered with 431; at any other limit, the connection is closed.

    Units: seconds. `unread_s`: how long a client may read nothing although data waits for it.
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
        """Accept a connection, unless there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self._max_connections:
            transport.abort()
            return
        self._begin_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        self._end_head()
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse received data, within the limit of the head."""
        self._head_bytes += len(data)
        super().data_received(data)
        if self._is_in_head and self._head_bytes > self._max_head_bytes and not self.transport.is_closing():
            self._refuse_head()

    def on_message_begin(self) -> None:
        """Begin a request."""
        super().on_message_begin()
        self._begin_head()

    def on_headers_complete(self) -> None:
        """End a request's head. Errors: _HeadTooLong, which the parser raises as its own error."""
        self._end_head()
        if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > self._max_head_bytes:
            self._refuse_head()
            raise _HeadTooLong
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """End a request. The next data is the head of the next request."""
        self._is_in_head, self._head_bytes = True, 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse invalid HTTP, unless the request is already refused."""
        if not self.transport.is_closing():
            super().send_400_response(msg)

    def pause_writing(self) -> None:
        """Wait for the client to read, with a timeout."""
        super().pause_writing()
        if self._unread_timer is None:
            self._unread_timer = self.loop.call_later(self._unread_s, self._cut_off)

    def resume_writing(self) -> None:
        """Continue: the client has read."""
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
        # The answer to the request before, on the same connection, may still be sent.
        cycle: Any = self.cycle
        if cycle is None or cycle.response_complete:
            self.transport.close()

    def _refuse_head(self) -> None:
        text = f"the headers are too long: at most {self._max_head_bytes} bytes".encode()
        headers = b"content-type: text/plain\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(text)
        self.transport.write(STATUS_LINE[431] + headers + text)
        self.transport.close()

    def _cut_off(self) -> None:
        _log.info("gateway.client_cut_off", unread_s=self._unread_s)
        # A graceful close would wait for the client to read the rest.
        self.transport.abort()

    def _stop_waiting(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None
