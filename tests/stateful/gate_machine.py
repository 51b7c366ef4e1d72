"""A state machine that drives the gate at random and compares every answer with the model's.

Three independent computations meet here: the gate (Lua, from baselines and tails), the model
(from what was asked), and a fold of the stream (from what was appended). The fold also yields the
baselines, at any position, as DuckDB would. G1, G2 and the stamps are checked on the stream alone,
so they are checked even if the model is wrong or left out (`compares = False`).
"""

import json
from collections import Counter
from collections.abc import Awaitable, Sequence
from dataclasses import fields
from typing import Any, ClassVar, Final, Literal

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from tests.model import AlertRules, Answer, LedgerModel, ModelBaseline, ModelCall, ModelEvent
from tests.stateful.gate_driver import GateDriver, event_of
from tollbook.ledger.gate.policies import Opened, Opening, OpeningHold, PolicyRequest
from tollbook.ledger.gate.requests import (
    AdjustRequest,
    AssignRequest,
    AttemptEvent,
    Baseline,
    BudgetCap,
    ChargeRequest,
    CreditRequest,
    NoteRequest,
    Position,
    RecordRequest,
    ReserveRequest,
    SettleRequest,
)
from tollbook.schemas.identifiers import EntryId, Window

EventKind = Literal["model-called", "fallback-used"]
Told = Sequence[tuple[EventKind, int]]
PERIODS = ("2026-11", "2026-11", "2026-11", "2026-12")
TOLD: tuple[tuple[EventKind, ...], ...] = ((), ("model-called",), ("model-called", "fallback-used"))
MODEL_FIELDS = tuple(field.name for field in fields(ModelEvent))

users = st.sampled_from(("ann", "Bob O'Hara"))
periods = st.sampled_from(PERIODS)
kinds = st.sampled_from(
    ((), (), ("day",), ("campaign",), ("day", "campaign"), ("team",), ("total",), ("all", "team", "total"))
)
amounts = st.integers(1, 12)
caps = st.sampled_from((10, 20, 40))
picks = st.integers(0, 11)
# How many events old a baseline is; the second number is for the further budgets of a hold.
lags = st.tuples(st.integers(0, 9), st.integers(0, 9))
rarely = st.sampled_from((False, False, False, False, True))
# How many versions old the policy is by which a process decides.
policy_lags = st.sampled_from((0, 0, 0, 0, 0, 1))


PREPAID: Final = "prepaid:acme:total"
BASE_CAP: Final = 5
"""Cap of the prepaid budget without credit."""
CREDITS: Final = ("credit-a", "credit-b", "credit-c", "credit-d")
NEVER_DUE: Final = 2**45


def alert_rules(version: int) -> AlertRules:
    """The alerts of a version of the policy: every third one has none."""
    if version % 3 == 0:
        return AlertRules()
    budgets = {"team-week": (20, (50, 100)), "prepaid": (BASE_CAP, (75, 100)), "day": (10 * version, (100, 150))}
    return AlertRules({"trial": (50, 100), "growth": (100,)}, budgets)


def policy_payload(version: int) -> str:
    """The payload of the event that applies a version, with its alerts."""
    rules = alert_rules(version)

    def texts(fractions: Sequence[int]) -> list[str]:
        return [f"{fraction / 100:g}" for fraction in fractions]

    content = {
        "plans": {plan: {"cap_usd": "5", "alerts": texts(fractions)} for plan, fractions in rules.plans.items()},
        "budgets": [
            {"name": name, "by": [], "window": "day", "cap_usd": f"{cap / 10**9:.9f}", "alerts": texts(fractions)}
            for name, (cap, fractions) in rules.budgets.items()
        ],
    }
    return json.dumps({"version": version, "content": content})


