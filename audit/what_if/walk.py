"""The walk of a what-if over the ledger: each event in order, each decision made again by the gate's rules.

If nothing that a decision depends on differs from what was recorded, the recorded decision is kept.
So without alternatives, the outcome is always the recorded one.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

import pyarrow as pa

from tollbook.audit.what_if.alternatives import (
    Alternatives,
    BoundTokens,
    PriceOf,
    RecordedCaps,
    Repricing,
    charge_at,
)
from tollbook.audit.what_if.budgets import Budgets, Caps, Choice, Hold
from tollbook.audit.what_if.decisions import Decisions
from tollbook.audit.what_if.totals import Account, Outcome, Totals
from tollbook.inference.budgets import BudgetPolicy
from tollbook.inference.errors import PriceUnknown
from tollbook.inference.opening_balances import attributes_of
from tollbook.inference.prices.model_price import ModelPrice
from tollbook.ledger.projection.fold import LedgerGap
from tollbook.schemas.identifiers import budget_name, rule_name, split_budget_name
from tollbook.schemas.money import MAX_NANOUSD
from tollbook.schemas.policy import Policy, default_policy
from tollbook.schemas.routes import DEFAULT_PROVIDER, Target
from tollbook.schemas.upcasters import UnreadableEvent

NO_PLAN: Final = "-"
"""Stands for the plan of spend that was recorded without one."""

# Before a ledger had a policy, these two budgets could be set beside the users'. Only their names matter here.
_EARLIER: Final = default_policy(
    {
        "budgets": [
            {"name": "day", "by": ["user"], "window": "day", "cap_usd": 0},
            {"name": "campaign", "by": ["campaign"], "window": "month", "cap_usd": 0},
        ]
    }
)
_COLUMNS: Final = ("id", "ms", "type", "user_id", "period", "call_id", "attempt", "amount", "payload")
# They add nothing about money to the other events.
_SKIPPED: Final = (
    "fallback-used", "segment-sealed", "ledger-recovered", "alert-raised", "key-created", "key-revoked",
)  # fmt: skip


@dataclass(slots=True)
class _Event:
    id: str
    ms: int
    type: str
    user_id: str
    period: str
    call_id: str
    attempt: int
    amount: int
    payload: Mapping[str, Any]

    @property
    def hold(self) -> int:
        return int(self.payload.get("hold", 0))

    @property
    def key(self) -> tuple[str, int]:
        return self.call_id, self.hold

    @property
    def account_budget(self) -> str:
        return budget_name("user", self.user_id, self.period)

    @property
    def budgets(self) -> list[str]:
        return [self.account_budget, *(stamp["budget"] for stamp in self.payload.get("budgets", ()))]


class WhatIf:
    """Takes a ledger's events, in order within each partition, and returns what would have been."""

    def __init__(
        self,
        alternatives: Alternatives,
        price_of: PriceOf,
        *,
        recorded_caps: RecordedCaps | None = None,
        hold_wait_ms: int = 600_000,
        kept_refusals: int = 10,
    ) -> None:
        self._outcome = Outcome(kept_refusals=kept_refusals)
        self._alternatives = alternatives
        self._repricing = Repricing(alternatives, price_of)
        self._recorded_caps = recorded_caps or RecordedCaps()
        self._hold_wait_ms = hold_wait_ms
        self._partitions: dict[int, _Partition] = {}

    def fold(self, events: pa.Table, partition: int = 0) -> None:
        """Take the next table of envelope columns. Errors: PriceUnknown; LedgerGap; UnreadableEvent."""
        walk = self._partitions.get(partition)
        if walk is None:
            caps = Caps(self._alternatives, self._recorded_caps)
            walk = _Partition(self._alternatives, caps, self._repricing, self._outcome, self._hold_wait_ms)
            self._partitions[partition] = walk
        if events.num_rows:
            first = cast("int", events["seq"][0].as_py())
            if first != walk.seq + 1:
                raise LedgerGap(partition=partition, folded_seq=walk.seq, next_seq=first)
            walk.seq = cast("int", events["seq"][-1].as_py())
        columns = [cast("list[Any]", events[name].to_pylist()) for name in _COLUMNS]
        for entry_id, ms, kind, user_id, period, call_id, attempt, amount, payload in zip(*columns, strict=True):
            if kind not in _SKIPPED:
                if kind not in walk.handlers:
                    raise UnreadableEvent(entry_id, f"its type {kind!r} is unknown")
                document = json.loads(payload)
                walk.apply(_Event(entry_id, ms, kind, user_id, period, call_id, attempt, amount, document))
        self._outcome.events += events.num_rows

    def finish(self) -> Outcome:
        """Return the outcome; calls that still wait are counted as such."""
        for walk in self._partitions.values():
            walk.count_waiting()
        return self._outcome


