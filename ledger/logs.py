"""Loggers for modules that quick commands load: importing structlog takes longer than such a command itself."""

from collections.abc import Callable
from typing import Any

_configure: Callable[[], None] | None = None


def configure_when_used(configure: Callable[[], None] | None) -> None:
    """Call `configure` before the first line of a `LazyLogger`; None: never."""
    global _configure
    _configure = configure


class LazyLogger:
    """A structlog logger that loads structlog with its first line."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, level: str) -> Any:
        """Return the method for a level, for example `warning`."""
        global _configure
        import structlog

        if _configure is not None:
            _configure()
            _configure = None
        return getattr(structlog.get_logger(self._name), level)