class StreamFold:
    """Balances from the stream alone; `history` keeps them after every event."""

    def __init__(self) -> None:
        self.history: list[dict[str, tuple[int, int]]] = [{}]
        self.settlements: Counter[tuple[str, int]] = Counter()
        self.holds: set[tuple[str, int]] = set()
        self.policy = 0
        self.alerts: set[tuple[str, str]] = set()
        self.credits: Counter[str] = Counter()

    def fold(self, event: dict[str, Any]) -> None:
        kind, amount, stamps = event["type"], event["amount"], event["stamps"]
        own = f"user:{event['user']}:{event['period']}"
        settled = amount if kind in ("cost-recorded", "cost-adjusted", "budget-opened") else 0
        held = amount if kind == "budget-reserved" else -stamps.get("hold_nanousd", 0)
        if kind == "budget-opened":
            held = -held
        balances = dict(self.history[-1])
        if settled or held:
            further = [extra["budget"] for extra in stamps.get("budgets", ())]
            for name in further if kind == "budget-opened" else (own, *further):
                before = balances.get(name, (0, 0))
                balances[name] = (before[0] + settled, before[1] + held)
        self.history.append(balances)
        if event["committed"] is not None:
            assert event["committed"] == sum(balances.get(own, (0, 0))), f"stamped committed differs: {event}"
        for extra in stamps.get("budgets", ()):
            assert extra["committed_nanousd"] == sum(balances.get(extra["budget"], (0, 0))), (
                f"stamped committed differs: {event}"
            )
        self._check_guarantees(kind, event, sum(balances.get(own, (0, 0))))

    def _check_guarantees(self, kind: str, event: dict[str, Any], committed: int) -> None:
        stamps = event["stamps"]
        if kind == "alert-raised":
            key = (stamps["budget"], stamps["fraction"])
            assert key not in self.alerts, f"an alert is raised again: {event}"
            self.alerts.add(key)
        if kind.startswith("credit-") and "budget" in stamps:
            self.credits[stamps["budget"]] += event["amount"]
            assert self.credits[stamps["budget"]] >= 0, f"more credit is taken back than was granted: {event}"
        if kind == "budget-reserved":
            for extra in stamps.get("budgets", ()):
                if extra["budget"] == PREPAID:
                    assert extra["cap_nanousd"] == BASE_CAP + self.credits[PREPAID], f"G1 is broken: {event}"
        if kind == "policy-applied":
            assert event["policy"] > self.policy, f"G11 is broken: {event}"
            self.policy = event["policy"]
        if kind in ("budget-reserved", "budget-denied"):
            assert event["policy"] == self.policy, f"G11 is broken: {event}"
        if kind == "budget-reserved":
            assert event["has_clock"]
            assert committed <= stamps["cap_nanousd"], f"G1 is broken: {event}"
            for extra in stamps.get("budgets", ()):
                assert extra["committed_nanousd"] <= extra["cap_nanousd"], f"G1 is broken: {event}"
            self.holds.add((event["call"], stamps["hold"]))
        if kind == "cost-recorded" and "hold" in stamps:
            self.settlements[event["call"], stamps["hold"]] += 1
            assert self.settlements[event["call"], stamps["hold"]] == 1, f"G2 is broken: {event}"


