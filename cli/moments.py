"""Moments on the command line, as places on the ledger."""

import re
from datetime import UTC, datetime
from typing import Annotated

import typer

from tollbook.schemas.identifiers import EntryId

_LAST_IN_A_MILLISECOND = 2**63 - 1

UntilOption = Annotated[
    str | None, typer.Option(help="Up to a moment (2026-11-24T12:00:00Z) or entry id (1764000000000-0), included.")
]


def parse_moment(text: str, hint: str) -> EntryId:
    """Return the last entry id that counts: an id itself, or the end of the millisecond of a moment in UTC.

    Errors: typer.BadParameter.
    """
    if re.fullmatch(r"\d{1,16}-\d{1,19}", text):
        return EntryId.parse(text)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        problem = f"{text!r} is neither a moment (2026-11-24T12:00:00Z) nor an entry id (1764000000000-0)"
        raise typer.BadParameter(problem, param_hint=hint) from None
    moment = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    return EntryId(round(moment.timestamp() * 1000), _LAST_IN_A_MILLISECOND)
