"""The walk of a what-if over the ledger: every event in its order, every decision taken anew by the gate's rules.

Where nothing that a decision rests on differs from what was recorded, the recorded one stands. So
without alternatives the outcome is the recorded one, whatever the ledger holds.
"""

import json
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

import pyarrow as pa

from inference.pricing import ModelPrice
from inference.what_if.alternatives import (
    Alternatives,
    BoundTokens,
    PriceOf,
    RecordedCaps,
    Repricing,
    charge_at,
)
from inference.what_if.books import Budgets, Caps, Hold, Means, Verdict
from inference.what_if.totals import Account, Outcome, Refusal, Totals
from ledger.fold import LedgerGap
from schemas.identifiers import budget_name, day_at

NO_PLAN: Final = "-"
"""Stands for the plan of users of whom the ledger names none."""

_COLUMNS: Final = ("id", "ms", "type", "user_id", "period", "call_id", "attempt", "amount", "payload")
# They say nothing of money that other events do not say.
_SKIPPED: Final = ("fallback-used", "segment-sealed")


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
    """Takes a ledger's events, each partition's in its order, and says what would have been."""

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
        """Go on with a table of envelope columns. Errors: PriceUnknown; LedgerGap."""
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
                document = json.loads(payload)
                walk.apply(_Event(entry_id, ms, kind, user_id, period, call_id, attempt, amount, document))
        self._outcome.events += events.num_rows

    def finish(self) -> Outcome:
        """Return what it comes to; calls that still wait are counted as such."""
        for walk in self._partitions.values():
            walk.count_waiting()
        return self._outcome


