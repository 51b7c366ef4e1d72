"""Parses times and time spans on the command line into ledger positions or milliseconds."""

import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Final

import typer

if TYPE_CHECKING:
    from tollbook.schemas.identifiers import EntryId

_LAST_IN_A_MILLISECOND: Final = 2**63 - 1
_UNITS_MS: Final = {"s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_MAX_SPAN_MS: Final = 3_653 * _UNITS_MS["d"]

UntilOption = Annotated[
    str | None, typer.Option(help="Up to and including a time (2026-11-24T12:00:00Z) or entry id (1764000000000-0).")
]


def parse_moment(text: str, hint: str) -> "EntryId":
    """Return the last entry id to include: the id given, or the last id in the millisecond of a time in UTC.

    Errors: typer.BadParameter.
    """
    from tollbook.schemas.identifiers import EntryId

    if re.fullmatch(r"\d{1,16}-\d{1,19}", text):
        return EntryId.parse(text)
    moment_ms = _moment_ms(text, "neither a time (2026-11-24T12:00:00Z) nor an entry id (1764000000000-0)", hint)
    return EntryId(moment_ms, _LAST_IN_A_MILLISECOND)


def parse_since(text: str, hint: str) -> int:
    """Return a time in milliseconds since the epoch; UTC if it names no zone. Errors: typer.BadParameter."""
    return _moment_ms(text, "not a time, such as 2026-11-24 or 2026-11-24T12:00:00Z", hint)


def _moment_ms(text: str, problem: str, hint: str) -> int:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r:.80} is {problem}", param_hint=hint) from None
    moment = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    return round(moment.timestamp() * 1000)


def parse_span(text: str, hint: str) -> int:
    """Return a span of time, such as 30m, 24h or 90d, in milliseconds. Errors: typer.BadParameter."""
    found = re.fullmatch(r"(\d{1,9})([smhd])", text)
    if not found:
        raise typer.BadParameter(f"{text!r:.80} is not a time span, such as 30m, 24h or 90d", param_hint=hint)
    span_ms = int(found[1]) * _UNITS_MS[found[2]]
    if span_ms > _MAX_SPAN_MS:
        raise typer.BadParameter(f"{text} is longer than ten years", param_hint=hint)
    return span_ms
