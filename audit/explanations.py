"""Why a call was held or refused: the numbers of every budget at that position.

Each number is added up from the events before the decision, and shown beside what the gate wrote.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from tollbook.audit.balances import Balance, Cap, account_of, move_of
from tollbook.audit.calls import CallLife
from tollbook.audit.policies import PolicyVersion, policy_at, read_policy_versions
from tollbook.audit.reader import AuditReader, Selection
from tollbook.inference.current_policy import PolicyInForce
from tollbook.ledger.errors import PolicyUnreadable
from tollbook.schemas.events import BoundPrice, BudgetDenied, BudgetOpened, BudgetReserved, CostRecorded, Event
from tollbook.schemas.identifiers import partition_of, split_budget_name
from tollbook.schemas.policy import OWN_BUDGET

_TOKENS_PER_MTOK = 1_000_000
_MOVES = ("budget-reserved", "cost-recorded", "cost-adjusted", "budget-opened")


@dataclass(slots=True)
class OtherHold:
    """Another call's hold, in nano-dollars, and the event that settled it; None while it is open."""

    call_id: str
    user_id: str
    hold: int
    worker: str
    since: Event
    amount_nanousd: int
    settled_by: Event | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighing:
    """An amount and one budget, just before the decision. Nano-dollars.

    `held_nanousd` is what all calls held, `own_held_nanousd` this call's part of it. `stamped_nanousd` is what the
    gate wrote for settled and held together. `cap` is how the cap of the user's own budget is made up; `room` is
    the later event after which a refused amount would have fit.
    """

    budget: str
    cap_nanousd: int
    settled_nanousd: int
    held_nanousd: int
    own_held_nanousd: int
    amount_nanousd: int
    stamped_nanousd: int | None
    others: tuple[OtherHold, ...]
    cap: Cap | None
    room: Event | None

    @property
    def is_agreed(self) -> bool:
        """Whether the gate wrote the same sum as the one added up here."""
        return self.stamped_nanousd in (None, self.settled_nanousd + self.held_nanousd)  # audits G6

    @property
    def over_nanousd(self) -> int:
        """How far settled spend and the amount pass the cap; below zero, the room that they leave."""
        return self.settled_nanousd + self.amount_nanousd - self.cap_nanousd

    @property
    def over_with_holds_nanousd(self) -> int:
        """How far settled spend, open holds and the amount pass the cap; below zero, the room that they leave."""
        return self.over_nanousd + self.held_nanousd


@dataclass(frozen=True, slots=True)
class Decision:
    """One decision of the gate on a call: a hold, an extension or a refusal."""

    event: Event
    weighings: tuple[Weighing, ...]
    policy: PolicyInForce | None
    """The policy that was in force; None where a later program wrote it, or somebody changed it."""

    @property
    def is_refusal(self) -> bool:
        """Whether the call was refused."""
        return isinstance(self.event.payload, BudgetDenied)


@dataclass(slots=True)
class _Account:
    """A budget's balance and open holds, event by event."""

    opened: Mapping[tuple[str, int], Event]
    """How the holds began that were open when a policy opened the budget."""
    balance: Balance = field(default_factory=Balance)
    holds: dict[tuple[str, int], OtherHold] = field(default_factory=dict[tuple[str, int], OtherHold])

    def apply(self, event: Event, budget: str) -> None:
        move = move_of(event, budget)
        if move is None:
            return
        self.balance.add(move)
        match event.payload:
            case BudgetReserved() as payload:
                self._hold(event, payload, event.amount)
            case BudgetOpened() as payload:
                for held in payload.holds:
                    began = self.opened.get((held.call_id, held.hold))
                    if began is not None and isinstance(began.payload, BudgetReserved):
                        self._hold(began, began.payload, held.amount_nanousd)
            case CostRecorded(hold=hold):
                self.holds.pop((event.call_id, hold), None)
            case _:
                pass

    def _hold(self, event: Event, payload: BudgetReserved, amount_nanousd: int) -> None:
        key = (event.call_id, payload.hold)
        if key in self.holds:
            self.holds[key].amount_nanousd += amount_nanousd
        else:
            self.holds[key] = OtherHold(
                event.call_id, event.user_id, payload.hold, payload.worker, event, amount_nanousd
            )


async def explain(reader: AuditReader, call: CallLife) -> list[Decision]:
    """Return every decision on a call, in order. Errors: as `AuditReader.tables`."""
    decisions = [event for event in call.events if isinstance(event.payload, BudgetReserved | BudgetDenied)]
    if not decisions:
        return []
    own = await reader.events(Selection(user_id=call.user_id))
    shared: dict[str, list[Event]] = {}
    # Others spend from further budgets too, and a policy may open one; a user's period has the user's events alone.
    for budget in {name for event in decisions for name in _names(event) if split_budget_name(name)[0] != OWN_BUDGET}:
        texts = (budget, budget.replace("/", "\\/"))  # As written by Python, and by Lua.
        found = await reader.events(Selection(types=_MOVES, payload_contains=tuple(dict.fromkeys(texts))))
        shared[budget] = found
    opened = await _opened_holds(reader, (event for found in shared.values() for event in found))
    partition = partition_of(call.user_id, len(reader.source.keys))
    versions = [each for each in await read_policy_versions(reader, partition) if partition in each.partitions]
    return [
        Decision(
            event,
            tuple(_weigh(event, name, shared.get(name, own), opened) for name in _names(event)),
            _policy_at(versions, event),
        )
        for event in decisions
    ]


