"""What a worker tells of its tasks, for whoever traces them; the steps of their calls are told by the call runner."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from tollbook.consumers.messages import Delivery
from tollbook.inference.calls.observer import UNOBSERVED_STEP, CallObserver, Unobserved
from tollbook.schemas.results import InferenceResult


class TaskObserver(CallObserver, Protocol):
    """Follows tasks. It must neither raise nor wait."""

    def working(self, delivery: Delivery) -> AbstractContextManager[Callable[[InferenceResult], None]]:
        """A delivery is worked on, until it is acknowledged or left; the outcome is its result."""
        ...

    def acknowledging(self) -> AbstractContextManager[object]:
        """A task that is dealt with is being acknowledged."""
        ...


class UnobservedTasks(Unobserved):
    """Follows nothing; the observer where nobody traces."""

    def working(self, delivery: Delivery) -> AbstractContextManager[Callable[..., None]]:  # noqa: ARG002
        """Do nothing."""
        return UNOBSERVED_STEP

    def acknowledging(self) -> AbstractContextManager[object]:
        """Do nothing."""
        return UNOBSERVED_STEP
