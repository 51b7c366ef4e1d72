"""Streamed answers: events are written as they arrive, and the stream ends when its client leaves.

Each write waits until the client has read, so a slow reader slows the provider down instead of filling memory.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Final

import structlog
from starlette.types import Receive, Scope, Send

from tollbook.gateway.apis import Events
from tollbook.gateway.chat import delta_of
from tollbook.gateway.problems import problem_of_error, problem_of_result
from tollbook.gateway.running import RunningCall
from tollbook.schemas.results import ErrorCode, InferenceResult, TaskStatus

_KEEP_ALIVE_S: Final = 15.0
_COMMENT: Final = b": keep-alive\n\n"
_log = structlog.get_logger(__name__)


class EventStream:
    """An ASGI response. It calls `on_end` with whether the client received all of it."""

    def __init__(
        self,
        call: RunningCall,
        events: Events,
        headers: Mapping[str, str],
        on_end: Callable[[bool], Awaitable[None]],
    ) -> None:
        self._call = call
        self._events = events
        self._headers = {"content-type": "text/event-stream", "cache-control": "no-cache", **headers}
        self._on_end = on_end
        self._has_all = False

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Write until the end, or until the client leaves. Then the call is cancelled."""
        leaving = asyncio.create_task(wait_for_disconnect(receive))
        writing = asyncio.create_task(self._write(send, leaving))
        try:
            await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if writing.done() and (fault := writing.exception()) is not None:
                await self._end_broken(send, fault)
        finally:
            for task in (writing, leaving):
                task.cancel()
            await asyncio.gather(writing, leaving, return_exceptions=True)
        if not self._has_all:
            self._call.detach_client()
            self._call.end()
        await self._on_end(self._has_all)

    async def _write(self, send: Send, leaving: asyncio.Task[None]) -> None:
        headers = [(name.encode(), value.encode()) for name, value in self._headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await _send(send, self._events.begin())
        has_delta = False
        while True:
            try:
                async with asyncio.timeout(_KEEP_ALIVE_S):
                    delta = await self._call.next_delta()
            except TimeoutError:
                await _send(send, _COMMENT)
                continue
            if delta is None:
                break
            has_delta = True
            await _send(send, self._events.delta(delta))
        await _send(send, await self._ending(has_delta=has_delta))
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        # Checked before the server returns: after a complete response, it reports every client as disconnected.
        self._has_all = not leaving.done()

    async def _end_broken(self, send: Send, fault: BaseException) -> None:
        """End a failed stream with an error: to a client, a socket that just closes looks like a normal end."""
        _log.error("gateway.stream_failed", call_id=self._call.call_id, exc_info=fault)
        with suppress(OSError):  # The client may be gone.
            await _send(send, self._events.broken(problem_of_error(RuntimeError())))
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _ending(self, *, has_delta: bool) -> bytes:
        try:
            result = await self._call.result()
        except Exception as exc:  # noqa: BLE001 - the status is already sent, so every error is sent as an event.
            problem = problem_of_error(exc)
            if problem.status == 500:
                _log.exception("gateway.stream_failed", call_id=self._call.call_id)
            return self._events.broken(problem)
        if not is_answer(result):
            return self._events.broken(problem_of_result(result))
        whole = b"" if has_delta else self._events.delta(delta_of(result))
        return whole + self._events.end(result)


async def _send(send: Send, body: bytes) -> None:
    if body:
        await send({"type": "http.response.body", "body": body, "more_body": True})


async def wait_for_disconnect(receive: Receive) -> None:
    """Wait until the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


def is_answer(result: InferenceResult) -> bool:
    """Whether a result is sent as an answer: also one that the token limit or a filter left without text.

    It was paid for, and the original APIs also answer it with the reason why the model stopped.
    """
    if result.status is TaskStatus.DONE:
        return True
    is_limit = result.error_code is ErrorCode.OUTPUT_LIMIT_REACHED
    is_filtered = result.error_code is ErrorCode.CONTENT_FILTERED and result.finish_reason is not None
    return result.status is TaskStatus.FAILED and (is_limit or is_filtered)
