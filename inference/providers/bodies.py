"""Parsing the body of a reply into a JSON object, whatever a server, a router or a proxy has put around it.

A body may be JSON with a byte-order mark, after white space or keep-alive comments, or as the only item of a list
(Gemini's errors). It may also be an event stream, requested or not, whose chunks are joined as they come. Malformed
JSON is read too if its meaning is clear, since the answer in it may have been paid for (G4).
"""

import json
import re
import zlib
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Any, Final, cast

from tollbook.inference.deltas import Delta
from tollbook.inference.providers.anthropic_events import MessageEvents
from tollbook.inference.providers.chunks import JoinedChunks
from tollbook.inference.providers.event_streams import EventStream
from tollbook.inference.providers.json_values import as_list, tables_of
from tollbook.inference.providers.other_forms import unwrapped
from tollbook.inference.providers.responses_events import response_chunk

# Floats become Decimals, so that a cost is exact. NaN and infinities do too: they are refused later as a cost, and the
# rest of the reply is still read. Line breaks inside a string need not be escaped.
_DECODER: Final = json.JSONDecoder(parse_float=Decimal, parse_constant=Decimal, strict=False)
_MARK: Final = b"\xef\xbb\xbf"
# Possessive quantifiers: each white space is scanned only once.
_BEFORE: Final = re.compile(rb"(?:\xef\xbb\xbf|\s++|:[^\r\n]*+[\r\n])*+")
"""What may come before the JSON or the first event."""
_BEFORE_TEXT: Final = re.compile(r"(?:\s++|:[^\r\n]*+[\r\n])*+")
_FIELDS: Final = (b"data:", b"event:", b"id:", b"retry:")
_GZIP: Final = b"\x1f\x8b"
_MAX_UNPACKED_BYTES: Final = 20 * 1024 * 1024
_MAX_OBJECTS: Final = 100_000
_MAX_PREFIX_CHARACTERS: Final = 64
"""How much other text may come before the JSON: `)]}'`, or the three backticks of Markdown."""
# An unterminated string matches up to the end of the text; otherwise each quote in it would be tried.
_TEXT_OR_COMMA: Final = re.compile(r'("(?:[^"\\]++|\\.)*+(?:"|\Z|\\))|,(?=\s*+[\]}])', re.DOTALL)