async def _opened_holds(reader: AuditReader, events: Iterable[Event]) -> dict[tuple[str, int], Event]:
    """Return how the holds began that were open when a policy opened a budget, by call and number."""
    calls = {
        hold.call_id for event in events if isinstance(event.payload, BudgetOpened) for hold in event.payload.holds
    }
    if not calls:
        return {}
    selection = Selection(types=("budget-reserved",), call_ids=frozenset(calls))
    return {
        (event.call_id, event.payload.hold): event
        for event in await reader.events(selection)
        if isinstance(event.payload, BudgetReserved) and event.payload.kind == "hold"
    }


def _policy_at(versions: Sequence[PolicyVersion], event: Event) -> PolicyInForce | None:
    version = policy_at(versions, event)
    try:
        return PolicyInForce() if version is None else version.in_force
    except PolicyUnreadable:
        return None


def max_completion_tokens(bound: BoundPrice, room_nanousd: int) -> int | None:
    """Return how many completion tokens fit into the room; None if not even the prompt fits."""
    left = (room_nanousd - bound.request_nanousd) * _TOKENS_PER_MTOK
    left -= bound.prompt_tokens * bound.prompt_nanousd_per_mtok
    if left < 0:
        return None
    if not bound.completion_nanousd_per_mtok:
        return bound.completion_tokens
    return min(bound.completion_tokens, left // bound.completion_nanousd_per_mtok)


def bound_nanousd(bound: BoundPrice) -> int:
    """Return the most that a call with this bound can cost, rounded up."""
    tokens = bound.prompt_tokens * bound.prompt_nanousd_per_mtok
    tokens += bound.completion_tokens * bound.completion_nanousd_per_mtok
    return -(-tokens // _TOKENS_PER_MTOK) + bound.request_nanousd


def _names(event: Event) -> list[str]:
    """Return the budgets that a decision names: all those of a hold, or the one that refused."""
    match event.payload:
        case BudgetReserved() as payload:
            return [account_of(event), *(stamp.budget for stamp in payload.budgets)]
        case BudgetDenied() as payload:
            return [payload.budget]
        case _:
            return []


def _weigh(decision: Event, budget: str, events: list[Event], opened: Mapping[tuple[str, int], Event]) -> Weighing:
    account, cap = _Account(opened), Cap(decision.period)
    for event in events:
        if event.seq < decision.seq:
            account.apply(event, budget)
            cap.note(event)
    # Copies, because later events change the account.
    held = {key: replace(hold) for key, hold in account.holds.items()}
    balance = replace(account.balance)
    cap_nanousd, stamped = _stamps(decision, budget)
    is_own = split_budget_name(budget)[0] == OWN_BUDGET
    later = [event for event in events if event.seq > decision.seq]
    for event in later:
        if isinstance(event.payload, CostRecorded) and (event.call_id, event.payload.hold) in held:
            held[event.call_id, event.payload.hold].settled_by = event
    others = [hold for hold in held.values() if hold.call_id != decision.call_id]
    return Weighing(
        budget=budget,
        cap_nanousd=cap_nanousd,
        settled_nanousd=balance.settled_nanousd,
        held_nanousd=balance.held_nanousd,
        own_held_nanousd=balance.held_nanousd - sum(hold.amount_nanousd for hold in others),
        amount_nanousd=decision.amount,
        stamped_nanousd=stamped,
        others=tuple(sorted(others, key=lambda hold: -hold.amount_nanousd)),
        cap=replace(cap, credits=list(cap.credits)) if is_own else None,
        room=_room(decision, budget, later, account, cap if is_own else None, cap_nanousd),
    )


def _room(
    decision: Event, budget: str, later: list[Event], account: _Account, cap: Cap | None, cap_nanousd: int
) -> Event | None:
    """Return the event after which a refused amount would have fit."""
    if not isinstance(decision.payload, BudgetDenied):
        return None
    if cap is not None:
        cap.note(decision)
    for event in later:
        account.apply(event, budget)
        if cap is not None:
            cap.note(event)
            cap_nanousd = cap.nanousd or 0
        if account.balance.committed_nanousd + decision.amount <= cap_nanousd:
            return event
    return None


def _stamps(decision: Event, budget: str) -> tuple[int, int | None]:
    """Return the cap and what was committed before the decision, as the gate wrote them."""
    match decision.payload:
        case BudgetDenied() as payload:
            return payload.cap_nanousd, payload.settled_nanousd + payload.held_nanousd
        case BudgetReserved() as payload:
            move = move_of(decision, budget)
            assert move is not None, "a hold moves each of its budgets"
            committed = None if move.stamped_nanousd is None else move.stamped_nanousd - decision.amount
            return move.cap_nanousd or 0, committed
        case _:
            raise AssertionError("only holds and refusals are decisions")
