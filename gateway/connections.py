"""Connections with limits that the server itself does not have.

The parser takes heads of any length, and a response that nobody reads would wait for ever with what it holds.
"""

import asyncio
from typing import Any, Final

import structlog
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

MAX_HEAD_BYTES: Final = 64 * 1024
"""Of a request's line and headers together."""
_REFUSAL: Final = b"the headers of a request have at most 65536 bytes"
_log = structlog.get_logger(__name__)


class _HeadTooLong(Exception):
    """A request's line and headers are longer than is taken."""


class BoundedConnection(HttpToolsProtocol):
    """One connection. A head that is too long is answered with 431; who reads nothing for `unread_s` is cut off."""

    def __init__(self, *arguments: Any, unread_s: float, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._unread_s = unread_s
        self._cutting_off: asyncio.TimerHandle | None = None
        self._is_in_head = True
        self._head_bytes = 0

    def data_received(self, data: bytes) -> None:
        """Take what the client sends."""
        super().data_received(data)
        if self._is_in_head and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse_head()

    def on_message_begin(self) -> None:
        """Begin a request."""
        self._is_in_head, self._head_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """End a request's head. Errors: _HeadTooLong, which the parser hands on as its own."""
        self._is_in_head = False
        if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > MAX_HEAD_BYTES:
            self._refuse_head()
            raise _HeadTooLong
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, unless it is refused already."""
        if not self.transport.is_closing():
            super().send_400_response(msg)

    def pause_writing(self) -> None:
        """Wait for the client to read, but not for ever."""
        super().pause_writing()
        if self._cutting_off is None:
            self._cutting_off = self.loop.call_later(self._unread_s, self._cut_off)

    def resume_writing(self) -> None:
        """Go on: the client has read."""
        self._stop_timer()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """End with the connection."""
        self._stop_timer()
        super().connection_lost(exc)

    def _cut_off(self) -> None:
        _log.info("gateway.client_cut_off", unread_s=self._unread_s)
        # Closed in good order, it would first wait for the client to read what is left.
        self.transport.abort()

    def _stop_timer(self) -> None:
        if self._cutting_off is not None:
            self._cutting_off.cancel()
            self._cutting_off = None

    def _refuse_head(self) -> None:
        headers = b"content-type: text/plain\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(_REFUSAL)
        self.transport.write(STATUS_LINE[431] + headers + _REFUSAL)
        self.transport.close()
