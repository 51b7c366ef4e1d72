"""The steps of a call: how an observer follows them, and the cleanup after each.

A step is a context manager that yields a function for its outcome. If that function is not called, the step was cut off
or failed. An observer decides nothing and must neither raise nor wait. It gets no text of a prompt or completion,
except inside the objects that the steps use.
"""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Final, Literal, Protocol, TypeVar

import structlog

from tollbook.inference.attempts import Attempt
from tollbook.inference.calls.holds import Charge, Hold
from tollbook.ledger.errors import LedgerError
from tollbook.ledger.gate.ledger import Ledger
from tollbook.ledger.gate.requests import AlreadySettled, ReserveReply, Settled, SettleRequest
from tollbook.schemas.routes import Target

T = TypeVar("T")
RecordAttempt = Callable[[Attempt, Charge], None]
"""Takes a finished attempt and its charge."""
_log = structlog.get_logger(__name__)


class CallObserver(Protocol):
    """Follows the steps of calls, inside any step that the caller has started."""

    def reserving(self, amount_nanousd: int) -> AbstractContextManager[Callable[[ReserveReply], None]]:
        """Follow the reservation for a call."""
        ...

    def attempting(self, target: Target, number: int) -> AbstractContextManager[RecordAttempt]:
        """Follow one HTTP request."""
        ...

    def preparing(
        self, step: Literal["retry", "fallback"], *, from_model: str, to_model: str, reason: str
    ) -> AbstractContextManager[Callable[[str | None], None]]:
        """Follow the preparation of a further attempt; the outcome is None, or why it cannot be made."""
        ...

    def settling(
        self, request: SettleRequest, hold: Hold | None
    ) -> AbstractContextManager[Callable[[Settled | AlreadySettled], None]]:
        """Follow the settlement of a hold; `hold` is None if another run has opened it."""
        ...


class _UnobservedStep:
    """A step without an observer. One shared object, so that it takes almost no time."""

    def __enter__(self) -> Callable[..., None]:
        return _ignore

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


def _ignore(*_outcome: object) -> None:
    pass


_UNOBSERVED_STEP: Final = _UnobservedStep()


class Unobserved:
    """Follows nothing: the observer when tracing is off."""

    def unobserved(self, *_facts: Any, **_named_facts: Any) -> AbstractContextManager[Callable[..., None]]:
        """Return a step without an observer."""
        return _UNOBSERVED_STEP

    reserving = attempting = preparing = settling = unobserved


async def settle_observed(
    ledger: Ledger, observer: CallObserver, request: SettleRequest, hold: Hold | None = None
) -> bool:
    """Settle a hold; return False if another process may have settled it before.

    Then the events and the result of `request` are not on the ledger, even if the cost was the same. `hold` is None for
    the hold of a dead run.
    """
    with observer.settling(request, hold) as record_outcome:
        reply = await (ledger.settle_now if hold is None else ledger.settle)(request)
        record_outcome(reply)
    return isinstance(reply, Settled) and bool(reply.entry_id)


async def complete_shielded(work: Coroutine[Any, Any, T]) -> T:
    """Run work to its end, even if the caller is cancelled; the cancellation is raised afterwards."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


async def cleanup_shielded(call_id: str, cleanup: Coroutine[Any, Any, None]) -> None:
    """Clean up even if the caller is cancelled; if the ledger does not answer, the sweeper settles the hold."""
    try:
        await asyncio.shield(cleanup)
    except LedgerError as exc:
        # Raising this would replace the cancellation, and the cancelled task would go on.
        _log.warning("call.hold_left", call_id=call_id, problem=str(exc))
