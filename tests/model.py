"""A ledger in plain Python that predicts every answer of the gate. Standard library only.

It keeps every balance, so it needs no tails to compute them; it follows the tails only to say
when a baseline is too old to be used. Positions are sequence numbers. An answer is a tuple: a
code, then numbers and names; `tests/stateful/gate_driver.py` converts the gate's typed replies
into the same form. Nothing here is copied from the gate: each rule is written as the contract
states it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

MAX_NANOUSD = 1_000_000 * 1_000_000_000

Answer = tuple[Any, ...]
Budgets = Sequence[tuple[str, int]]
"""Names and caps, the user's period first."""


@dataclass(frozen=True)
class ModelBaseline:
    """The baseline that a caller gives: settled and held of a budget after event number `seq`."""

    settled: int
    held: int
    seq: int


@dataclass(frozen=True)
class ModelEvent:
    """An event as it must be on the stream; `stamps` are the payload members that only the gate knows."""

    type: str
    user: str
    period: str
    call: str
    attempt: int
    amount: int
    committed: int | None
    stamps: dict[str, Any]


@dataclass
class ModelCredit:
    """One credit of a budget: what it was granted and what is left of it. `expires` 0: never."""

    credit_id: str
    amount: int
    left: int
    expires: int


@dataclass(frozen=True)
class AlertRules:
    """Fractions of the cap at which alerts are raised, in hundredths: by plan, and by budget with its cap."""

    plans: dict[str, tuple[int, ...]] = field(default_factory=dict)
    budgets: dict[str, tuple[int, tuple[int, ...]]] = field(default_factory=dict)


@dataclass
class ModelBudget:
    settled: int = 0
    held: int = 0
    tail: list[int] = field(default_factory=list)
    moves: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def committed(self) -> int:
        return self.settled + self.held

    def at(self, seq: int) -> tuple[int, int]:
        """Settled and held after event number `seq`."""
        known = [(settled, held) for number, settled, held in self.moves if number <= seq]
        return known[-1] if known else (0, 0)


@dataclass
class ModelCall:
    content: str
    user: str
    period: str
    worker: str
    state: str = "new"
    hold: int = 0
    amount: int = 0
    recorded: int = 0
    begun: int = 0
    spent: int = 0
    assumed: int = 0
    budgets: tuple[str, ...] = ()
    settled: dict[int, tuple[int, int]] = field(default_factory=dict)
    places: dict[int, tuple[str, tuple[str, ...]]] = field(default_factory=dict)
    """Period and budgets of each hold, in which it is settled and corrected."""
    recorded_events: set[tuple[str, int]] = field(default_factory=set)
    extended: set[int] = field(default_factory=set)
    denial: Answer | None = None
    result: str = ""
    cap: int = 0
    plan: str = "-"
    noted: tuple[int, str, str] | None = None
    """The number of an attempt, its provider, and the provider's id of the request."""

    @property
    def generation(self) -> tuple[str, ...]:
        """Provider and request id of the newest attempt, if they are noted."""
        return self.noted[1:] if self.noted and self.noted[0] == self.begun else ()


