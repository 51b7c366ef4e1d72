"""Bodies of requests: limited in sum, and timed out when nothing comes."""

import asyncio
from typing import Any

import pytest
from starlette.requests import Request

from tollbook.gateway.bodies import Bodies
from tollbook.gateway.problems import Problem


class Client:
    """Sends parts of a body; then the end, or nothing more."""

    def __init__(self, *parts: bytes, ends: bool = True) -> None:
        self._parts = list(parts)
        self._ends = ends
        self.has_begun = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        self.has_begun.set()
        if self._parts:
            part = self._parts.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(self._parts) or not self._ends}
        await asyncio.Event().wait()
        raise AssertionError("nothing more is sent")

    def request(self) -> Request:
        return Request({"type": "http", "method": "POST", "path": "/", "headers": []}, self.receive)


async def test_a_body_that_stops_coming_times_out() -> None:
    with pytest.raises(Problem) as refused:
        await Bodies(silent_s=0.05).read(Client(b'{"a":', ends=False).request())
    assert (refused.value.status, refused.value.code) == (408, "request_timeout")


async def test_bodies_together_have_a_limit_and_give_back_what_they_took() -> None:
    bodies = Bodies(max_bytes_of_all=100)
    waiting = Client(b"a" * 80, ends=False)
    reading = asyncio.create_task(bodies.read(waiting.request()))
    await waiting.has_begun.wait()
    await asyncio.sleep(0)

    with pytest.raises(Problem) as refused:
        await bodies.read(Client(b"[" + b"1," * 30 + b"1]").request())
    assert (refused.value.status, refused.value.code, refused.value.retry_after_s) == (503, "overloaded", 1)

    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    assert await bodies.read(Client(b'{"a": "' + b"b" * 80 + b'"}').request()) == {"a": "b" * 80}
