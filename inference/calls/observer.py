"""What a call runner tells of its steps, for whoever traces them.

A step is a context manager that yields a function for its outcome; a step that ends
without one was cut off, or failed. Nothing is decided by what an observer does, so one
must neither raise nor wait, and nothing of a prompt or a completion is handed to it but
inside the objects that the runner works with.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Final, Literal, Protocol

from tollbook.inference.attempts import Attempt
from tollbook.inference.calls.holds import Charge, Hold
from tollbook.ledger.gate.requests import AlreadySettled, ReserveReply, Settled, SettleRequest

AttemptTold = Callable[[Attempt, Charge], None]
"""Takes how an attempt ended, and what it is booked at."""


class CallObserver(Protocol):
    """Follows the steps of calls. They nest in whatever the caller of the runner has begun."""

    def reserving(self, amount_nanousd: int) -> AbstractContextManager[Callable[[ReserveReply], None]]:
        """Money is being held for a call."""
        ...

    def attempting(self, model: str, number: int) -> AbstractContextManager[AttemptTold]:
        """One HTTP request is under way."""
        ...

    def preparing(
        self, step: Literal["retry", "fallback"], *, from_model: str, to_model: str, reason: str
    ) -> AbstractContextManager[Callable[[str | None], None]]:
        """The ledger is told of a failed attempt, and the hold extended for the next; the outcome is why it is not."""
        ...

    def settling(
        self, request: SettleRequest, hold: Hold | None
    ) -> AbstractContextManager[Callable[[Settled | AlreadySettled], None]]:
        """A hold is being replaced by its cost; `hold` is None where it was a dead run's."""
        ...


class _Unobserved:
    """A step that nobody follows. One object serves all, so that it costs next to nothing."""

    def __enter__(self) -> Callable[..., None]:
        return _ignore

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


def _ignore(*_outcome: object) -> None:
    pass


UNOBSERVED_STEP: Final = _Unobserved()


class Unobserved:
    """Follows nothing; the observer where nobody traces."""

    def reserving(self, amount_nanousd: int) -> AbstractContextManager[Callable[..., None]]:  # noqa: ARG002
        """Do nothing."""
        return UNOBSERVED_STEP

    def attempting(self, model: str, number: int) -> AbstractContextManager[Callable[..., None]]:  # noqa: ARG002
        """Do nothing."""
        return UNOBSERVED_STEP

    def preparing(self, step: str, **_facts: Any) -> AbstractContextManager[Callable[..., None]]:  # noqa: ARG002
        """Do nothing."""
        return UNOBSERVED_STEP

    def settling(self, request: SettleRequest, hold: Hold | None) -> AbstractContextManager[Callable[..., None]]:  # noqa: ARG002
        """Do nothing."""
        return UNOBSERVED_STEP
