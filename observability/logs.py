"""Logging: structlog to standard error, JSON for machines or coloured lines for people.

Event names are `noun.past_verb`; data are fields. Prompts, completions and keys are never
logged (G10): nothing that holds one is ever passed to a logger.
"""

import logging
import sys
from typing import Literal

import structlog


def configure_logging(*, form: Literal["json", "console"], level: str) -> None:
    """Set up logging for this process."""
    number = logging.getLevelNamesMapping()[level.upper()]
    last: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if form == "json"
        else structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(),
            pad_event_to=24,
            # The default prints the local variables of every frame, and with them prompts and keys (G10).
            exception_formatter=structlog.dev.plain_traceback,
        )
    )
    tracebacks: list[structlog.typing.Processor] = [structlog.processors.format_exc_info] if form == "json" else []
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*shared, *tracebacks, last],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    # Libraries log through the standard module, in the same form; only their warnings matter here.
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *tracebacks, last],
        )
    )
    logging.basicConfig(level=max(number, logging.WARNING), handlers=[handler], force=True)