class LedgerModel:
    """`rules_of` gives the alerts of a version of the policy; version 0 has none."""

    def __init__(self, rules_of: Callable[[int], AlertRules] = lambda _version: AlertRules()) -> None:
        self.rules_of = rules_of
        self.plans: dict[str, str] = {}
        self.lots: dict[str, list[ModelCredit]] = {}
        self.paid: dict[str, int] = {}
        """What the credits of a budget have paid; below zero if more was given back than they paid."""
        self.granted: dict[str, int] = {}
        self.raised: set[tuple[str, int]] = set()
        self.events: list[ModelEvent] = []
        self.calls: dict[str, ModelCall] = {}
        self.budgets: dict[str, ModelBudget] = {}
        self.caps: dict[str, int] = {}
        self.credits: dict[tuple[str, str], int] = {}
        self.watermark = 0
        self.policy = 0

    @property
    def head(self) -> int:
        return len(self.events)

    @property
    def open_calls(self) -> list[str]:
        return [call_id for call_id, call in self.calls.items() if call.state == "open"]

    def budget(self, name: str) -> ModelBudget:
        return self.budgets.setdefault(name, ModelBudget())

    def reserve(
        self,
        call_id: str,
        *,
        user: str,
        period: str,
        content: str,
        amount: int,
        worker: str,
        budgets: Budgets,
        baselines: Sequence[ModelBaseline],
        is_final: bool = False,
        is_trial: bool = False,
        policy: int = 0,
        plan: str = "trial",
    ) -> Answer:
        call = self.calls.get(call_id)
        if call is not None and call.content != content:
            return ("CONFLICT",)
        if call is not None and call.state == "open":
            progress = (*self._progress(call), call.budgets, call.period, *call.generation)
            return ("OPEN", call.hold, call.amount, call.worker, *progress)
        if call is not None and call.state != "closed":
            return ("FINISHED", call.state, call.result, call.denial)
        if policy != self.policy:
            return ("POLICY", self.policy)
        names = [name for name, _ in budgets]
        if refusal := self._refuse(names, baselines):
            return refusal
        caps = self._caps(user, period, budgets)
        obstacle = self._obstacle(names, caps, amount)
        if obstacle is not None and is_trial:
            return ("WAIT", *obstacle[1:])
        if obstacle is not None and obstacle[0] == "WAIT" and not is_final:
            return obstacle
        call = call or ModelCall(content, user, period, worker)
        self.calls[call_id] = call
        attempt = max(call.recorded, call.begun) + 1
        own = self.budget(names[0])
        if obstacle is not None:
            _, budget, settled, held, cap = obstacle
            reason = "cap" if obstacle[0] == "DENIED" else "wait_timeout"
            stamps = {
                "budget": budget, "cap_nanousd": cap, "settled_nanousd": settled, "held_nanousd": held,
                "reason": reason,
            }  # fmt: skip
            self._append("budget-denied", call, call_id, attempt, amount, own.committed, stamps, period)
            if reason == "cap":
                self._raise_at_cap(budget, cap, settled, call_id, plan=self.plans.get(user, plan))
            call.state = "denied"
            call.denial = ("DENIED", budget, settled, held, cap, amount, reason)
            return call.denial
        call.state, call.hold, call.amount, call.worker, call.period = "open", call.hold + 1, amount, worker, period
        call.begun, call.spent, call.assumed, call.budgets = attempt, 0, 0, tuple(names)
        call.places[call.hold] = (period, call.budgets)
        # A plan is kept only if the policy has alerts.
        has_alerts = self.rules_of(self.policy) != AlertRules()
        call.cap, call.plan = caps[0], self.plans.get(user, plan) if has_alerts else "-"
        self._hold_more(call, call_id, attempt, amount, caps)
        return ("OK", call.hold, attempt, amount, own.committed, caps[0])

    def record(
        self,
        call_id: str,
        *,
        hold: int,
        begun: int,
        spent: int,
        assumed: int,
        events: Sequence[tuple[str, int]],
        budgets: Budgets,
        baselines: Sequence[ModelBaseline],
        extension: int = 0,
        policy: int = 0,
    ) -> Answer:
        names = [name for name, _ in budgets]
        call = self.calls.get(call_id)
        if refusal := self._no_open_hold(call, hold, names):
            return refusal if refusal[0] == "MISMATCH" else ("UNKNOWN",)
        assert call is not None
        if begun < call.begun or spent < call.spent:
            return ("OK", call.amount)
        if extension and policy != self.policy:
            return ("POLICY", self.policy)
        extends = extension > 0 and begun not in call.extended
        if extends and (refusal := self._refuse(names, baselines)):
            return refusal
        caps = self._caps(call.user, call.period, budgets)
        obstacle = self._obstacle(names, caps, extension) if extends else None
        self._record_events(call, call_id, events, hold)
        call.spent, call.assumed = spent, assumed
        if obstacle is not None:
            return (*obstacle, extension, "cap") if obstacle[0] == "DENIED" else obstacle
        if extends:
            call.extended.add(begun)
            call.amount += extension
            self._hold_more(call, call_id, begun, extension, caps)
        call.begun = begun
        return ("OK", call.amount)

    def note(self, call_id: str, *, hold: int, attempt: int, provider: str, generation_id: str) -> Answer:
        call = self.calls.get(call_id)
        if refusal := self._no_open_hold(call, hold, call.budgets if call else ()):
            return ("UNKNOWN",) if refusal[0] == "SETTLED" else refusal
        assert call is not None
        if attempt == call.begun:
            call.noted = (attempt, provider, generation_id)
        return ("OK",)

    def settle(
        self,
        call_id: str,
        *,
        hold: int,
        cost: int,
        assumed: int,
        attempt: int,
        is_final: bool,
        budgets: Sequence[str],
        result: str = "",
        events: Sequence[tuple[str, int]] = (),
        baselines: Sequence[ModelBaseline] = (),
    ) -> Answer:
        call = self.calls.get(call_id)
        if refusal := self._no_open_hold(call, hold, budgets):
            return ("OK AGAIN",) if refusal == ("SETTLED", cost, assumed) else refusal
        if refusal := self._unknown_balance(budgets, baselines):
            return refusal
        assert call is not None
        self._record_events(call, call_id, events, hold)
        freed = cost - call.amount
        stamps: dict[str, Any] = {"hold": hold, "hold_nanousd": call.amount}
        if freed > 0:
            stamps["overage_nanousd"] = freed
        self._move(call.budgets, cost, -call.amount)
        committed = self.budget(budgets[0]).committed
        self._append(
            "cost-recorded", call, call_id, attempt, cost, committed, stamps | self._stamp_budgets(budgets, None)
        )
        self._raise_reached(budgets, call_id, call)
        call.state = "settled" if is_final else "closed"
        call.noted = None
        call.settled[hold] = (cost, assumed)
        call.result = result or call.result
        return ("OK", committed)

    def adjust(
        self,
        call_id: str,
        *,
        hold: int,
        cost: int,
        assumed: int,
        attempt: int,
        budgets: Sequence[str],
        result: str = "",
        events: Sequence[tuple[str, int]] = (),
        ends_call: bool = False,
        baselines: Sequence[ModelBaseline] = (),
    ) -> Answer:
        call = self.calls.get(call_id)
        if call is None or hold not in call.settled:
            return ("UNKNOWN",)
        period, true_budgets = call.places[hold]
        if tuple(budgets) != true_budgets:
            return ("MISMATCH", true_budgets)
        if refusal := self._unknown_balance(budgets, baselines):
            return refusal
        self._record_events(call, call_id, events, hold)
        ends = (ends_call or result) and call.state == "closed" and call.hold == hold
        if ends:
            call.state, call.result = "settled", result or call.result
        was_cost, was_assumed = call.settled[hold]
        difference, less_assumed = cost - was_cost, assumed - was_assumed
        if difference or less_assumed or (ends and ends_call):
            self._move(budgets, difference, 0)
            stamps = {"hold": hold, "assumed_nanousd": less_assumed} | self._stamp_budgets(budgets, None)
            committed = self.budget(budgets[0]).committed
            self._append("cost-adjusted", call, call_id, attempt, difference, committed, stamps, period)
            if difference > 0:
                self._raise_reached(budgets, call_id, call if period == call.period else None)
            call.settled[hold] = (cost, assumed)
        return ("OK", difference, call.state == "settled")

    def charge(
        self,
        call_id: str,
        *,
        user: str,
        period: str,
        content: str,
        cost: int,
        assumed: int,
        budgets: Sequence[str],
        baselines: Sequence[ModelBaseline],
        policy: int | None = None,
        cap: int = 0,
    ) -> Answer:
        if call_id in self.calls:
            return ("NEW", False) if self.calls[call_id].content == content else ("CONFLICT",)
        if policy not in (None, self.policy):
            return ("POLICY", self.policy)
        if refusal := self._refuse(budgets, baselines):
            return refusal
        call = self.calls[call_id] = ModelCall(content, user, period, "-", state="settled", budgets=tuple(budgets))
        call.settled[0], call.places[0] = (cost, assumed), (period, tuple(budgets))
        call.cap = self._caps(user, period, [(budgets[0], cap)])[0]
        if self.rules_of(self.policy) != AlertRules() and (cap or user in self.plans):
            call.plan = self.plans.get(user, "trial")
        self._move(budgets, cost, 0)
        stamps = self._stamp_budgets(budgets, None)
        self._append("cost-recorded", call, call_id, 0, cost, self.budget(budgets[0]).committed, stamps)
        self._raise_reached(budgets, call_id, call)
        return ("NEW", True)

    def assign(
        self, command_id: str, *, user: str, period: str, content: str, kind: str, amount: int, budget: str
    ) -> Answer:
        if command_id in self.calls:
            return ("NEW", False) if self.calls[command_id].content == content else ("CONFLICT",)
        is_credit = kind == "credit-granted"
        command = self.calls[command_id] = ModelCall(content, user, period, "-", state="settled")
        own = self.budget(budget)
        committed = own.committed if own.tail else None
        self._append(kind, command, command_id, 0, amount if is_credit else 0, committed, {})
        if is_credit:
            self.credits[user, period] = self.credits.get((user, period), 0) + amount
        else:
            self.caps[user], self.plans[user] = amount, "growth"
        return ("NEW", True)

    def change_credit(
        self,
        command_id: str,
        *,
        content: str,
        kind: str,
        credit_id: str,
        amount: int,
        expires: int,
        budget: tuple[str, int],
        baseline: ModelBaseline,
        is_due: bool = True,
        policy: int = 0,
    ) -> Answer:
        """Grant, revoke or expire a credit. An expiry leaves what open holds may need.

        Before that, the credits pay what was spent since they last changed; a refusal changes nothing.
        """
        if command_id in self.calls:
            return ("CREDIT", False, 0) if self.calls[command_id].content == content else ("CONFLICT",)
        if policy != self.policy:
            return ("POLICY", self.policy)
        if kind == "credit-expired" and not is_due:
            return ("EARLY",)
        name, cap = budget
        if refusal := self._refuse([name], [baseline]):
            return refusal
        lots, paid = self._pay(name, cap)
        found = next((lot for lot in lots if lot.credit_id == credit_id), None)
        balance = self.budget(name)
        change = 0
        if kind == "credit-granted":
            change = amount
            lots.append(ModelCredit(credit_id, amount, amount, expires))
            lots.sort(key=lambda lot: lot.expires or MAX_NANOUSD)
        elif kind == "credit-revoked":
            left = found.left if found else 0
            if amount > left or not left:
                return ("LESS", left)
            change = -(amount or left)
        elif found is not None:
            held = max(0, balance.committed - cap) - max(0, balance.settled - cap)
            change = -max(0, found.left - held)
        if found is not None and kind != "credit-granted":
            found.left, found.amount = found.left + change, found.amount + change
            if not found.left:
                lots.remove(found)
        self.granted[name] = self.granted.get(name, 0) + change
        self.lots[name], self.paid[name] = lots, paid
        command = self.calls[command_id] = ModelCall(content, "", "", "-", state="settled")
        stamps = {
            "budget": name, "cap_nanousd": cap, "settled_nanousd": balance.settled, "held_nanousd": balance.held
        }  # fmt: skip
        self._append(kind, command, command_id, 0, change, None, stamps)
        return ("CREDIT", True, change)

    def _pay(self, name: str, cap: int) -> tuple[list[ModelCredit], int]:
        """Let credits pay what is spent beyond the cap, nano-dollar by nano-dollar, in the order of their expiry."""
        spent, paid = max(0, self.budget(name).settled - cap), self.paid.get(name, 0)
        lots = [replace(lot) for lot in self.lots.get(name, [])]
        while paid < spent and (lot := next((lot for lot in lots if lot.left), None)):
            lot.left, paid = lot.left - 1, paid + 1
        while paid > spent and (lot := next((lot for lot in reversed(lots) if lot.left < lot.amount), None)):
            lot.left, paid = lot.left + 1, paid - 1
        return lots, paid

    def apply_policy(
        self, *, in_force: int, version: int, openings: Sequence[tuple[str, int, int]] = (), counted: int | None = None,
        held: Sequence[str] = (),
    ) -> Answer:  # fmt: skip
        """Put a version in force, only if `in_force` is the current one.

        `openings` are (budget, spent, cap), counted up to event number `counted`. `held` are open calls: from then on
        their holds count in these budgets too.
        """
        if version == self.policy:
            return ("NEW", False)
        if in_force != self.policy or version < self.policy:
            return ("POLICY", self.policy)
        if counted not in (None, self.head):
            return ("BEHIND", self.head)
        self.policy = version
        self.events.append(ModelEvent("policy-applied", "", "", "", 0, 0, None, {}))
        for name, spent, cap in openings:
            calls = {call_id: self.calls[call_id] for call_id in held}
            amount = sum(call.amount for call in calls.values())
            self._move([name], spent, amount)
            stamps: dict[str, Any] = {
                "budgets": [{"budget": name, "cap_nanousd": cap, "committed_nanousd": spent + amount}]
            }
            if calls:
                stamps["hold_nanousd"] = amount
                stamps["holds"] = [
                    {"call_id": call_id, "hold": call.hold, "amount_nanousd": call.amount}
                    for call_id, call in calls.items()
                ]
            for call in calls.values():
                call.budgets = (*call.budgets, name)
                call.places[call.hold] = (call.period, call.budgets)
            self.events.append(ModelEvent("budget-opened", "", "", "", 0, spent, None, stamps))
        return ("NEW", True)

    def balance(
        self, *, user: str, period: str, budgets: Budgets, baselines: Sequence[ModelBaseline], policy: int = 0
    ) -> Answer:
        if policy != self.policy:
            return ("POLICY", self.policy)
        names = [name for name, _ in budgets]
        if refusal := self._refuse(names, baselines):
            return refusal
        caps = self._caps(user, period, budgets)
        held = [self.budget(name) for name in names]
        return ("OK", *((budget.settled, budget.held, cap) for budget, cap in zip(held, caps, strict=True)))

    def trim(self, watermark: int, names: Sequence[str]) -> Answer:
        """Drop every entry at or below the watermark, except the newest one of a budget with open holds."""
        self.watermark = max(self.watermark, watermark)
        dropped = 0
        for name in names:
            budget = self.budget(name)
            kept = [seq for seq in budget.tail if seq > watermark]
            if not kept and budget.held:
                kept = budget.tail[-1:]
            dropped += len(budget.tail) - len(kept)
            budget.tail = kept
        return ("OK", dropped)

    def _progress(self, call: ModelCall) -> tuple[int, int, int, int]:
        return call.recorded, call.begun, call.spent, call.assumed

    def _caps(self, user: str, period: str, budgets: Budgets) -> list[int]:
        caps = [cap for _, cap in budgets]
        caps[0] = min(self.caps.get(user, caps[0]) + self.credits.get((user, period), 0), MAX_NANOUSD)
        return [min(cap + self.granted.get(name, 0), MAX_NANOUSD) for (name, _), cap in zip(budgets, caps, strict=True)]

    def _raise_reached(self, names: Sequence[str], call_id: str, call: ModelCall | None) -> None:
        """Raise the alerts that settled spend has reached; the user's own budget has the cap of its latest hold."""
        rules = self.rules_of(self.policy)
        for index, name in enumerate(names):
            if index == 0:
                cap, fractions = (call.cap, rules.plans.get(call.plan, ())) if call else (0, ())
            else:
                cap, fractions = rules.budgets.get(name.split(":")[0], (0, ()))
                cap += self.granted.get(name, 0)
            for fraction in fractions:
                if cap and 100 * self.budget(name).settled >= fraction * cap:
                    self._raise(name, fraction, cap, call_id)

    def _raise_at_cap(self, name: str, cap: int, settled: int, call_id: str, *, plan: str) -> None:
        """Raise the alerts of a budget that refuses: those that are reached, and always that of the whole cap."""
        rules = self.rules_of(self.policy)
        kind = name.split(":")[0]
        fractions = rules.plans.get(plan, ()) if kind == "user" else rules.budgets.get(kind, (0, ()))[1]
        for fraction in fractions:
            if fraction == 100 or (cap and 100 * settled >= fraction * cap):
                self._raise(name, fraction, cap, call_id)

    def _raise(self, name: str, fraction: int, cap: int, call_id: str) -> None:
        if (name, fraction) not in self.raised:
            self.raised.add((name, fraction))
            stamps = {
                "budget": name, "cap_nanousd": cap, "settled_nanousd": self.budget(name).settled,
                "fraction": f"{fraction / 100:g}", "cause": call_id,
            }  # fmt: skip
            self.events.append(ModelEvent("alert-raised", "", "", "", 0, 0, None, stamps))

    def _obstacle(self, names: Sequence[str], caps: Sequence[int], amount: int) -> Answer | None:
        """The first budget whose settled spend leaves no room for the amount, else the first whose holds do (G9)."""
        if not amount:
            return None
        weighed = [(self.budget(name), name, cap) for name, cap in zip(names, caps, strict=True)]
        for budget, name, cap in weighed:
            if budget.settled + amount > cap:
                return ("DENIED", name, budget.settled, budget.held, cap)
        for budget, name, cap in weighed:
            if budget.committed + amount > cap:
                return ("WAIT", name, budget.settled, budget.held, cap)
        return None

    def _refuse(self, names: Sequence[str], baselines: Sequence[ModelBaseline]) -> Answer | None:
        for name, baseline in zip(names, baselines, strict=True):
            budget = self.budget(name)
            if baseline.seq > self.head:
                return ("AHEAD",)
            if baseline.seq < self.watermark:
                return ("STALE",)
            if budget.tail and (baseline.settled, baseline.held) != budget.at(baseline.seq):
                return ("DIVERGED", name)
        return None

    def _unknown_balance(self, names: Sequence[str], baselines: Sequence[ModelBaseline]) -> Answer | None:
        """Refuse if the balance is unknown: a tail has it, but if the tail is empty, a baseline is needed."""
        for index, name in enumerate(names):
            if not self.budget(name).tail:
                if not baselines:
                    return ("STALE",)
                if refusal := self._refuse([name], [baselines[index]]):
                    return refusal
        return None

    def _no_open_hold(self, call: ModelCall | None, hold: int, names: Sequence[str]) -> Answer | None:
        if call is None:
            return ("UNKNOWN",)
        if hold in call.settled:
            return ("SETTLED", *call.settled[hold])
        if call.state != "open" or call.hold != hold:
            return ("UNKNOWN",)
        if tuple(names) != call.budgets:
            return ("MISMATCH", call.budgets)
        return None

    def _record_events(self, call: ModelCall, call_id: str, events: Sequence[tuple[str, int]], hold: int) -> None:
        period, budgets = call.places[hold]
        for kind, attempt in events:
            if (kind, attempt) in call.recorded_events:
                continue
            call.recorded_events.add((kind, attempt))
            self._append(kind, call, call_id, attempt, 0, self.budget(budgets[0]).committed, {}, period)
            if kind == "model-called":
                call.recorded = max(call.recorded, attempt)

    def _hold_more(self, call: ModelCall, call_id: str, attempt: int, amount: int, caps: Sequence[int]) -> None:
        self._move(call.budgets, 0, amount)
        stamps = {"hold": call.hold, "cap_nanousd": caps[0]} | self._stamp_budgets(call.budgets, caps)
        committed = self.budget(call.budgets[0]).committed
        self._append("budget-reserved", call, call_id, attempt, amount, committed, stamps)

    def _stamp_budgets(self, names: Sequence[str], caps: Sequence[int] | None) -> dict[str, Any]:
        further = [
            {
                "budget": name,
                **({"cap_nanousd": caps[index]} if caps else {}),
                "committed_nanousd": self.budget(name).committed,
            }
            for index, name in enumerate(names)
            if index > 0
        ]
        return {"budgets": further} if further else {}

    def _move(self, names: Sequence[str], settled: int, held: int) -> None:
        """Move money, as part of the event that is appended next."""
        for name in names:
            budget = self.budget(name)
            budget.settled += settled
            budget.held += held
            budget.tail.append(self.head + 1)
            budget.moves.append((self.head + 1, budget.settled, budget.held))

    def _append(
        self,
        kind: str,
        call: ModelCall,
        call_id: str,
        attempt: int,
        amount: int,
        committed: int | None,
        stamps: dict[str, Any],
        period: str | None = None,
    ) -> None:
        event = ModelEvent(kind, call.user, period or call.period, call_id, attempt, amount, committed, stamps)
        self.events.append(event)