class _Partition:
    """One partition's budgets and calls."""

    def __init__(
        self, alternatives: Alternatives, caps: Caps, repricing: Repricing, outcome: Outcome, hold_wait_ms: int
    ) -> None:
        self.seq = 0
        self._caps = caps
        self._budgets = Budgets(caps)
        self._decisions = Decisions(self._budgets, outcome, hold_wait_ms)
        self._repricing = repricing
        self._outcome = outcome
        # By call and period, the plan of its last hold: what is booked later counts there, whatever plan its user is on
        # by then. So does what was booked before, of calls that are not over.
        self._plans: dict[tuple[str, str], str] = {}
        self._unfinished: dict[tuple[str, str], Totals] = {}
        self._policy = BudgetPolicy(_EARLIER)
        self._has_changes = bool(alternatives)
        self._changed_budgets = alternatives.policy if alternatives.changes_budgets else None
        self._other: BudgetPolicy | None = None
        """The further budgets that there would be, where others than the recorded ones."""
        # With others: those of each hold and charge.
        self._places: dict[tuple[str, int], tuple[str, ...]] = {}
        self._set_other({})
        self.handlers = {
            "budget-reserved": self._reserved,
            "model-called": self._called,
            "cost-recorded": self._recorded,
            "cost-adjusted": self._adjusted,
            "budget-denied": self._denied,
            "plan-assigned": self._assigned,
            "plan-cleared": self._cleared,
            "credit-granted": self._credited,
            "credit-revoked": self._credited,
            "credit-expired": self._credited,
            "policy-applied": self._policy_applied,
            "budget-opened": self._opened,
        }

    def apply(self, event: _Event) -> None:
        """Apply the next event."""
        self._decisions.end_waits(event.ms)
        self.handlers[event.type](event)
        self._move_recorded(event)
        self._decisions.wake()

    def count_waiting(self) -> None:
        """Count the calls that still wait."""
        self._decisions.count_waiting()

    def _reserved(self, event: _Event) -> None:
        payload = event.payload
        account = self._account_of(event)
        further = [stamp.get("cap_nanousd", 0) for stamp in payload.get("budgets", ())]
        self._caps.further.update(zip(event.budgets[1:], further, strict=True))
        own_cap = self._caps.without_credit(account, payload.get("cap_nanousd", 0))
        budgets = tuple(zip(event.budgets, (own_cap, *further), strict=True))
        if payload.get("kind") == "extension":
            self._extended(event, budgets)
            return
        if event.hold == 1:
            self._outcome.of(account).calls += 1
        if self._is_refused(event):
            return
        hold = self._new_hold(event, account, budgets, is_made=True)
        self._decisions.open[event.key] = hold
        self._decisions.ask(hold, recorded="fits")

    def _extended(self, event: _Event, budgets: tuple[tuple[str, int], ...]) -> None:
        hold = self._decisions.open.get(event.key)
        if hold is None or hold.is_cut(event.attempt) or self._is_dropped(hold, event):
            return
        # The caps may have changed since the hold was made.
        hold.budgets = budgets if self._other is None else (budgets[0], *hold.budgets[1:])
        price = self._price(hold, _asked(event.payload["bound"]), event.ms)
        extension = event.amount
        if price is not None or hold.is_changed:
            bound = hold.next_bound(event.amount) if price is None else hold.tokens.cost_at_most(price)
            extension = max(0, hold.other_charged + bound - hold.other_amount)
        self._decisions.extend(hold, extension, event.attempt, recorded=event.amount)
        hold.amount += event.amount

    def _called(self, event: _Event) -> None:
        hold = self._decisions.open.get(event.key) or self._decisions.settled.get(event.key)
        if hold is None:
            return
        payload, charge = event.payload, event.payload.get("charge_nanousd", 0)
        price = self._price(hold, _asked(payload), event.ms)
        is_left_out = hold.is_cut(event.attempt) or self._is_dropped(hold, event)
        if price is not None and not is_left_out and not hold.is_ended:
            missing = hold.other_charged + hold.tokens.cost_at_most(price) - hold.other_amount
            self._decisions.extend(hold, max(0, missing), event.attempt)
            is_left_out = hold.is_cut(event.attempt)
        hold.charged += charge
        if not is_left_out:
            hold.other_charged += (
                charge if price is None else self._recharge(hold.account, price, payload, hold.tokens, charge)
            )

    def _recorded(self, event: _Event) -> None:
        hold = self._decisions.open.get(event.key)
        account = self._account_of(event)
        self._outcome.of(account).spent_nanousd += event.amount
        if hold is None:
            if not self._is_refused(event):
                self._charge(event, account)
        else:
            hold.booked, hold.is_ended, hold.account = event.amount, True, account
            if event.payload.get("assumed_nanousd"):
                self._decisions.settled[event.key] = hold
            if not hold.is_waiting:
                self._decisions.settle(hold)
        self._note_unfinished(event, hold)

    def _note_unfinished(self, event: _Event, hold: Hold | None) -> None:
        """Keep what a call that is not over has cost so far: its next hold may be on another plan."""
        key = (event.call_id, event.period)
        if event.payload.get("is_final", True):
            self._unfinished.pop(key, None)
            return
        sums = self._unfinished.setdefault(key, Totals(calls=int(event.hold == 1)))
        sums.spent_nanousd += event.amount
        if hold is not None and not hold.is_waiting and not self._is_refused(event):
            sums.other_spent_nanousd += hold.other_booked
            sums.other_calls += event.hold == 1

    def _charge(self, event: _Event, account: Account) -> None:
        """Book spend without a hold; it is recorded even if it passes the cap."""
        cost, payload = event.amount, event.payload
        price = self._repricing.price(_asked(payload), event.ms) if payload.get("model") else None
        if price is not None:
            cost = self._recharge(account, price, payload, None, cost)
        self._outcome.of(account).other_spent_nanousd += cost
        names = event.budgets
        if self._other is not None:
            further = self._other.further_at(event.ms, attributes_of(event.user_id, payload))
            names = [event.account_budget, *(budget.name for budget in further)]
            self._places[event.key] = tuple(names)
        self._budgets.move(names, settled=cost)

    def _adjusted(self, event: _Event) -> None:
        hold = self._decisions.open.get(event.key) or self._decisions.settled.get(event.key)
        account = self._account_of(event)
        unfinished = self._unfinished.get((event.call_id, event.period), Totals())
        self._outcome.of(account).spent_nanousd += event.amount
        unfinished.spent_nanousd += event.amount
        if self._is_refused(event):
            return
        difference = event.amount
        if hold is not None:
            hold.booked, hold.account = hold.booked + event.amount, account
            if hold.is_waiting:
                return
            before, hold.other_booked = hold.other_booked, hold.other_cost()
            difference = hold.other_booked - before
        unfinished.other_spent_nanousd += difference
        self._decisions.book(account, [*self._places.get(event.key, event.budgets)], difference)

    def _denied(self, event: _Event) -> None:
        account, payload = self._account_of(event), event.payload
        self._outcome.of(account).refused += 1
        if self._is_refused(event):
            return
        own, refusing, cap = event.account_budget, payload["budget"], payload["cap_nanousd"]
        own_cap = self._caps.without_credit(account, cap) if refusing == own else self._caps.recorded(account)
        # The event names no other budget; the call would have been held against those of the policy then.
        attributes = attributes_of(event.user_id, payload)
        further = [budget.name for budget in self._policy.further_at(event.ms, attributes)]
        caps = {name: self._caps.further[name] for name in further if name in self._caps.further}
        caps = {own: own_cap, **caps, refusing: own_cap if refusing == own else cap}
        hold = self._new_hold(event, account, tuple(caps.items()), is_made=False)
        self._decisions.ask(hold, recorded="denied", is_final=payload["reason"] == "wait_timeout")

    def _assigned(self, event: _Event) -> None:
        self._caps.assign(event.user_id, event.payload["plan"], event.payload["cap_nanousd"])

    def _cleared(self, event: _Event) -> None:
        self._caps.clear(event.user_id)

    def _credited(self, event: _Event) -> None:
        budget = event.payload.get("budget")
        if budget is None:
            self._caps.grant(event.user_id, event.period, event.amount)
            return
        name, value, _ = split_budget_name(budget)
        self._caps.further_credits[rule_name(name), value] += event.amount
        if budget in self._caps.further:
            self._caps.further[budget] += event.amount

    def _policy_applied(self, event: _Event) -> None:
        policy = Policy.model_validate(event.payload["content"])
        definitions = event.payload.get("definitions", {})
        self._policy = BudgetPolicy(policy, definitions)
        self._set_other(definitions)
        users = {user: policy.user_cap_nanousd(user, policy.default_plan) for user in policy.users}
        self._caps.settings = RecordedCaps(plans=policy.plan_caps_nanousd, users=users)

    def _set_other(self, definitions: Mapping[str, int]) -> None:
        """Take over the names of budgets that the other policy keeps as the one in force here does."""
        if self._changed_budgets is None:
            return
        known = {rule.name: (rule.by, rule.window) for rule in self._policy.policy.budgets}
        kept = {
            rule.name: definitions[rule.name]
            for rule in self._changed_budgets.budgets
            if rule.name in definitions and known.get(rule.name) == (rule.by, rule.window)
        }
        self._other = BudgetPolicy(self._changed_budgets, kept)

    def _against(self, event: _Event, recorded: tuple[tuple[str, int], ...]) -> tuple[tuple[str, int], ...]:
        """Return the budgets of a hold or refusal, with caps: the recorded ones, or those of the other policy."""
        if self._other is None:
            return recorded
        caps, rules = dict(recorded), {rule.name: rule for rule in self._policy.policy.budgets}
        others = {rule.name: rule for rule in self._other.policy.budgets}
        against = [recorded[0]]
        for budget in self._other.further_at(event.ms, attributes_of(event.user_id, event.payload)):
            name, value, _ = split_budget_name(budget.name)
            rule = rule_name(name)
            if budget.name in caps and rules.get(rule) == others[rule]:
                against.append((budget.name, caps[budget.name]))
            else:
                cap = budget.cap_nanousd + self._caps.further_credits[rule, value]
                against.append((budget.name, min(cap, MAX_NANOUSD)))
        return tuple(against)

    def _opened(self, event: _Event) -> None:
        for stamp in event.payload["budgets"]:
            if self._other is None:  # Otherwise it has been kept from the start.
                self._budgets.move([stamp["budget"]], settled=event.amount)
                self._take_holds(event, stamp["budget"], stamp["cap_nanousd"])
            held = event.payload.get("hold_nanousd", 0)
            self._budgets.move_recorded([stamp["budget"]], settled=event.amount, held=held)
            self._caps.further[stamp["budget"]] = stamp["cap_nanousd"]

    def _take_holds(self, event: _Event, budget: str, cap: int) -> None:
        for held in event.payload.get("holds", ()):
            hold = self._decisions.open.get((held["call_id"], held["hold"]))
            if hold is not None:
                hold.budgets = (*hold.budgets, (budget, cap))
                if not hold.is_waiting:
                    self._budgets.move([budget], held=hold.other_amount)

    def _move_recorded(self, event: _Event) -> None:
        match event.type:
            case "budget-reserved":
                self._budgets.move_recorded(event.budgets, held=event.amount)
            case "cost-recorded":
                freed = event.payload.get("hold_nanousd", 0)
                self._budgets.move_recorded(event.budgets, settled=event.amount, held=-freed)
            case "cost-adjusted":
                self._budgets.move_recorded(event.budgets, settled=event.amount)
            case _:
                pass

    def _new_hold(
        self, event: _Event, account: Account, budgets: tuple[tuple[str, int], ...], *, is_made: bool
    ) -> Hold:
        payload, bound = event.payload, event.payload["bound"]
        tokens = BoundTokens(bound["prompt_tokens"], bound["completion_tokens"])
        price = self._first_price(event)
        against = self._against(event, budgets)
        if self._other is not None:
            self._places[event.call_id, event.hold] = tuple(name for name, _ in against)
        return Hold(
            entry_id=event.id,
            ms=event.ms,
            account=account,
            call_id=event.call_id,
            number=event.hold,
            task_type=payload["task_type"],
            model=bound["model"],
            tokens=tokens,
            budgets=against,
            amount=event.amount,
            other_amount=event.amount if price is None else tokens.cost_at_most(price),
            is_made=is_made,
            first_price=price,
            choices=self._choices(event, tokens, price),
            is_moved=dict(against) != dict(budgets),
            targets=[_asked(bound)],
        )

    def _first_price(self, event: _Event) -> ModelPrice | None:
        """Return the changed price of the model that a hold or refusal is bounded by."""
        payload, model = event.payload, _asked(event.payload["bound"])
        route = self._repricing.route(payload["task_type"])
        if not payload.get("downgraded_from"):
            return self._repricing.price(model, event.ms, task_type=payload["task_type"])
        provider = route.cheaper_provider if route.cheaper else None
        return self._repricing.price_instead(model, route.cheaper or model.model, event.ms, provider=provider)

    def _choices(self, event: _Event, tokens: BoundTokens, price: ModelPrice | None) -> tuple[Choice, ...]:
        """Return the models that a call could try first, in order, if its route has a cheaper model.

        A task that names its own model has none; the ledger shows that by a model that its route did not have.
        """
        payload, recorded = event.payload, _asked(event.payload["bound"])
        route = self._repricing.route(payload["task_type"])
        in_force = self._policy.policy.tasks.get(payload["task_type"])
        first_model = payload.get("downgraded_from") or recorded.model
        if not self._has_changes or in_force is None or first_model.lower() != in_force.model.lower():
            return ()
        cheaper, cheaper_at = route.cheaper, route.cheaper_provider
        if not route.states_cheaper and in_force.cheaper_target is not None:
            cheaper, cheaper_at = in_force.cheaper_target.model, in_force.cheaper_target.provider
        own = (Choice(price, event.amount if price is None else tokens.cost_at_most(price)),)
        if payload.get("downgraded_from"):
            first_at = route.provider_at(0) if route.model else in_force.first.provider
            first = self._choice(recorded, route.model or first_model, first_at, event, tokens)
            return first if cheaper is None else first + own
        return () if cheaper is None else own + self._choice(recorded, cheaper, cheaper_at, event, tokens)

    def _choice(
        self, recorded: Target, asked: str, provider: str | None, event: _Event, tokens: BoundTokens
    ) -> tuple[Choice, ...]:
        try:
            price = self._repricing.price_instead(recorded, asked, event.ms, provider=provider)
        except PriceUnknown:
            return ()  # The gate would not have been asked for it.
        return (Choice(price, event.amount if price is None else tokens.cost_at_most(price)),)

    def _account_of(self, event: _Event) -> Account:
        """Return the account of an event: with the plan that it names, otherwise that of its call.

        A call counts on the plan of its last hold, as in the reports; what it cost before moves there.
        """
        key = (event.call_id, event.period)
        known, plan = self._plans.get(key), event.payload.get("assigned_plan") or event.payload.get("plan")
        if plan is None or plan == known:
            return Account(event.user_id, event.period, known or NO_PLAN)
        self._plans[key] = sys.intern(plan)
        account = Account(event.user_id, event.period, plan)
        if known is not None and (spent := self._unfinished.get(key)) is not None:
            self._outcome.move(spent, Account(event.user_id, event.period, known), account)
        return account

    def _is_refused(self, event: _Event) -> bool:
        return self._decisions.is_refused(event.call_id, None if event.type == "budget-denied" else event.hold)

    def _is_dropped(self, hold: Hold, event: _Event) -> bool:
        """Whether an attempt is a fallback that would not have been made; if so, the call ends before it."""
        target = _asked(event.payload["bound"] if event.type == "budget-reserved" else event.payload)
        is_dropped = self._repricing.drops_fallback(hold.task_type, hold.place_of(target))
        if is_dropped and hold.cut_from is None:
            self._decisions.cut(hold, event.attempt)
        return is_dropped

    def _price(self, hold: Hold, model: Target, at_ms: int) -> ModelPrice | None:
        place = hold.place_of(model)
        if place == 0:
            return hold.first_price
        return self._repricing.price(model, at_ms, task_type=hold.task_type, place=place)

    def _recharge(
        self, account: Account, price: ModelPrice, payload: Mapping[str, Any], tokens: BoundTokens | None, recorded: int
    ) -> int:
        basis = payload.get("charge_basis") or payload["basis"]
        charge = charge_at(price, basis=basis, usage=payload.get("usage"), tokens=tokens)
        if charge is None:
            self._outcome.of(account).not_repriced += 1
            return recorded
        return charge


def _asked(payload: Mapping[str, Any]) -> Target:
    """Return the model that a payload or a bound names, and its provider."""
    return Target(payload["model"], payload.get("provider") or DEFAULT_PROVIDER)
