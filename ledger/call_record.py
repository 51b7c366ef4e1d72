"""Reading the state of a call outside the gate, as the gate wrote it (see functions/tollbook.lua)."""

from dataclasses import dataclass
from typing import Literal, cast

from ledger.requests import OpenCall

CallState = Literal["open", "closed", "settled", "denied"]


@dataclass(frozen=True, slots=True)
class CallRecord:
    """What the gate keeps of a call. `hold` describes the latest hold, whether it is open or not."""

    state: CallState
    content_hash: str
    user_id: str
    hold: OpenCall


def parse_call_record(value: bytes) -> CallRecord:
    """Parse the value of a call's key. Errors: ValueError for anything the gate did not write."""
    head, _settled, _marks, _denial, *budgets = value.decode().split("\n")
    state, content_hash, hold, amount, worker, deadline, user_id, period, *numbers = head.split(" ")
    recorded, begun, spent, assumed = (int(number) for number in numbers)
    return CallRecord(
        state=cast("CallState", state),
        content_hash=content_hash,
        user_id=user_id,
        hold=OpenCall(
            int(hold), int(amount), worker, int(deadline), recorded, begun, spent, assumed, tuple(budgets), period
        ),
    )