class Body:
    """The received part of a reply's body. An event stream is joined event by event, and its bytes are not kept."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._start = b""
        self._stream: EventStream | None = None
        self._is_json = False
        self._events = MessageEvents()
        self._chunks = JoinedChunks()
        self._document: dict[str, Any] | None = None

    def feed(self, piece: bytes) -> Sequence[Delta]:
        """Add some bytes; return the deltas of the answer to pass on."""
        if self._stream is not None:
            return self._take(self._stream.feed(piece))
        self._pieces.append(piece)
        if self._is_json:
            return ()
        start = self._start + piece
        start = start[_end_of(_BEFORE.match(start)) :]
        if start.startswith(_FIELDS):
            received = self.raw
            self._pieces.clear()
            self._stream = EventStream(_parse)
            return self._take(self._stream.feed(received.removeprefix(_MARK)))
        is_comment = start.startswith(b":")
        self._is_json = not is_comment and not any(name.startswith(start) for name in (*_FIELDS, _MARK))
        # For a comment that has not ended yet, keeping its colon is enough.
        self._start = start[:1] if is_comment else start
        return ()

    def end(self, *, is_broken: bool = False) -> Sequence[Delta]:
        """Read the body to its end; return the remaining deltas to pass on.

        `is_broken`: the connection broke off, so incomplete JSON is dropped.
        """
        if self._stream is None:
            if is_broken:
                self._pieces.clear()
                return ()
            try:
                self._document = _document_of(self.raw)
            except ValueError:
                return self._read_other_form()
            return ()
        return self._end_stream(self._stream)

    @property
    def raw(self) -> bytes:
        """The bytes, unless the body is an event stream."""
        return b"".join(self._pieces)

    @property
    def is_stream(self) -> bool:
        """Whether the body is an event stream."""
        return self._stream is not None

    @property
    def document(self) -> dict[str, Any] | None:
        """The JSON object of the reply, as far as it was received; None if there is none."""
        return self._document if self._document is not None else self._chunks.document()

    @property
    def is_cut_off(self) -> bool:
        """Whether the stream ended in the middle of an answer."""
        return self._chunks.is_cut_off

    @property
    def is_over(self) -> bool:
        """Whether the stream says that nothing more will come."""
        return self._chunks.is_done

    @property
    def is_decided(self) -> bool:
        """Whether the stream has ended its answer, or has an error: later events change nothing."""
        return self._chunks.is_ended or self._chunks.has_error

    @property
    def id(self) -> object:
        """The id of the completion in a stream; None until it comes."""
        return self._chunks.id

    def _read_other_form(self) -> Sequence[Delta]:
        """Read an event stream with other text before it, or JSON objects with other text around them."""
        stream = EventStream(_parse)
        found = [*self._take(stream.feed(_utf8(self.raw))), *self._end_stream(stream)]
        if self._chunks.document() is not None:
            self._stream = stream
            return found
        objects = list(_objects_in(self.raw))
        if len(objects) < 2 and not any(map(_is_part, objects)):
            self._document = unwrapped(objects[0]) if objects else None
            return ()
        deltas = self._take(objects)
        left = self._chunks.end()
        return deltas if left is None else [*deltas, left]

    def _end_stream(self, stream: EventStream) -> list[Delta]:
        last = self._take(stream.end())
        left = self._chunks.end()
        return last if left is None else [*last, left]

    def _take(self, events: list[Any]) -> list[Delta]:
        found = (self._chunks.add(self._events.chunk(response_chunk(event))) for event in events)
        return [delta for delta in found if delta is not None]


def read_json(body: bytes) -> Any:
    """Parse JSON with exact numbers. Errors: ValueError."""
    return _parse(_text_of(body))


def read_body(body: bytes) -> Body:
    """Read a whole body."""
    read = Body()
    read.feed(body)
    read.end()
    return read


def _document_of(raw: bytes) -> dict[str, Any] | None:
    """Return the JSON object, or None if the JSON is something else. Errors: ValueError if it is no JSON."""
    parsed = _parse(_without_comments(_text_of(raw)))
    if isinstance(parsed, str):
        parsed = _parse(parsed)  # Some gateways encode JSON twice.
    listed = as_list(parsed)
    if len(listed) > 1 and len(tables_of(listed)) == len(listed):
        raise ValueError("the body is a list of objects")
    parsed = listed[0] if len(listed) == 1 else parsed
    return unwrapped(cast(dict[str, Any], parsed)) if isinstance(parsed, dict) else None


def _is_part(document: dict[str, Any]) -> bool:
    """Whether an object is one part of an answer: a chunk of a completion, or one of Ollama's objects."""
    return document.get("done") is False or any("delta" in each for each in tables_of(document.get("choices")))


def _objects_in(raw: bytes) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects in a text that is no JSON as a whole, without consecutive duplicates.

    A short text may come before the first object, and any text after the last.
    """
    try:
        text = _without_comments(_text_of(raw))
    except ValueError:
        return
    start, last = text.find("{"), None
    if start < 0 or start > _MAX_PREFIX_CHARACTERS or "<" in text[:start]:
        return
    if "," in text:
        text = text[:start] + _TEXT_OR_COMMA.sub(lambda found: found[1] or "", text[start:])
    for _ in range(_MAX_OBJECTS):
        try:
            value, end = _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError, ArithmeticError):
            return
        if value != last:
            yield value
        last, start = value, text.find("{", end)
        if start < 0:
            return


def _text_of(body: bytes) -> str:
    if body.startswith(_GZIP):  # Compressed, although the headers do not say so.
        try:
            body = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(body, _MAX_UNPACKED_BYTES)
        except zlib.error as exc:
            raise ValueError("the body cannot be decompressed") from exc
    # An invalid byte must not lose the rest of a reply that was paid for.
    return body.decode(json.detect_encoding(body), "replace").lstrip("\ufeff")


def _utf8(body: bytes) -> bytes:
    try:
        return _text_of(body).encode("utf-8", "replace")
    except ValueError:
        return b""


def _parse(text: str) -> Any:
    try:
        return _DECODER.decode(text.strip(" \t\r\n\0"))
    except (RecursionError, ArithmeticError) as exc:
        raise ValueError("the body is not JSON") from exc


def _without_comments(text: str) -> str:
    """Return the text without the comments of an event stream before the JSON, such as `: OPENROUTER PROCESSING`."""
    start = text[_end_of(_BEFORE_TEXT.match(text)) :]
    return "" if start.startswith(":") else start


def _end_of(match: re.Match[bytes] | re.Match[str] | None) -> int:
    return match.end() if match else 0