class GateMachine(RuleBasedStateMachine):
    driver: ClassVar[GateDriver]
    compares: ClassVar[bool] = True
    steps: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.driver.begin()
        self.model = LedgerModel(alert_rules)
        self.folded = StreamFold()
        self.call_ids: list[str] = []
        self.commands: list[dict[str, Any]] = []
        self.opened = ""
        """The budget that a policy opened last."""
        self.has_failed = False

    # -- reserve

    @rule(
        user=users, period=periods, kinds=kinds, amount=amounts, cap=caps, further_cap=caps, lags=lags, final=rarely,
        trial=rarely, policy_lag=policy_lags, in_opened=rarely,
    )  # fmt: skip
    def reserve(
        self, user: str, period: str, kinds: Sequence[str], amount: int, cap: int, further_cap: int,
        lags: tuple[int, int], final: bool, trial: bool, policy_lag: int, in_opened: bool,
    ) -> None:  # fmt: skip
        call_id = f"call-{len(self.call_ids)}"
        self.call_ids.append(call_id)
        further = (*_further(kinds, user, period), *([self.opened] if in_opened and self.opened else []))
        budgets = ((f"user:{user}:{period}", cap), *_with_caps(further, further_cap))
        self._reserve(
            call_id, user, period, budgets, amount, lags, is_final=final, is_trial=trial, policy_lag=policy_lag
        )

    @precondition(lambda self: self.call_ids)
    @rule(pick=picks, amount=amounts, cap=caps, period=periods, lags=lags, other_content=rarely, policy_lag=policy_lags)
    def reserve_again(
        self, pick: int, amount: int, cap: int, period: str, lags: tuple[int, int], other_content: bool, policy_lag: int
    ) -> None:
        """A redelivered task: the same call, the same user; a later hold may fall into the next period."""
        closed = [call_id for call_id, call in self.model.calls.items() if call.state == "closed"]
        call_id = closed[pick % len(closed)] if closed and pick < 9 else self._pick(pick)
        known = self.model.calls.get(call_id)
        user = known.user if known else "ann"
        content = "other" if other_content else f"content-of-{call_id}"
        budgets = ((f"user:{user}:{period}", cap),)
        self._reserve(call_id, user, period, budgets, amount, lags, content=content, policy_lag=policy_lag)

    def _reserve(
        self, call_id: str, user: str, period: str, budgets: tuple[tuple[str, int], ...], amount: int,
        lags: tuple[int, int], *, is_final: bool = False, is_trial: bool = False, content: str | None = None,
        policy_lag: int = 0,
    ) -> None:  # fmt: skip
        policy = max(0, self.model.policy - policy_lag)
        typed, modelled = self._baselines([name for name, _ in budgets], lags)
        content = content or f"content-of-{call_id}"
        worker = f"worker-{amount}"
        predicted = self.model.reserve(
            call_id, user=user, period=period, content=content, amount=amount, worker=worker,
            budgets=budgets, baselines=modelled, is_final=is_final, is_trial=is_trial, policy=policy,
        )  # fmt: skip
        request = ReserveRequest(
            call_id=call_id, user_id=user, window=Window(period, 0, 2**52), content_hash=content,
            amount_nanousd=amount, worker=worker, lease_ms=60_000,
            payload=f'{{"asked_policy":{policy},"plan":"trial"}}',
            budgets=tuple(BudgetCap(name, cap) for name, cap in budgets), is_final=is_final, is_trial=is_trial,
            policy_version=policy,
        )  # fmt: skip
        self._check("reserve", self.driver.gate.reserve(request, typed), predicted)

    # -- the life of a hold

    @precondition(lambda self: self.call_ids)
    @rule(
        pick=picks, next_attempt=st.booleans(), attempt_events=st.sampled_from(TOLD),
        extension=st.sampled_from((0, 1, 3, 5, 8, 8, 45)), spent=st.integers(0, 8), cap=caps, lags=lags,
        wrong_budgets=rarely, policy_lag=policy_lags,
    )  # fmt: skip
    def record(
        self, pick: int, next_attempt: bool, attempt_events: Sequence[EventKind], extension: int, spent: int, cap: int,
        lags: tuple[int, int], wrong_budgets: bool, policy_lag: int,
    ) -> None:  # fmt: skip
        policy = max(0, self.model.policy - policy_lag)
        call_id, call = self._pick_open(pick)
        names = _budgets_of(call, wrong=wrong_budgets)
        begun = call.begun + next_attempt
        events: Told = [(kind, begun) for kind in attempt_events]
        typed, modelled = self._baselines(names, lags)
        budgets = _with_caps(names, cap)
        predicted = self.model.record(
            call_id, hold=call.hold, begun=begun, spent=spent, assumed=spent // 2, events=events,
            budgets=budgets, baselines=modelled, extension=extension, policy=policy,
        )  # fmt: skip
        request = RecordRequest(
            call_id=call_id, user_id=call.user, hold=call.hold, attempts_begun=begun, spent_nanousd=spent,
            assumed_nanousd=spent // 2, events=_attempt_events(events), extension_nanousd=extension,
            budgets=tuple(BudgetCap(name, cap) for name, cap in budgets), policy_version=policy,
            extension_payload=f'{{"asked_policy":{policy}}}',
        )  # fmt: skip
        self._check("record", self.driver.gate.record(request, typed), predicted)

    @precondition(lambda self: self.call_ids)
    @rule(pick=picks, earlier_attempt=rarely, earlier_hold=rarely, number=st.integers(1, 9))
    def note(self, pick: int, earlier_attempt: bool, earlier_hold: bool, number: int) -> None:
        """The reply to a request begins; the note of it may come late."""
        call_id, call = self._pick_open(pick)
        hold, attempt = max(1, call.hold - earlier_hold), max(1, call.begun - earlier_attempt)
        noted = {"hold": hold, "attempt": attempt, "provider": "default", "generation_id": f"gen={number}"}
        predicted = self.model.note(call_id, **noted)
        self._check("note", self.driver.gate.note(NoteRequest(call_id=call_id, user_id=call.user, **noted)), predicted)

    @precondition(lambda self: self.call_ids)
    @rule(
        pick=picks, cost=st.sampled_from(("nothing", "less", "all", "more", "odd")), final=st.booleans(),
        attempt_events=st.sampled_from(TOLD), lags=st.none() | lags, earlier_hold=rarely, wrong_budgets=rarely,
    )  # fmt: skip
    def settle(
        self, pick: int, cost: str, final: bool, attempt_events: Sequence[EventKind], lags: tuple[int, int] | None,
        earlier_hold: bool, wrong_budgets: bool,
    ) -> None:  # fmt: skip
        call_id, call = self._pick_open(pick)
        names = _budgets_of(call, wrong=wrong_budgets)
        hold = max(1, call.hold - earlier_hold)
        nanousd = {"nothing": 0, "less": call.amount // 2, "all": call.amount, "more": call.amount + 3, "odd": 1}[cost]
        self._settle(call_id, call, hold, nanousd, names, attempt_events, lags, is_final=final)

    def _settle(
        self, call_id: str, call: ModelCall, hold: int, cost: int, names: tuple[str, ...],
        attempt_events: Sequence[EventKind] = (), lags: tuple[int, int] | None = None, *, is_final: bool = True,
    ) -> None:  # fmt: skip
        events: Told = [(kind, call.begun) for kind in attempt_events]
        typed, modelled = self._baselines(names, lags) if lags else ((), ())
        result = f'{{"cost":{cost}}}' if is_final else ""
        attempt, assumed = call.begun, cost // 2
        predicted = self.model.settle(
            call_id, hold=hold, cost=cost, assumed=assumed, attempt=attempt, is_final=is_final, budgets=names,
            result=result, events=events, baselines=modelled,
        )  # fmt: skip
        request = SettleRequest(
            call_id=call_id, user_id=call.user, hold=hold, cost_nanousd=cost, assumed_nanousd=assumed,
            attempt=attempt, is_final=is_final, payload='{"outcome":"done"}', budgets=names, result=result,
            events=_attempt_events(events),
        )  # fmt: skip
        self._check("settle", self.driver.gate.settle(request, typed), predicted)

    @precondition(lambda self: any(call.settled for call in self.model.calls.values()))
    @rule(
        pick=picks, cost=st.integers(0, 14), attempt_events=st.sampled_from(TOLD), has_result=st.booleans(),
        lags=st.none() | lags, earlier_hold=rarely, wrong_budgets=rarely, ends_call=rarely,
    )  # fmt: skip
    def adjust(
        self, pick: int, cost: int, attempt_events: Sequence[EventKind], has_result: bool, lags: tuple[int, int] | None,
        earlier_hold: bool, wrong_budgets: bool, ends_call: bool,
    ) -> None:  # fmt: skip
        settled = [call_id for call_id, call in self.model.calls.items() if call.settled]
        call_id = settled[pick % len(settled)]
        call = self.model.calls[call_id]
        hold = min(call.settled) if earlier_hold else max(call.settled)
        names = _budgets_of(call, wrong=pick % 2 == 0) if wrong_budgets else call.places[hold][1]
        events: Told = [(kind, call.begun) for kind in attempt_events]
        typed, modelled = self._baselines(names, lags) if lags else ((), ())
        result, attempt, assumed = '{"late":true}' if has_result else "", call.begun, cost // 3
        predicted = self.model.adjust(
            call_id, hold=hold, cost=cost, assumed=assumed, attempt=attempt, budgets=names, result=result,
            events=events, ends_call=ends_call, baselines=modelled,
        )  # fmt: skip
        request = AdjustRequest(
            call_id=call_id, user_id=call.user, hold=hold, cost_nanousd=cost, assumed_nanousd=assumed,
            attempt=attempt, payload='{"author":"test"}', budgets=names, result=result,
            events=_attempt_events(events), ends_call=ends_call,
        )  # fmt: skip
        self._check("adjust", self.driver.gate.adjust(request, typed), predicted)

    # -- spend without a hold, plans, credit

    @rule(
        pick=picks, user=users, period=periods, kinds=kinds, cost=st.integers(0, 6), lags=lags, again=rarely,
        policy_lag=st.none() | policy_lags, cap=st.sampled_from((0, 10, 20)),
    )  # fmt: skip
    def charge(
        self, pick: int, user: str, period: str, kinds: Sequence[str], cost: int, lags: tuple[int, int], again: bool,
        policy_lag: int | None, cap: int,
    ) -> None:  # fmt: skip
        policy = None if policy_lag is None else max(0, self.model.policy - policy_lag)
        if again and self.call_ids:
            call_id = self._pick(pick)
        else:
            call_id = f"call-{len(self.call_ids)}"
            self.call_ids.append(call_id)
        names = (f"user:{user}:{period}", *_further(kinds, user, period))
        typed, modelled = self._baselines(names, lags)
        content = f"content-of-{call_id}" if pick else "other"
        predicted = self.model.charge(
            call_id, user=user, period=period, content=content, cost=cost, assumed=cost, budgets=names,
            baselines=modelled, policy=policy, cap=cap,
        )  # fmt: skip
        request = ChargeRequest(
            call_id=call_id, user_id=user, period=period, content_hash=content, cost_nanousd=cost,
            assumed_nanousd=cost, payload='{"plan":"trial"}', budgets=names, policy_version=policy, cap_nanousd=cap,
        )  # fmt: skip
        self._check("charge", self.driver.gate.charge(request, typed), predicted)

    @rule(
        user=users, period=periods, kind=st.sampled_from(("plan-assigned", "credit-granted")),
        amount=st.integers(0, 25), pick=picks, again=rarely, other_content=rarely,
    )  # fmt: skip
    def assign(
        self, user: str, period: str, kind: Literal["plan-assigned", "credit-granted"], amount: int, pick: int,
        again: bool, other_content: bool,
    ) -> None:  # fmt: skip
        command: dict[str, Any] = {
            "command_id": f"command-{len(self.commands)}", "user": user, "period": period,
            "content": f"content-{amount}", "kind": kind, "amount": amount, "budget": f"user:{user}:{period}",
        }  # fmt: skip
        if again and self.commands:
            command = self.commands[pick % len(self.commands)] | ({"content": "other"} if other_content else {})
        else:
            self.commands.append(command)
        predicted = self.model.assign(**command)
        request = AssignRequest(
            command_id=command["command_id"], user_id=command["user"], period=command["period"],
            content_hash=command["content"], type=command["kind"], plan="growth",
            amount_nanousd=command["amount"], payload="{}", budget=command["budget"],
        )  # fmt: skip
        self._check("assign", self.driver.gate.assign(request), predicted)

    @rule(step=st.sampled_from((1, 1, 1, 0, -1)), lag=policy_lags, spent=st.integers(0, 12), behind=policy_lags)
    def apply_policy(self, step: int, lag: int, spent: int, behind: int) -> None:
        """A new version, the one in force again, or an older one; by a process that may not know the last one.

        It may open a budget with what was spent before, counted up to the newest event or not, and with the holds that
        are open, or some of them.
        """
        version, in_force = max(1, self.model.policy + step), max(0, self.model.policy - lag)
        openings = ((f"opened~{version}:all:2026-11", spent, 10),) if spent > 6 else ()
        counted = max(0, self._head - behind) if openings else None
        is_open = {call_id: call for call_id, call in self.model.calls.items() if call.state == "open"}
        held = list(is_open)[spent % 2 :] if openings else []
        holds = tuple(OpeningHold(call_id, is_open[call_id].hold, is_open[call_id].amount) for call_id in held)
        predicted = self.model.apply_policy(
            in_force=in_force, version=version, openings=openings, counted=counted, held=held
        )
        request = PolicyRequest(
            in_force=in_force, version=version, digest=f"digest-{version}", payload=policy_payload(version),
            opened=Opened(tuple(Opening(*opening, holds) for opening in openings), counted, NEVER_DUE),
        )  # fmt: skip
        if openings and predicted == ("NEW", True):
            self.opened = openings[0][0]
        self._check("apply_policy", self.driver.gate.apply_policy(request), predicted)

    @rule(
        kind=st.sampled_from(("credit-granted", "credit-granted", "credit-revoked", "credit-expired")),
        credit=st.sampled_from(CREDITS), amount=st.integers(0, 20), expires=st.sampled_from((0, 10, 20, 30)),
        lags=lags, other_content=rarely, early=rarely, policy_lag=policy_lags, part=st.booleans(),
    )  # fmt: skip
    def change_credit(
        self, kind: Literal["credit-granted", "credit-revoked", "credit-expired"], credit: str, amount: int,
        expires: int, lags: tuple[int, int], other_content: bool, early: bool, policy_lag: int, part: bool,
    ) -> None:  # fmt: skip
        """Credits of the prepaid budget; a part of one, or all of it, is taken back once."""
        policy = max(0, self.model.policy - policy_lag)
        command_id = f"{kind} {credit}" + (" part" if part and kind == "credit-revoked" else "")
        if kind == "credit-granted":
            amount = amount or 1
        elif kind == "credit-expired" or not part:
            amount = 0
        content = "other" if other_content else "content"
        typed, modelled = self._baselines([PREPAID], lags)
        predicted = self.model.change_credit(
            command_id, content=content, kind=kind, credit_id=credit, amount=amount, expires=expires,
            budget=(PREPAID, BASE_CAP), baseline=modelled[0], is_due=not early, policy=policy,
        )  # fmt: skip
        request = CreditRequest(
            command_id=command_id, user_id="", content_hash=content, type=kind, credit_id=credit,
            amount_nanousd=amount, expires_ms=NEVER_DUE if early and kind == "credit-expired" else expires,
            payload="{}", budget=BudgetCap(PREPAID, BASE_CAP), policy_version=policy,
        )  # fmt: skip
        self._check("change_credit", self.driver.gate.change_credit(request, typed), predicted)

    @rule(
        user=users, period=periods, cost=st.integers(BASE_CAP, BASE_CAP + 20), lags=lags,
        expires=st.permutations((0, 10, 20)), expired=st.sampled_from(CREDITS[:3]),
    )  # fmt: skip
    def spend_from_credits(
        self, user: str, period: str, cost: int, lags: tuple[int, int], expires: Sequence[int], expired: str
    ) -> None:
        """Spend that is taken from several credits, before one of them expires."""
        granted: dict[str, int] = dict(zip(CREDITS, expires, strict=False))
        for credit, at in granted.items():
            self.change_credit(
                kind="credit-granted", credit=credit, amount=10, expires=at, lags=lags, other_content=False,
                early=False, policy_lag=0, part=False,
            )  # fmt: skip
        self.charge(
            pick=1, user=user, period=period, kinds=("total",), cost=cost, lags=lags, again=False, policy_lag=0, cap=0
        )
        self.change_credit(
            kind="credit-expired", credit=expired, amount=0, expires=granted[expired], lags=lags,
            other_content=False, early=False, policy_lag=0, part=False,
        )  # fmt: skip

    # -- the projector, and questions

    @rule(
        back=st.integers(0, 9), users=st.sampled_from((("ann",), ("Bob O'Hara",), ("ann", "Bob O'Hara"))), kinds=kinds
    )
    def trim(self, back: int, users: Sequence[str], kinds: Sequence[str]) -> None:
        """The projector has folded all but the newest `back` events and lets the tails go up to there."""
        watermark = max(0, self._head - back)
        names = [f"user:{user}:{period}" for user in users for period in set(PERIODS)]
        names += list(_further(kinds, users[0], PERIODS[0]))
        predicted = self.model.trim(watermark, names)
        self._check("trim", self.driver.gate.trim(self.driver.entry(watermark), names), predicted)

    @rule(
        user=users, period=periods, kinds=kinds, cap=caps, lags=lags,
        projection=st.sampled_from(("true", "true", "wrong", "ahead")),
    )  # fmt: skip
    def balance(
        self, user: str, period: str, kinds: Sequence[str], cap: int, lags: tuple[int, int], projection: str
    ) -> None:
        """A baseline that the tail contradicts, or that is ahead of the ledger, is refused (G8)."""
        names = (f"user:{user}:{period}", *_further(kinds, user, period))
        typed, modelled = self._baselines(names, lags)
        settled, held, position = typed[0].settled_nanousd, typed[0].held_nanousd, typed[0].position
        if projection == "wrong" and self.model.budget(names[0]).tail:
            # Without a tail nothing could tell.
            settled, held = settled - 1, held + 1
        if projection == "ahead":
            position = Position(EntryId(2**45, 0), self._head + 1)
        typed = (Baseline(settled, held, position), *typed[1:])
        modelled = (ModelBaseline(settled, held, position.seq), *modelled[1:])
        predicted = self.model.balance(
            user=user, period=period, budgets=[(name, cap) for name in names], baselines=modelled,
            policy=self.model.policy,
        )  # fmt: skip
        budgets = [BudgetCap(name, cap) for name in names]
        call = self.driver.gate.balance(
            user_id=user, period=period, budgets=budgets, baselines=typed, policy_version=self.model.policy
        )
        self._check("balance", call, predicted)

    # -- checks

    def teardown(self) -> None:
        if self.has_failed or not self.compares:
            return
        self._check_records()
        for call_id in self.model.open_calls:
            call = self.model.calls[call_id]
            self._settle(call_id, call, call.hold, call.spent, call.budgets)
        assert set(self.folded.settlements) == self.folded.holds, "G2: every hold is settled exactly once"
        assert all(held == 0 for _, held in self.folded.history[-1].values())
        assert self.driver.ask(self.driver.gate.overdue(2**52)) == []

    def _check_records(self) -> None:
        """The gate's own record of each call is the model's; the open ones are in the sorted set of holds."""
        overdue = self.driver.ask(self.driver.gate.overdue(2**52, count=1_000))
        assert sorted(overdue) == sorted(self.model.open_calls)
        for call_id, call in self.model.calls.items():
            found = self.driver.ask(self.driver.gate.call_record(call_id))
            assert (found.state, found.content_hash, found.user_id) == (call.state, call.content, call.user)
            hold = found.hold
            assert (hold.attempts_recorded, hold.attempts_begun) == (call.recorded, call.begun)
            assert (hold.hold, hold.spent_nanousd, hold.assumed_nanousd) == (call.hold, call.spent, call.assumed)
            noted = (hold.provider, hold.generation_id) if hold.generation_id else ()
            assert noted == call.generation, f"{noted} is noted of {call_id}; the model predicts {call.generation}"

    def _check(self, name: str, call: Awaitable[Any], predicted: Answer) -> None:
        self.has_failed = True
        answer, entries = self.driver.step(call)
        self.steps[f"{name} {answer[0]}"] += 1
        events = [event_of(entry) for entry in entries]
        for event in events:
            self.folded.fold(event)
        if self.compares:
            assert answer == predicted, f"{name}: the gate answered {answer}, the model predicts {predicted}"
            self._compare_events(events)
        self.has_failed = False

    def _compare_events(self, events: Sequence[dict[str, Any]]) -> None:
        first = len(self.folded.history) - 1 - len(events)
        expected = self.model.events[first:]
        found = [{name: event[name] for name in ("seq", *MODEL_FIELDS)} for event in events]
        wanted = [{"seq": seq, **vars(event)} for seq, event in enumerate(expected, first + 1)]
        assert found == wanted, f"the events differ from the model's: {found}, predicted are {wanted}"

    # -- choices

    @property
    def _head(self) -> int:
        return len(self.folded.history) - 1

    def _baselines(
        self, names: Sequence[str], lags: tuple[int, int]
    ) -> tuple[tuple[Baseline, ...], tuple[ModelBaseline, ...]]:
        typed: list[Baseline] = []
        modelled: list[ModelBaseline] = []
        for index, name in enumerate(names):
            seq = max(0, self._head - lags[min(index, 1)])
            settled, held = self.folded.history[seq].get(name, (0, 0))
            typed.append(Baseline(settled, held, self.driver.positions[seq]))
            modelled.append(ModelBaseline(settled, held, seq))
        return tuple(typed), tuple(modelled)

    def _pick(self, pick: int) -> str:
        return self.call_ids[-1 - pick % len(self.call_ids)]

    def _pick_open(self, pick: int) -> tuple[str, ModelCall]:
        """An open call most of the time, else any, even one that the ledger does not know."""
        open_calls = self.model.open_calls
        call_id = open_calls[pick % len(open_calls)] if open_calls and pick < 9 else self._pick(pick)
        unknown = ModelCall("", "ann", PERIODS[0], "-", hold=1, budgets=(f"user:ann:{PERIODS[0]}",))
        return call_id, self.model.calls.get(call_id, unknown)


def _further(kinds: Sequence[str], user: str, period: str) -> tuple[str, ...]:
    """Budgets beyond the user's period; all but the day's are shared by all users."""
    names = {
        "day": f"day:{user}:{period}-05", "campaign": f"campaign:spring sale:{period}",
        "team": "team-week:red:2026-W48", "all": f"all-day:all:{period}-05", "total": PREPAID,
    }  # fmt: skip
    return tuple(names[kind] for kind in kinds)


def _with_caps(names: Sequence[str], cap: int) -> tuple[tuple[str, int], ...]:
    """The prepaid budget has the one cap of the policy; all others are drawn anew with each question."""
    return tuple((name, BASE_CAP if name == PREPAID else cap) for name in names)


def _budgets_of(call: ModelCall, *, wrong: bool) -> tuple[str, ...]:
    names = call.budgets or (f"user:{call.user}:{call.period}",)
    return (*names, f"day:{call.user}:2026-11-06") if wrong else names


def _attempt_events(events: Told) -> tuple[AttemptEvent, ...]:
    return tuple(AttemptEvent(kind, attempt, "{}") for kind, attempt in events)
