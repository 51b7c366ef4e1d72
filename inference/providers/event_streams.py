"""Parsing event streams: bytes are split into events, each returned as soon as it is complete.

Keep-alive comments and incomplete events are ignored. Only the current line and event are buffered.
"""

from collections.abc import Callable
from typing import Any, Final

DONE: Final = "[DONE]"
"""The event that ends a stream of chat completions."""
_DONE_TOO: Final = (DONE, "DONE")
"""Other forms of it that some servers send."""
_LINE_ENDS: Final = (b"\n", b"\r")
Parse = Callable[[str], Any]
"""Parses JSON. Errors: ValueError."""


class EventStream:
    """Reads one stream. The events do not depend on how its bytes are split into pieces."""

    def __init__(self, parse: Parse) -> None:
        self._parse = parse
        self._line: list[bytes] = []
        self._event: list[str] = []
        self._is_after_return = False

    def feed(self, piece: bytes) -> list[Any]:
        """Add some bytes; return the data of the events that they complete: parsed JSON, or `[DONE]`."""
        if self._is_after_return and piece.startswith(b"\n"):
            piece = piece[1:]
            self._is_after_return = False
        if not piece:
            return []
        self._is_after_return = piece.endswith(b"\r")
        events: list[Any] = []
        for line in piece.splitlines(keepends=True):
            if not line.endswith(_LINE_ENDS):
                self._line.append(line)
            elif self._line:
                self._line.append(line)
                self._take_line(b"".join(self._line), events)
                self._line.clear()
            else:
                self._take_line(line, events)
        return events

    def end(self) -> list[Any]:
        """Return the events that the end of the stream completes."""
        events: list[Any] = []
        if self._line:
            self._take_line(b"".join(self._line), events)
            self._line.clear()
        self._end_event(events)
        return events

    def _take_line(self, line: bytes, events: list[Any]) -> None:
        if line.startswith(b"data:"):
            # An invalid byte must not lose the rest of a reply that was paid for.
            data = line[5:].strip().decode("utf-8", "replace")
            while data.startswith("data:"):  # Some proxies repeat the prefix.
                data = data[5:].lstrip()
            # A line of complete JSON is an event: some servers leave out the empty line between events.
            event = None if self._event else self._parsed(data)
            if event is None:
                self._event.append(data)
            else:
                events.append(event)
        elif self._event and not line.strip():
            self._end_event(events)

    def _end_event(self, events: list[Any]) -> None:
        lines, self._event = self._event, []
        if not lines:
            return
        whole = self._parsed("\n".join(lines))
        found = [whole] if whole is not None or len(lines) == 1 else [self._parsed(each) for each in lines]
        events += [each for each in found if each is not None]

    def _parsed(self, data: str) -> Any:
        """Return the parsed data of an event; None if it cannot be read."""
        if data == DONE:
            return data
        try:
            return self._parse(data)
        except ValueError:
            return DONE if data.upper() in _DONE_TOO else None
