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
from tollbook.audit.what_if.budgets import Budgets, Caps, Hold
from tollbook.audit.what_if.decisions import Decisions
from tollbook.audit.what_if.totals import Account, Outcome
from tollbook.inference.budgets import BudgetPolicy
from tollbook.inference.prices.model_price import ModelPrice
from tollbook.ledger.projection.fold import LedgerGap
from tollbook.schemas.identifiers import budget_name
from tollbook.schemas.policy import Policy, default_policy
from tollbook.schemas.upcasters import UnreadableEvent

NO_PLAN: Final = "-"
"""Stands for the plan of users without a plan on the ledger."""

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
_SKIPPED: Final = ("fallback-used", "segment-sealed", "ledger-recovered", "alert-raised")


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
            walk = _Partition(caps, self._repricing, self._outcome, self._hold_wait_ms)
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

    def __init__(self, caps: Caps, repricing: Repricing, outcome: Outcome, hold_wait_ms: int) -> None:
        self.seq = 0
        self._caps = caps
        self._budgets = Budgets(caps)
        self._decisions = Decisions(self._budgets, outcome, hold_wait_ms)
        self._repricing = repricing
        self._outcome = outcome
        self._plans: dict[str, str] = {}
        # The plan of each call's last hold: what is booked later counts there, whatever plan its user is on by then.
        self._plans_of_calls: dict[str, str] = {}
        self._policy = BudgetPolicy(_EARLIER)
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
        hold.budgets = budgets  # The caps may have changed since the hold was made.
        price = self._price(hold, event.payload["bound"]["model"], event.ms)
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
        price = self._price(hold, payload["model"], event.ms)
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
        account = hold.account if hold else self._account_of(event)
        self._outcome.of(account).spent_nanousd += event.amount
        if hold is None:
            if not self._is_refused(event):
                self._charge(event, account)
            return
        hold.booked, hold.is_ended = event.amount, True
        if event.payload.get("assumed_nanousd"):
            self._decisions.settled[event.key] = hold
        if not hold.is_waiting:
            self._decisions.settle(hold)

    def _charge(self, event: _Event, account: Account) -> None:
        """Book spend without a hold; it is recorded even if it passes the cap."""
        cost, payload = event.amount, event.payload
        price = self._repricing.price(payload["model"], event.ms) if payload.get("model") else None
        if price is not None:
            cost = self._recharge(account, price, payload, None, cost)
        self._outcome.of(account).other_spent_nanousd += cost
        self._budgets.move(event.budgets, settled=cost)

    def _adjusted(self, event: _Event) -> None:
        hold = self._decisions.open.get(event.key) or self._decisions.settled.get(event.key)
        account = hold.account if hold else self._account_of(event)
        self._outcome.of(account).spent_nanousd += event.amount
        if self._is_refused(event):
            return
        difference = event.amount
        if hold is not None:
            hold.booked += event.amount
            if hold.is_waiting:
                return
            before, hold.other_booked = hold.other_booked, hold.other_cost()
            difference = hold.other_booked - before
        self._decisions.book(account, event.budgets, difference)

    def _denied(self, event: _Event) -> None:
        account, payload = self._account_of(event), event.payload
        self._outcome.of(account).refused += 1
        if self._is_refused(event):
            return
        own, refusing, cap = event.account_budget, payload["budget"], payload["cap_nanousd"]
        own_cap = self._caps.without_credit(account, cap) if refusing == own else self._caps.recorded(account)
        # The event names no other budget; the call would have been held against those of the policy then.
        attributes = {
            **payload.get("tags", {}),
            "user": event.user_id,
            "plan": payload["plan"],
            "task": payload["task_type"],
            "model": payload["bound"]["model"],
            **({"campaign": payload["campaign_id"]} if payload.get("campaign_id") else {}),
        }
        further = [budget.name for budget in self._policy.further_at(event.ms, attributes)]
        caps = {name: self._caps.further[name] for name in further if name in self._caps.further}
        caps = {own: own_cap, **caps, refusing: own_cap if refusing == own else cap}
        hold = self._new_hold(event, account, tuple(caps.items()), is_made=False)
        self._decisions.ask(hold, recorded="denied", is_final=payload["reason"] == "wait_timeout")

    def _assigned(self, event: _Event) -> None:
        self._caps.assign(event.user_id, event.payload["plan"], event.payload["cap_nanousd"])
        self._plans[event.user_id] = event.payload["plan"]

    def _cleared(self, event: _Event) -> None:
        self._caps.clear(event.user_id)
        self._plans.pop(event.user_id, None)

    def _credited(self, event: _Event) -> None:
        budget = event.payload.get("budget")
        if budget is None:
            self._caps.grant(event.user_id, event.period, event.amount)
        elif budget in self._caps.further:
            self._caps.further[budget] += event.amount

    def _policy_applied(self, event: _Event) -> None:
        policy = Policy.model_validate(event.payload["content"])
        self._policy = BudgetPolicy(policy, event.payload.get("definitions", {}))
        users = {user: policy.user_cap_nanousd(user, policy.default_plan) for user in policy.users}
        self._caps.settings = RecordedCaps(plans=policy.plan_caps_nanousd, users=users)

    def _opened(self, event: _Event) -> None:
        for stamp in event.payload["budgets"]:
            self._budgets.move([stamp["budget"]], settled=event.amount)
            self._budgets.move_recorded([stamp["budget"]], settled=event.amount)
            self._caps.further[stamp["budget"]] = stamp["cap_nanousd"]

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
        price = self._repricing.price(bound["model"], event.ms, task_type=payload["task_type"])
        return Hold(
            entry_id=event.id,
            ms=event.ms,
            account=account,
            call_id=event.call_id,
            number=event.hold,
            task_type=payload["task_type"],
            model=bound["model"],
            tokens=tokens,
            budgets=budgets,
            amount=event.amount,
            other_amount=event.amount if price is None else tokens.cost_at_most(price),
            is_made=is_made,
        )

    def _account_of(self, event: _Event) -> Account:
        """Return the account of an event: with the plan that it names, otherwise that of its call."""
        plan = event.payload.get("assigned_plan") or event.payload.get("plan")
        if plan is None:
            plan = self._plans_of_calls.get(event.call_id) or self._plans.get(event.user_id, NO_PLAN)
        else:
            self._plans[event.user_id] = self._plans_of_calls[event.call_id] = sys.intern(plan)
        return Account(event.user_id, event.period, plan)

    def _is_refused(self, event: _Event) -> bool:
        return self._decisions.is_refused(event.call_id, None if event.type == "budget-denied" else event.hold)

    def _is_dropped(self, hold: Hold, event: _Event) -> bool:
        """Whether an attempt is a fallback that would not have been made; if so, the call ends before it."""
        model = event.payload["bound"]["model"] if event.type == "budget-reserved" else event.payload["model"]
        is_dropped = model != hold.model and self._repricing.drops_fallback(hold.task_type)
        if is_dropped and hold.cut_from is None:
            self._decisions.cut(hold, event.attempt)
        return is_dropped

    def _price(self, hold: Hold, model: str, at_ms: int) -> ModelPrice | None:
        return self._repricing.price(model, at_ms, task_type=hold.task_type, is_fallback=model != hold.model)

    def _recharge(
        self, account: Account, price: ModelPrice, payload: Mapping[str, Any], tokens: BoundTokens | None, recorded: int
    ) -> int:
        basis = payload.get("charge_basis") or payload["basis"]
        charge = charge_at(price, basis=basis, usage=payload.get("usage"), tokens=tokens)
        if charge is None:
            self._outcome.of(account).not_repriced += 1
            return recorded
        return charge
