"""Parses the filters of `tollbook audit find`."""

from collections.abc import Sequence
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


def read_search(
    *,
    user_id: str | None = None,
    campaign_id: str | None = None,
    call_id: str | None = None,
    model: str | None = None,
    types: Sequence[str] = (),
    outcome: str | None = None,
    reason: str | None = None,
    since: str | None = None,
    until: str | None = None,
    least_usd: str | None = None,
    most_usd: str | None = None,
) -> Search:
    """Parse the filters. Errors: typer.BadParameter."""
    for name in types:
        _check_known(name, _TYPES, "--type")
    if outcome is not None:
        _check_known(outcome, _OUTCOMES, "--outcome")
    selection = Selection(
        user_id=user_id,
        call_ids=None if call_id is None else frozenset({call_id}),
        types=tuple(types),
        since_ms=None if since is None else parse_moment(since, "--since").ms,
        until=None if until is None else parse_moment(until, "--until"),
        min_nanousd=None if least_usd is None else _amount(least_usd, "--min"),
        max_nanousd=None if most_usd is None else _amount(most_usd, "--max"),
    )
    return Search(selection=selection, campaign_id=campaign_id, model=model, outcome=outcome, reason=reason)


def _amount(dollars: str, hint: str) -> int:
    """Return an amount in nano-dollars. It may be negative, because corrections can be."""
    try:
        given = Decimal(dollars)
        # Compare before scaling: a huge exponent would make a huge integer.
        is_amount = (
            abs(given) <= MAX_NANOUSD // NANOUSD_PER_USD and given.scaleb(9) == given.scaleb(9).to_integral_value()
        )
    except InvalidOperation:
        is_amount, given = False, Decimal(0)
    if not is_amount:
        raise typer.BadParameter(f"{dollars!r} is not an amount in dollars with at most nine places", param_hint=hint)
    return int(given.scaleb(9))


def _check_known(name: str, known: tuple[str, ...], hint: str) -> None:
    if name not in known:
        raise typer.BadParameter(unknown_name(hint.removeprefix("--"), name, known), param_hint=hint)
