"""The filters of `tollbook audit find` as people write them, and what is found, as they want it."""

from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Final, get_args

import typer

from tollbook.audit.reader import Selection
from tollbook.audit.search import Search
from tollbook.cli.moments import parse_moment
from tollbook.schemas.events import CostRecorded, EventPayload, Outcome
from tollbook.schemas.money import MAX_NANOUSD, NANOUSD_PER_USD
from tollbook.schemas.problems import unknown_name

_TYPES: Final = tuple(each.model_fields["type"].default for each in get_args(get_args(EventPayload)[0]))
_OUTCOMES: Final = (*get_args(Outcome), *get_args(CostRecorded.model_fields["outcome"].annotation))
_TABLE_ROWS: Final = 100
_ALL: Final = 2**62


@dataclass(frozen=True, slots=True)
class Asked:
    """The filters as they were given."""

    user_id: str | None
    campaign_id: str | None
    call_id: str | None
    model: str | None
    types: tuple[str, ...]
    outcome: str | None
    reason: str | None
    since: str | None
    until: str | None
    least_usd: str | None
    most_usd: str | None


def read_search(asked: Asked) -> Search:
    """Read the filters. Errors: typer.BadParameter."""
    for name in asked.types:
        _check_known(name, _TYPES, "--type")
    if asked.outcome is not None:
        _check_known(asked.outcome, _OUTCOMES, "--outcome")
    selection = Selection(
        user_id=asked.user_id,
        call_ids=None if asked.call_id is None else frozenset({asked.call_id}),
        types=asked.types,
        since_ms=None if asked.since is None else parse_moment(asked.since, "--since").ms,
        until=None if asked.until is None else parse_moment(asked.until, "--until"),
        min_nanousd=None if asked.least_usd is None else _amount(asked.least_usd, "--min"),
        max_nanousd=None if asked.most_usd is None else _amount(asked.most_usd, "--max"),
    )
    return Search(
        selection=selection,
        campaign_id=asked.campaign_id,
        model=asked.model,
        outcome=asked.outcome,
        reason=asked.reason,
    )


def _amount(dollars: str, hint: str) -> int:
    """Return an amount in nano-dollars, which may be negative: corrections are."""
    try:
        given = Decimal(dollars)
        # Compared before it is scaled, since a huge exponent would make a huge integer.
        is_amount = (
            abs(given) <= MAX_NANOUSD // NANOUSD_PER_USD and given.scaleb(9) == given.scaleb(9).to_integral_value()
        )
    except InvalidOperation:
        is_amount, given = False, Decimal(0)
    if not is_amount:
        raise typer.BadParameter(f"{dollars!r} is no amount in dollars of at most nine places", param_hint=hint)
    return int(given.scaleb(9))


def _check_known(name: str, known: tuple[str, ...], hint: str) -> None:
    if name not in known:
        raise typer.BadParameter(unknown_name(hint.removeprefix("--"), name, known), param_hint=hint)
