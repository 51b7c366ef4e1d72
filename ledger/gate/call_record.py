"""The record of a call, as the gate writes it. Its layout is described in functions/header.lua."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, cast

from tollbook.ledger.gate.requests import OpenCall

CallState = Literal["open", "closed", "settled", "denied"]

RECORD_KEPT_MS: Final = 31 * 86_400_000
"""The shortest time for which the gate keeps the record of a finished call: the least TOLLBOOK_IDEMPOTENCY_TTL_S."""
_NOBODYS: Final = "-"
"""The period of a command that concerns no user's."""
_SETTLED: Final = re.compile(r"(\d+)=(\d+),(\d+)(?:\t[^\t]*\t(.*))?")


@dataclass(frozen=True, slots=True)
class SettledHold:
    """The cost of a settled hold, corrections included, in nano-dollars; and the budgets that paid for it."""

    cost_nanousd: int
    assumed_nanousd: int
    budgets: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CallRecord:
    """What the gate keeps of a call. `hold` is the latest hold, open or not.

    `attempts` are its recorded events of attempts: m1 for the first call of a model, f2 for a fallback to the second.
    """

    state: CallState
    content_hash: str
    user_id: str
    hold: OpenCall
    settled: Mapping[int, SettledHold]
    attempts: frozenset[str]

    def has_hold(self, hold: int) -> bool:
        """Whether a hold of this number is open, or was settled."""
        return hold in self.settled or (self.state == "open" and self.hold.hold == hold)


def parse_call_record(value: bytes) -> CallRecord:
    """Parse the value of a call's key. Errors: ValueError for anything that the gate did not write."""
    head, settled, marks, _denial, *budgets = value.decode().split("\n")
    # Of these, the user's id alone can have spaces.
    state, content_hash, hold, amount, worker, deadline, rest = head.split(" ", 6)
    user_id, period, *numbers = rest.rsplit(" ", 7)
    recorded, begun, spent, assumed = (int(number) for number in numbers[:4])  # Then a cap and a plan, for alerts.
    noted = f"g{begun}="
    generation = next((mark.removeprefix(noted) for mark in marks.split(" ") if mark.startswith(noted)), "")
    provider, _, generation_id = generation.partition("=")
    return CallRecord(
        state=cast("CallState", state),
        content_hash=content_hash,
        user_id="" if period == _NOBODYS else user_id,
        hold=OpenCall(
            int(hold),
            int(amount),
            worker,
            int(deadline),
            recorded,
            begun,
            spent,
            assumed,
            tuple(budgets),
            period,
            provider or None,
            generation_id or None,
        ),
        settled=dict(_settled_hold(part, tuple(budgets)) for part in settled.split(" ") if part),
        attempts=frozenset(mark for mark in marks.split(" ") if mark[:1] in ("m", "f")),
    )


def _settled_hold(text: str, budgets: tuple[str, ...]) -> tuple[int, SettledHold]:
    match = _SETTLED.fullmatch(text)
    if match is None:
        raise ValueError(f"not a settled hold: {text!r}")
    number, cost, assumed, place = match.groups()
    # A hold of another period than the latest one lists its own budgets.
    own = budgets if place is None else tuple(place.replace("\x01", " ").split("\t"))
    return int(number), SettledHold(int(cost), int(assumed), own)
