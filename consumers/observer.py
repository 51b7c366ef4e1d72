"""The steps of a task that an observer can trace. The steps of its call are in `inference/calls/steps.py`."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from tollbook.consumers.messages import Delivery
from tollbook.inference.calls.steps import CallObserver, Unobserved
from tollbook.schemas.results import InferenceResult


class TaskObserver(CallObserver, Protocol):
    """Follows tasks. It must neither raise nor wait."""

    def working(self, delivery: Delivery) -> AbstractContextManager[Callable[[InferenceResult], None]]:
        """Follow the work on a delivery until it is acknowledged or left pending; the function takes its result."""
        ...

    def acknowledging(self) -> AbstractContextManager[object]:
        """Follow the acknowledgement of a task whose result is stored."""
        ...


class UnobservedTasks(Unobserved):
    """Follows nothing: the observer when tracing is off."""

    working = acknowledging = Unobserved.unobserved