class _Partition:
    """One partition's budgets and calls."""

    def __init__(self, caps: Caps, repricing: Repricing, outcome: Outcome, hold_wait_ms: int) -> None:
        self.seq = 0
        self._caps = caps
        self._budgets = Budgets(caps)
        self._repricing = repricing
        self._outcome = outcome
        self._hold_wait_ms = hold_wait_ms
        self._means = Means()
        self._plans: dict[str, str] = {}
        self._open: dict[tuple[str, int], Hold] = {}
        # Settled ones that cost something else, or that a late answer may still correct.
        self._settled: dict[tuple[str, int], Hold] = {}
        # From which of its holds on a call would not have been made.
        self._refused: dict[str, int] = {}
        self._queues: dict[str, deque[Hold]] = {}
        self._waits: deque[tuple[int, Hold]] = deque()
        self._freed: list[str] = []
        self._handlers = {
            "budget-reserved": self._reserved,
            "model-called": self._called,
            "cost-recorded": self._recorded,
            "cost-adjusted": self._adjusted,
            "budget-denied": self._denied,
            "plan-assigned": self._assigned,
            "credit-granted": self._credited,
        }

    def apply(self, event: _Event) -> None:
        """Go on with the next event."""
        if self._waits:
            self._end_waits(event.ms)
        self._handlers[event.type](event)
        self._move_recorded(event)
        self._wake()

    def count_waiting(self) -> None:
        """Count the calls of which nothing was decided."""
        for _, hold in self._waits:
            if hold.is_waiting:
                self._totals(hold).still_waiting += 1

    # --- Events

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
        self._open[event.key] = hold
        self._carry_out(hold, self._decide(hold, hold.other_amount, hold.amount, recorded="fits"))

    def _extended(self, event: _Event, budgets: tuple[tuple[str, int], ...]) -> None:
        hold = self._open.get(event.key)
        if hold is None or hold.is_cut(event.attempt) or self._is_dropped(hold, event):
            return
        hold.budgets = budgets  # The caps may have changed since the hold was made.
        price = self._price(hold, event.payload["bound"]["model"], event.ms)
        extension = event.amount
        if price is not None or hold.is_changed:
            bound = hold.next_bound(event.amount) if price is None else hold.tokens.cost_at_most(price)
            extension = max(0, hold.other_told + bound - hold.other_amount)
        self._extend(hold, extension, event.attempt, recorded=event.amount)
        hold.amount += event.amount

    def _called(self, event: _Event) -> None:
        hold = self._open.get(event.key) or self._settled.get(event.key)
        if hold is None:
            return
        payload, charge = event.payload, event.payload.get("charge_nanousd", 0)
        price = self._price(hold, payload["model"], event.ms)
        is_left_out = hold.is_cut(event.attempt) or self._is_dropped(hold, event)
        if price is not None and not is_left_out and not hold.is_ended:
            missing = hold.other_told + hold.tokens.cost_at_most(price) - hold.other_amount
            self._extend(hold, max(0, missing), event.attempt)
            is_left_out = hold.is_cut(event.attempt)
        hold.told += charge
        if not is_left_out:
            hold.other_told += (
                charge if price is None else self._recharge(hold.account, price, payload, hold.tokens, charge)
            )

    def _recorded(self, event: _Event) -> None:
        hold = self._open.get(event.key)
        account = hold.account if hold else self._account_of(event)
        self._outcome.of(account).spent_nanousd += event.amount
        if hold is None:
            if not self._is_refused(event):
                self._charge(event, account)
            return
        hold.booked, hold.is_ended = event.amount, True
        if event.payload.get("assumed_nanousd"):
            self._settled[event.key] = hold
        if not hold.is_waiting:
            self._settle(hold)

    def _charge(self, event: _Event, account: Account) -> None:
        """Book spend without a hold; it is recorded whatever the cap says."""
        cost, payload = event.amount, event.payload
        price = self._repricing.price(payload["model"], event.ms) if payload.get("model") else None
        if price is not None:
            cost = self._recharge(account, price, payload, None, cost)
        self._outcome.of(account).other_spent_nanousd += cost
        self._budgets.move(event.budgets, settled=cost)

    def _adjusted(self, event: _Event) -> None:
        hold = self._open.get(event.key) or self._settled.get(event.key)
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
        self._book(account, event.budgets, difference)

    def _denied(self, event: _Event) -> None:
        account, payload = self._account_of(event), event.payload
        self._outcome.of(account).refused += 1
        if self._is_refused(event):
            return
        own, refusing, cap = event.account_budget, payload["budget"], payload["cap_nanousd"]
        own_cap = self._caps.without_credit(account, cap) if refusing == own else self._caps.recorded(account)
        # The event names no other budget; the call would have been held against the same as others were.
        day = budget_name("day", event.user_id, day_at(event.ms).name)
        campaign = budget_name("campaign", payload.get("campaign_id") or "", event.period)
        caps = {name: self._caps.further[name] for name in (day, campaign) if name in self._caps.further}
        caps = {own: own_cap, **caps, refusing: own_cap if refusing == own else cap}
        hold = self._new_hold(event, account, tuple(caps.items()), is_made=False)
        is_final = payload["reason"] == "wait_timeout"
        self._carry_out(hold, self._decide(hold, hold.other_amount, hold.amount, recorded="denied", is_final=is_final))

    def _assigned(self, event: _Event) -> None:
        self._caps.assign(event.user_id, event.payload["plan"], event.payload["cap_nanousd"])
        self._plans[event.user_id] = event.payload["plan"]

    def _credited(self, event: _Event) -> None:
        self._caps.grant(event.user_id, event.period, event.amount)

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

    # --- Decisions

    def _decide(
        self, hold: Hold, amount: int, recorded_amount: int, *, recorded: Verdict, is_final: bool = False
    ) -> Verdict:
        """Decide as the gate would; what it did decide stands where nothing is different."""
        verdict, _, _ = self._budgets.weigh(hold, amount)
        if is_final and verdict == "wait":
            verdict = "denied"
        if verdict == recorded or amount != recorded_amount or not self._budgets.are_as_recorded(hold):
            return verdict
        self._outcome.unexplained += 1
        return recorded

    def _carry_out(self, hold: Hold, verdict: Verdict) -> None:
        match verdict:
            case "fits":
                self._begin(hold)
            case "denied":
                self._refuse(hold)
            case "wait":
                hold.is_waiting = True
                self._totals(hold).waited += 1
                self._waits.append((hold.ms + self._hold_wait_ms, hold))
                self._queue(hold)

    def _queue(self, hold: Hold) -> None:
        _, budget, _ = self._budgets.weigh(hold, hold.other_amount)
        self._queues.setdefault(budget, deque()).append(hold)

    def _begin(self, hold: Hold) -> None:
        hold.is_waiting = False
        totals = self._totals(hold)
        if not hold.is_made:
            estimate = self._means.estimate(hold)
            totals.allowed += 1
            totals.estimate_nanousd += estimate
            totals.at_most_nanousd += hold.other_amount
            # What it would have cost is not known, but that it would have taken room is.
            self._budgets.move(hold.names, settled=estimate)
            return
        if hold.number == 1:
            totals.other_calls += 1
        self._budgets.move(hold.names, held=hold.other_amount)
        if hold.is_ended:
            self._settle(hold)

    def _refuse(self, hold: Hold, reason: str = "cap") -> None:
        hold.is_waiting = False
        if not hold.is_made:
            self._totals(hold).other_refused += 1
            return
        self._refused[hold.call_id] = min(hold.number, self._refused.get(hold.call_id, hold.number))
        self._open.pop((hold.call_id, hold.number), None)
        self._settled.pop((hold.call_id, hold.number), None)
        _, budget, cap = self._budgets.weigh(hold, hold.other_amount)
        balance = self._budgets[budget]
        self._outcome.add_refusal(
            Refusal(
                entry_id=hold.entry_id,
                account=hold.account,
                call_id=hold.call_id,
                task_type=hold.task_type,
                budget=budget,
                settled_nanousd=balance.settled,
                held_nanousd=balance.held,
                cap_nanousd=cap,
                amount_nanousd=hold.other_amount,
                reason=reason,
            )
        )

    def _settle(self, hold: Hold) -> None:
        self._open.pop((hold.call_id, hold.number), None)
        hold.other_booked = hold.other_cost()
        if hold.is_changed:
            self._settled[hold.call_id, hold.number] = hold
        self._means.add(hold, hold.other_booked)
        self._budgets.move(hold.names, held=-hold.other_amount)
        self._freed += hold.names
        self._book(hold.account, hold.names, hold.other_booked)

    def _book(self, account: Account, names: list[str], nanousd: int) -> None:
        self._outcome.of(account).other_spent_nanousd += nanousd
        self._budgets.move(names, settled=nanousd)
        if nanousd < 0:
            self._freed += names

    def _extend(self, hold: Hold, extension: int, attempt: int, *, recorded: int = 0) -> None:
        """Make the hold cover an attempt; where that does not fit, the attempt would not have been made."""
        if extension and not hold.is_waiting:
            # An extension that was not recorded was not needed: then something is different.
            verdict = self._decide(hold, extension, recorded or -1, recorded="fits")
            if verdict != "fits":
                self._cut(hold, attempt)
                return
            self._budgets.move(hold.names, held=extension)
        hold.other_amount += extension

    def _cut(self, hold: Hold, attempt: int) -> None:
        hold.cut_from = attempt
        self._totals(hold).cut_short += 1

    def _wake(self) -> None:
        """Give those their turn who wait for what was freed, in their order; who still does not fit blocks the rest."""
        while self._freed:
            if not self._queues:
                self._freed.clear()
                return
            name = self._freed.pop()
            queue = self._queues.get(name)
            while queue:
                hold = queue[0]
                verdict, budget, _ = self._budgets.weigh(hold, hold.other_amount)
                if hold.is_waiting and verdict == "wait" and budget == name:
                    break
                queue.popleft()
                if not hold.is_waiting:
                    continue
                if verdict == "wait":
                    self._queue(hold)
                else:
                    self._carry_out(hold, verdict)
            if queue is not None and not queue:
                del self._queues[name]

    def _end_waits(self, now_ms: int) -> None:
        """Decide for good on those that have waited as long as they may."""
        while self._waits and (not self._waits[0][1].is_waiting or self._waits[0][0] <= now_ms):
            _, hold = self._waits.popleft()
            if hold.is_waiting:
                verdict, _, _ = self._budgets.weigh(hold, hold.other_amount)
                if verdict == "fits":
                    self._begin(hold)
                else:
                    self._refuse(hold, "wait_timeout" if verdict == "wait" else "cap")
        self._wake()

    # --- Facts

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
        """Return where an event is counted: on the plan that it names, else on the user's last one."""
        plan = event.payload.get("assigned_plan") or event.payload.get("plan")
        if plan is None:
            plan = self._plans.get(event.user_id, NO_PLAN)
        else:
            self._plans[event.user_id] = plan
        return Account(event.user_id, event.period, plan)

    def _is_refused(self, event: _Event) -> bool:
        """Whether the call ended before, since this or an earlier hold of it would have been refused."""
        refused = self._refused.get(event.call_id)
        return refused is not None and (event.type == "budget-denied" or event.hold >= refused)

    def _is_dropped(self, hold: Hold, event: _Event) -> bool:
        """Whether an attempt is a fallback that there would not have been; if so, the call ends before it."""
        model = event.payload["bound"]["model"] if event.type == "budget-reserved" else event.payload["model"]
        is_dropped = model != hold.model and self._repricing.drops_fallback(hold.task_type)
        if is_dropped and hold.cut_from is None:
            self._cut(hold, event.attempt)
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

    def _totals(self, hold: Hold) -> Totals:
        return self._outcome.of(hold.account)
