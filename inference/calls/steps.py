"""The steps of a call: who follows them, and what must happen however they end.

A step is a context manager that yields a function for its outcome; a step that ends without one was cut off, or failed.
Nothing is decided by what an observer does, so it must neither raise nor wait. Nothing of a prompt or a completion is
handed to it, other than inside the objects that the steps work with.
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
"""Takes how an attempt ended, and what it is charged at."""
_log = structlog.get_logger(__name__)


class CallObserver(Protocol):
    """Follows the steps of calls. They nest in whatever the caller has begun."""

    def reserving(self, amount_nanousd: int) -> AbstractContextManager[Callable[[ReserveReply], None]]:
        """Money is being held for a call."""
        ...

    def attempting(self, target: Target, number: int) -> AbstractContextManager[RecordAttempt]:
        """One HTTP request is in flight."""
        ...

    def preparing(
        self, step: Literal["retry", "fallback"], *, from_model: str, to_model: str, reason: str
    ) -> AbstractContextManager[Callable[[str | None], None]]:
        """A failed attempt is recorded, and the hold extended for the next; the outcome is why it is not, or None."""
        ...

    def settling(
        self, request: SettleRequest, hold: Hold | None
    ) -> AbstractContextManager[Callable[[Settled | AlreadySettled], None]]:
        """A hold is being replaced by its cost; `hold` is None where another run had opened it."""
        ...


class _UnobservedStep:
    """A step that nobody follows. One object serves all, so that it takes next to no time."""

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
    """Follows nothing; the observer where nobody traces."""

    def unobserved(self, *_facts: Any, **_named_facts: Any) -> AbstractContextManager[Callable[..., None]]:
        """Return a step that nobody follows."""
        return _UNOBSERVED_STEP

    reserving = attempting = preparing = settling = unobserved


async def settle_observed(
    ledger: Ledger, observer: CallObserver, request: SettleRequest, hold: Hold | None = None
) -> bool:
    """Settle a hold; return False where it may have been settled before, by somebody else.

    That may have been at the same cost: then the events and the result of `request` are not on the ledger. Without
    `hold` it is a dead run's, of which nothing is known that the ledger does not have.
    """
    with observer.settling(request, hold) as record_outcome:
        reply = await (ledger.settle_now if hold is None else ledger.settle)(request)
        record_outcome(reply)
    return isinstance(reply, Settled) and bool(reply.entry_id)


async def complete_shielded(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end even where the caller is cancelled meanwhile; the cancellation is raised then."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


async def cleanup_shielded(call_id: str, cleanup: Coroutine[Any, Any, None]) -> None:
    """Clean up although the caller is cancelled; where the ledger does not answer, the hold is left to the sweeper."""
    try:
        await asyncio.shield(cleanup)
    except LedgerError as exc:
        # Raised, it would take the place of the cancellation, and the task that was to end would go on.
        _log.warning("call.hold_left", call_id=call_id, problem=str(exc))
