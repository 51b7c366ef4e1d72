"""Updates the spend of a copy of the projection with the newer events of the ledger."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from tollbook.views.top.figures import SpendFigures, UserFigures
from tollbook.views.top.tail import Move


def update_spend(spend: SpendFigures, moves: Sequence[Move], *, events: int) -> SpendFigures:
    """Add the movements since the copy to the totals and to the users that are shown.

    `events` is the number of events since the copy. A user who is not in the copy starts at zero if the copy has all
    users. If it has only the top users, that user is left out, because the earlier spend is unknown.
    """
    by_user = defaultdict[str, list[Move]](list)
    for move in moves:
        if move.period == spend.period:
            by_user[move.user_id].append(move)
    known = {user.user_id for user in spend.by_spend}
    new = sorted(by_user.keys() - known) if len(known) == spend.users else []
    first_seen = tuple(UserFigures(user_id, None, 0, 0, None, 0, 0, 0) for user_id in new)
    all_users = UserFigures(
        "", None, spend.spent_nanousd, spend.held_nanousd, None, spend.calls, spend.denied, spend.fallbacks
    )
    totals = _moved(all_users, [move for found in by_user.values() for move in found])

    def moved(users: tuple[UserFigures, ...]) -> Iterable[UserFigures]:
        return [_moved(user, by_user.get(user.user_id, ())) for user in users + first_seen]

    return replace(
        spend,
        is_current=True,
        newer_events=events,
        users=spend.users + len(new),
        spent_nanousd=totals.spent_nanousd,
        held_nanousd=totals.held_nanousd,
        calls=totals.calls,
        denied=totals.denied,
        fallbacks=totals.fallbacks,
        by_spend=tuple(sorted(moved(spend.by_spend), key=lambda user: (-user.spent_nanousd, user.user_id))),
        by_use=tuple(sorted(moved(spend.by_use), key=lambda user: (-(user.used or 0.0), user.user_id))),
    )


def _moved(user: UserFigures, moves: Sequence[Move]) -> UserFigures:
    caps = [move.cap_nanousd for move in moves if move.cap_nanousd is not None]
    plans = [move.plan for move in moves if move.plan is not None]
    return replace(
        user,
        plan=plans[-1] if plans else user.plan,
        spent_nanousd=user.spent_nanousd + sum(move.settled_nanousd for move in moves),
        held_nanousd=user.held_nanousd + sum(move.held_nanousd for move in moves),
        cap_nanousd=caps[-1] if caps else user.cap_nanousd,
        calls=user.calls + sum(move.calls for move in moves),
        denied=user.denied + sum(move.denied for move in moves),
        fallbacks=user.fallbacks + sum(move.fallbacks for move in moves),
    )
