"""Spend in a copy of the projection, brought up to date by what the ledger has of it since."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from consumers.top.figures import SpendFigures, UserFigures
from consumers.top.tail import Move


def brought_up_to_date(spend: SpendFigures, moves: Sequence[Move], *, events: int) -> SpendFigures:
    """Add what moved since the copy, `events` in all, to the totals and to the users that are shown.

    A user who is not among those of the copy comes with the next one, since nothing is known of what went before.
    """
    settled, held = defaultdict[str, int](int), defaultdict[str, int](int)
    for move in moves:
        if move.period == spend.period:
            settled[move.user_id] += move.settled_nanousd
            held[move.user_id] += move.held_nanousd

    def moved(user: UserFigures) -> UserFigures:
        return replace(
            user,
            spent_nanousd=user.spent_nanousd + settled[user.user_id],
            held_nanousd=user.held_nanousd + held[user.user_id],
        )

    return replace(
        spend,
        is_current=True,
        newer_events=events,
        spent_nanousd=spend.spent_nanousd + sum(settled.values()),
        held_nanousd=spend.held_nanousd + sum(held.values()),
        by_spend=tuple(sorted(map(moved, spend.by_spend), key=lambda user: (-user.spent_nanousd, user.user_id))),
        by_use=tuple(sorted(map(moved, spend.by_use), key=lambda user: (-(user.used or 0.0), user.user_id))),
    )
