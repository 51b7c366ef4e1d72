"""The steps of a task, for whoever traces them; those of its call are in `inference/calls/steps.py`."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from tollbook.consumers.messages import Delivery
from tollbook.inference.calls.steps import CallObserver, Unobserved
from tollbook.schemas.results import InferenceResult


class TaskObserver(CallObserver, Protocol):
    """Follows tasks. It must neither raise nor wait."""

    def working(self, delivery: Delivery) -> AbstractContextManager[Callable[[InferenceResult], None]]:
        """A delivery is worked on, until it is acknowledged or left pending; the outcome is its result."""
        ...

    def acknowledging(self) -> AbstractContextManager[object]:
        """A task that has its result is being acknowledged."""
        ...


class UnobservedTasks(Unobserved):
    """Follows nothing; the observer where nobody traces."""

    working = acknowledging = Unobserved.unobserved
