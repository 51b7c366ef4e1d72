"""Deltas: the parts of an answer, passed on to a reader while the call runs.

A delta is a chunk in OpenAI's form, without usage: `{"choices": [{"index": 0, "delta": {...}, "finish_reason": ...,
"logprobs": ...}]}`. `delta` may have `content`, `reasoning`, `reasoning_details`, `refusal`, `tool_calls` (each with
its `index`) and `images`; `finish_reason` has OpenAI's values. The deltas of a call, joined, equal its result.
"""

from collections.abc import Awaitable, Callable
from typing import Any

from tollbook.inference.attempts import Attempt

Delta = dict[str, Any]
OnDelta = Callable[[Delta], Awaitable[None]]
"""Takes the next delta. It is awaited, so that a slow reader slows the provider down."""


class ReaderFailed(Exception):
    """The reader of an answer could not take a delta; `reason` is why. The request is abandoned."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(f"a delta could not be passed on: {type(reason).__name__}")
        self.reason = reason


async def pass_on(delta: Delta, on_delta: OnDelta) -> None:
    """Pass a delta on. Errors: ReaderFailed."""
    try:
        await on_delta(delta)
    except ReaderFailed:
        raise
    except Exception as exc:
        # Wrapped, so that it is not taken for an error of the network, the provider or the ledger.
        raise ReaderFailed(exc) from exc


class DeltaRelay:
    """Passes on the deltas of a call, over all its attempts. Errors of every method: ReaderFailed.

    Invariant: once a part of an answer was passed on (`has_passed`), no other attempt may follow. An empty delta, which
    has only a finish reason, waits for the first delta with content, or until no other attempt can follow.
    """

    def __init__(self, on_delta: OnDelta) -> None:
        self._on_delta = on_delta
        self._waiting: list[Delta] = []
        self.has_passed = False

    async def take(self, delta: Delta) -> None:
        """Take the next delta of an attempt."""
        if not self.has_passed and not delta["choices"][0]["delta"]:
            self._waiting.append(delta)
            return
        self.has_passed = True
        waiting, self._waiting = self._waiting, []
        for each in (*waiting, delta):
            await pass_on(each, self._on_delta)

    async def finish(self, reply: Attempt) -> None:
        """Pass on the final reply as one delta, unless it was passed on in parts."""
        if not self.has_passed:
            self.has_passed = True
            await pass_on(whole_delta(reply), self._on_delta)

    def begin_attempt(self) -> None:
        """Discard the waiting deltas: another attempt begins."""
        self._waiting.clear()


def whole_delta(attempt: Attempt) -> Delta:
    """Return a whole answer as one delta."""
    parts: dict[str, Any] = {
        "content": attempt.content,
        "reasoning": attempt.reasoning,
        "reasoning_details": list(attempt.reasoning_details),
        "refusal": attempt.refusal,
        "tool_calls": [{"index": index, **call} for index, call in enumerate(attempt.tool_calls)],
        "images": [{"type": "image_url", "image_url": {"url": url}} for url in attempt.images],
    }
    delta = {name: value for name, value in parts.items() if value}
    choice = {"index": 0, "delta": delta, "finish_reason": attempt.finish_reason, "logprobs": attempt.logprobs}
    return {"choices": [choice]}
