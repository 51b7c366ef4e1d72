"""Describes decisions of the gate: the cap, other calls' holds, the verdict, and what would have let the call pass."""

from tollbook.audit.explanations import Decision, OtherHold, Weighing, max_completion_tokens
from tollbook.schemas.events import (
    BoundPrice,
    BudgetDenied,
    BudgetReserved,
    CreditGranted,
    CreditRevoked,
    Event,
    PlanAssigned,
)
from tollbook.schemas.identifiers import split_budget_name
from tollbook.views.audit.texts import exact_usd, moment, movement_text, signature_text
from tollbook.views.tables import printable


def cap_text(weighing: Weighing, decision: Decision) -> str:
    """Return where a cap comes from: plan or policy, and credits."""
    payload, cap = decision.event.payload, weighing.cap
    if cap is None or not isinstance(payload, BudgetReserved | BudgetDenied):
        return _by_policy("set", decision)
    if cap.assigned is not None and isinstance(assigned := cap.assigned.payload, PlanAssigned):
        text = f"{exact_usd(assigned.cap_nanousd)} of plan {printable(assigned.plan)}, by {printable(assigned.author)}"
        text += f" on {moment(cap.assigned):%Y-%m-%d}: {printable(assigned.reason)}"
    else:
        of_plan = exact_usd(weighing.cap_nanousd - cap.credit_nanousd)
        policy = decision.policy
        if policy is not None and decision.event.user_id in policy.policy.users:
            text = _by_policy(f"{of_plan} for this user alone", decision)
        else:
            text = _by_policy(f"{of_plan} of plan {printable(payload.plan)}, as the task says", decision)
    for credit in cap.credits:
        if isinstance(credit.payload, CreditGranted | CreditRevoked):
            text += f"\n{exact_usd(credit.amount)} credit, {signature_text(credit.payload)}"
    return text


def _by_policy(text: str, decision: Decision) -> str:
    """Add the policy that set a cap; version 0, and caps from before the first policy, are set by configuration."""
    policy = decision.policy
    if policy is None:
        return f"{text} by a policy that cannot be read"
    return f"{text}, by policy {policy.version}" if policy.version else f"{text}, by configuration"


def hold_text(hold: OtherHold) -> str:
    """Return since when another call held money, and when and at what cost it was settled."""
    held = f"since {moment(hold.since):%m-%d %H:%M:%S} by {printable(hold.worker)}"
    if hold.settled_by is None:
        return f"{held}, still open"
    return f"{held}; settled {moment(hold.settled_by):%m-%d %H:%M:%S} at {exact_usd(hold.settled_by.amount)}"


def verdict_text(weighing: Weighing, decision: Decision) -> str:
    """Return whether the call fit, and by how much."""
    over, over_with_holds = weighing.over_nanousd, weighing.over_with_holds_nanousd
    if not decision.is_refusal:
        return f"fits: {exact_usd(-over_with_holds)} of the cap left"
    if over > 0:
        return f"refused: settled and this call alone are {exact_usd(over)} over the cap"
    return f"refused when its wait was over: with others' holds it is {exact_usd(over_with_holds)} over the cap"


def ways_out(weighing: Weighing, decision: Decision) -> list[str]:
    """Return what would have let a refused call pass."""
    payload = decision.event.payload
    assert isinstance(payload, BudgetDenied)
    over, over_with_holds = weighing.over_nanousd, weighing.over_with_holds_nanousd
    raised = "a cap or credit" if split_budget_name(weighing.budget)[0] == "user" else "a cap"
    ways: list[str] = []
    if over <= 0:
        ways.append(f"{exact_usd(over_with_holds)} less held by others, of {exact_usd(weighing.held_nanousd)}")
        ways.append(f"{raised} higher by {exact_usd(over_with_holds)}")
    elif weighing.held_nanousd:
        ways.append(
            f"{raised} higher by {exact_usd(over)} once others' holds are settled, "
            f"by {exact_usd(over_with_holds)} at once"
        )
    else:
        ways.append(f"{raised} higher by {exact_usd(over)}")
    ways.append(_smaller(payload.bound, weighing.amount_nanousd - (over if over > 0 else over_with_holds)))
    return ways


def room_text(weighing: Weighing, decision: Decision) -> str:
    """Return when there was room for what was refused."""
    room = weighing.room
    if room is None:
        return "There has been no room for it since."
    seconds = (room.at_ms - decision.event.at_ms) / 1000
    return f"There was room for it {seconds:,.3f} s later, after event {room.seq:,}: {_said(room)}."


def _said(event: Event) -> str:
    headline, details = movement_text(event)
    return f"{headline}, {details[0]}"


def _smaller(bound: BoundPrice, room_nanousd: int) -> str:
    tokens = max_completion_tokens(bound, room_nanousd) if room_nanousd > 0 else None
    if not tokens:
        return "no shorter answer: its prompt alone does not fit"
    return f"an answer of at most {tokens:,} tokens instead of {bound.completion_tokens:,} (max_tokens)"
