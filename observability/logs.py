"""Logging: structlog to standard error, as JSON or as coloured lines.

Event names are `noun.past_verb`; data are fields. Prompts, completions and keys are never logged (G10): no object that
contains one is ever passed to a logger.

A worker logs a line for each task, up to 1,800 a second. So each format has its own renderer, at about 8 µs a line;
structlog's own (26.1, November 2026) take 12 µs (JSON) and 24 µs (console).
"""

import json
import logging
import re
import sys
from typing import Final, Literal

import structlog
from pydantic_core import PydanticSerializationError, to_json

_EVENT_WIDTH: Final = 24
_UNQUOTED: Final = re.compile(r"[^\s\"'=]+")


def configure_logging(*, form: Literal["json", "console"], level: str) -> None:
    """Set up logging for this process."""
    number = logging.getLevelNamesMapping()[level.upper()]
    last = _render_json if form == "json" else _console_renderer(colors=sys.stderr.isatty())
    tracebacks: list[structlog.typing.Processor] = [structlog.processors.format_exc_info] if form == "json" else []
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*shared, *tracebacks, last],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    # Libraries log through the standard module, in the same format; only their warnings matter here.
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *tracebacks, last],
        )
    )
    logging.basicConfig(level=max(number, logging.WARNING), handlers=[handler], force=True)


def _render_json(_logger: object, _method: str, line: structlog.typing.EventDict) -> str:
    try:
        return to_json(line, fallback=repr).decode()
    except (PydanticSerializationError, UnicodeDecodeError):
        # Half of a surrogate pair, which UTF-8 cannot encode but JSON can escape.
        return json.dumps(line, default=repr)


def _console_renderer(*, colors: bool) -> structlog.typing.Processor:
    """Return the console renderer. structlog renders coloured lines and those with a traceback."""
    full = structlog.dev.ConsoleRenderer(
        colors=colors,
        pad_event_to=_EVENT_WIDTH,
        sort_keys=False,
        # The default prints the local variables of every frame, which may contain prompts and keys (G10).
        exception_formatter=structlog.dev.plain_traceback,
    )

    def render(logger: structlog.typing.WrappedLogger, method: str, line: structlog.typing.EventDict) -> str:
        if colors or "exc_info" in line or "exception" in line or "stack" in line:
            return full(logger, method, line)
        head = f"{line.pop('timestamp', '')} [{line.pop('level', ''):<9}] {line.pop('event', ''):<{_EVENT_WIDTH}}"
        return " ".join([head, *(f"{name}={_plain(value)}" for name, value in line.items())]).rstrip()

    return render


def _plain(value: object) -> str:
    """Return a value, quoted if it has spaces or characters that could control a terminal."""
    if not isinstance(value, str):
        return str(value) if isinstance(value, int | float | None) else repr(value)
    return value if value.isprintable() and _UNQUOTED.fullmatch(value) else repr(value)
