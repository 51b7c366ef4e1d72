"""Reads request bodies: JSON objects, with limits on size and on the time between bytes.

A body is kept in memory while it arrives. So the bytes of all bodies together have a limit, and a client that stops
sending in the middle is refused.
"""

import asyncio
from math import isfinite
from typing import Any, Final, cast

from starlette.requests import Request

from tollbook.gateway.problems import Problem, invalid
from tollbook.schemas.json_text import NotJson, RepeatedKey, json_children, parse_json

MAX_BODY_BYTES: Final = 32 * 1024 * 1024
"""Large, because images and files are sent inside bodies."""
_MAX_BYTES_OF_ALL: Final = 512 * 1024 * 1024
_SILENT_S: Final = 30.0
_MAX_VALUES: Final = 50_000
"""Values in one body. Checking them blocks the event loop: millions of small ones would block all calls for minutes."""


class Bodies:
    """Reads bodies. Units: `silent_s` seconds without a byte, after which a request is refused."""

    def __init__(self, *, max_bytes_of_all: int = _MAX_BYTES_OF_ALL, silent_s: float = _SILENT_S) -> None:
        self._max_bytes_of_all = max_bytes_of_all
        self._silent_s = silent_s
        self._bytes = 0

    async def read(self, request: Request) -> dict[str, Any]:
        """Return the JSON object of a request. Errors: Problem (400, 408, 413, 503)."""
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length) > MAX_BODY_BYTES:
            raise _too_large()
        body = bytearray()
        try:
            await self._receive(request, body)
            return _object_in(bytes(body))
        finally:
            self._bytes -= len(body)

    async def _receive(self, request: Request, body: bytearray) -> None:
        chunks = request.stream()
        while True:
            try:
                async with asyncio.timeout(self._silent_s):
                    chunk = await anext(chunks, None)
            except TimeoutError:
                message = f"the body stopped arriving: no byte for {self._silent_s:g} s"
                raise Problem(408, "request_timeout", message, should_retry=False) from None
            if chunk is None:
                return
            body += chunk
            self._bytes += len(chunk)
            if len(body) > MAX_BODY_BYTES:
                raise _too_large()
            if self._bytes > self._max_bytes_of_all:
                message = "this gateway has reached its limit of request bytes; try again later"
                raise Problem(503, "overloaded", message, kind="server_error", retry_after_s=1)


def _too_large() -> Problem:
    return Problem(
        413, "request_too_large", f"the body is too large: at most {MAX_BODY_BYTES:,} bytes", should_retry=False
    )


def _object_in(body: bytes) -> dict[str, Any]:
    try:
        document = parse_json(body, parse_float=_finite)
    except (NotJson, RepeatedKey) as exc:
        raise invalid(f"the body {exc}") from None
    except (ValueError, RecursionError):
        raise invalid("the body is not JSON") from None
    if not isinstance(document, dict):
        raise invalid("the body must be a JSON object")
    table = cast("dict[str, Any]", document)
    if _has_more_values(table, _MAX_VALUES):
        raise invalid(f"the body has too many values: at most {_MAX_VALUES:,}, lists and objects included")
    return table


def _has_more_values(document: object, limit: int) -> bool:
    """Whether a JSON value contains more than `limit` values; counting stops there."""
    found, left = 0, [document]
    while left and found <= limit:
        children = json_children(left.pop())
        found += len(children)
        if found <= limit:
            left.extend(children)
    return found > limit


def _finite(text: str) -> float:
    """Return a finite number, because JSON cannot write an infinite one. Errors: NotJson."""
    number = float(text)
    if not isfinite(number):
        raise NotJson("has a number that is too large")
    return number
