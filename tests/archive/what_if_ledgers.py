"""Ledgers for what-ifs: decided by the real gate, or written down event by event."""

import json
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import pyarrow as pa

from tests.model import Answer
from tests.stateful.gate_driver import GateDriver
from tollbook.audit.what_if import Alternatives, Outcome, WhatIf
from tollbook.inference.prices.catalogue import PriceCatalogue
from tollbook.ledger.gate.requests import (
    EMPTY_BASELINE,
    AdjustRequest,
    AssignRequest,
    AttemptEvent,
    BudgetCap,
    RecordRequest,
    ReserveRequest,
    SettleRequest,
)
from tollbook.ledger.stream import Batch
from tollbook.schemas.events import ENVELOPE_FIELDS
from tollbook.schemas.identifiers import Window
from tollbook.schemas.money import MAX_NANOUSD

PERIOD: Final = "2026-11"
MODEL: Final = "m/large"
OTHER: Final = "m/small"
ANY_TIME: Final = Window(PERIOD, 0, 2**50)


def decide(entries: Sequence[Any], changed: Alternatives | None = None, *, batch: int = 0, **options: Any) -> Outcome:
    """Decide raw entries again, in tables of this number of events if it is given."""
    walk = WhatIf(changed or Alternatives(), PriceCatalogue().price_anywhere, **options)
    size = batch or len(entries) or 1
    for start in range(0, len(entries), size):
        walk.fold(table_of(entries[start : start + size]))
    return walk.finish()


def table_of(entries: Sequence[Any]) -> pa.Table:
    return Batch(0, list(entries)).to_table()


def order(
    plan: str = "trial", task_type: str = "score_post", campaign: str | None = None, **bound: Any
) -> dict[str, Any]:
    """What a reservation's payload says about its call."""
    tokens = {"model": MODEL, "prompt_tokens": 1_000, "completion_tokens": 1_000, **bound}
    prices = {"prompt_nanousd_per_mtok": 1, "completion_nanousd_per_mtok": 1}
    named = {} if campaign is None else {"campaign_id": campaign}
    return {"task_type": task_type, "plan": plan, "worker": "w", "bound": {**tokens, **prices}, **named}


class GateLedger:
    """A ledger whose every decision is the real gate's."""

    def __init__(self, driver: GateDriver) -> None:
        driver.begin()
        self._driver = driver
        self.entries: list[Any] = []
        self._names: dict[str, tuple[str, ...]] = {}
        self._users: dict[str, str] = {}

    def reserve(
        self, call_id: str, *, user: str, cap: int, amount: int, plan: str = "trial", is_final: bool = False,
        further: Mapping[str, int] | None = None, campaign: str | None = None,
    ) -> Answer:  # fmt: skip
        budgets = (BudgetCap(f"user:{user}:{PERIOD}", cap), *(BudgetCap(*each) for each in (further or {}).items()))
        self._names[call_id], self._users[call_id] = tuple(budget.name for budget in budgets), user
        request = ReserveRequest(
            call_id=call_id, user_id=user, window=ANY_TIME, content_hash="same", amount_nanousd=amount, worker="w",
            lease_ms=60_000, payload=json.dumps(order(plan, campaign=campaign)), budgets=budgets, is_final=is_final,
        )  # fmt: skip
        return self._do(self._driver.gate.reserve(request, [EMPTY_BASELINE] * len(budgets)))

    def extend(self, call_id: str, extension: int, *, spent: int, cap: int, hold: int = 1, attempt: int = 2) -> Answer:
        names = self._names[call_id]
        event = AttemptEvent("model-called", attempt - 1, json.dumps(called(charge=spent, hold=hold)))
        request = RecordRequest(
            call_id=call_id, user_id=self._users[call_id], hold=hold, attempts_begun=attempt, spent_nanousd=spent,
            assumed_nanousd=0, events=(event,), extension_nanousd=extension,
            extension_payload=json.dumps({"kind": "extension", **order()}),
            budgets=tuple(BudgetCap(name, cap) for name in names),
        )  # fmt: skip
        return self._do(self._driver.gate.record(request, [EMPTY_BASELINE] * len(names)))

    def settle(self, call_id: str, cost: int, *, hold: int = 1, is_final: bool = True, assumed: int = 0) -> Answer:
        payload = {"basis": "assumed" if assumed else "reported", "outcome": "done", "assumed_nanousd": assumed}
        request = SettleRequest(
            call_id=call_id, user_id=self._users[call_id], hold=hold, cost_nanousd=cost, assumed_nanousd=assumed,
            attempt=1, is_final=is_final, payload=json.dumps(payload), budgets=self._names[call_id],
        )  # fmt: skip
        return self._do(self._driver.gate.settle(request))

    def adjust(self, call_id: str, cost: int, *, hold: int = 1) -> Answer:
        payload = {"basis": "reported", "reason": "reconciled", "author": "test"}
        request = AdjustRequest(
            call_id=call_id, user_id=self._users[call_id], hold=hold, cost_nanousd=cost, assumed_nanousd=0,
            attempt=1, payload=json.dumps(payload), budgets=self._names[call_id],
        )  # fmt: skip
        return self._do(self._driver.gate.adjust(request))

    def assign(self, command_id: str, *, user: str, plan: str = "", cap: int = 0, credit: int = 0) -> Answer:
        signed = {"author": "test", "reason": "asked"}
        payload = signed if credit else {"plan": plan, "cap_nanousd": cap, **signed}
        request = AssignRequest(
            command_id=command_id, user_id=user, period=PERIOD, content_hash="same",
            type="credit-granted" if credit else "plan-assigned", plan=plan, amount_nanousd=credit or cap,
            payload=json.dumps(payload), budget=f"user:{user}:{PERIOD}",
        )  # fmt: skip
        return self._do(self._driver.gate.assign(request))

    def _do(self, asked: Any) -> Answer:
        answer, entries = self._driver.step(asked)
        self.entries += entries
        return answer


@dataclass
class Work:
    """Calls of one user, by number: what each may and does cost; and in which order they begin and end."""

    calls: Sequence[tuple[int, int]]
    steps: Sequence[tuple[str, int]]


@dataclass
class Done:
    """The outcome of the calls under one cap."""

    ledger: GateLedger
    refused: set[str] = field(default_factory=set[str])
    waiting: set[str] = field(default_factory=set[str])
    spent: int = 0


def run_work(driver: GateDriver, work: Work, cap: int) -> Done:
    """Let the real gate decide the calls; whenever money is freed, waiting ones are tried again in order."""
    done, queue = Done(GateLedger(driver)), deque[int]()
    ended, opened = set[int](), set[int]()

    def reserve(number: int) -> str:
        answer = done.ledger.reserve(f"c{number}", user="ann", cap=cap, amount=work.calls[number][0])
        if answer[0] == "OK":
            opened.add(number)
        elif answer[0] == "DENIED":
            done.refused.add(f"c{number}")
        return answer[0]

    def settle(number: int) -> None:
        done.ledger.settle(f"c{number}", work.calls[number][1])
        done.spent += work.calls[number][1]
        opened.discard(number)

    for step, number in work.steps:
        if step == "begin":
            if reserve(number) == "WAIT":
                queue.append(number)
            continue
        ended.add(number)
        if number in opened:
            settle(number)
        while queue and number not in queue and (answer := reserve(queue[0])) != "WAIT":
            next_one = queue.popleft()
            if answer == "OK" and next_one in ended:
                settle(next_one)
    done.waiting = {f"c{number}" for number in queue}
    return done


# --- Events written down one by one


def called(
    *,
    model: str = MODEL,
    charge: int,
    basis: str = "reported",
    usage: Mapping[str, int] | None = None,
    hold: int = 1,
    provider: str | None = None,
) -> dict[str, Any]:
    tokens = {} if usage is None else {"usage": dict(usage)}
    return {
        "hold": hold, "model": model, "outcome": "ok", "latency_ms": 1, "charge_nanousd": charge,
        "charge_basis": basis, **tokens, **({} if provider is None else {"provider": provider}),
    }  # fmt: skip


class Script:
    """Writes events, a second apart. Nothing is decided: the ledger has exactly what the test says."""

    def __init__(self, *, user: str = "ann", plan: str = "trial", cap: int = MAX_NANOUSD) -> None:
        self.entries: list[Any] = []
        self.user, self.plan, self.cap = user, plan, cap
        self.at_ms = 1_795_000_000_000
        self._held: dict[str, int] = {}

    def hold(
        self, call_id: str, amount: int, *, number: int = 1, further: Mapping[str, int] | None = None, **bound: Any
    ) -> "Script":
        self._held[call_id] = amount
        stamps = [{"budget": name, "cap_nanousd": cap, "committed_nanousd": 0} for name, cap in (further or {}).items()]
        return self._add(
            "budget-reserved", call_id, amount, self._order(number, **bound) | ({"budgets": stamps} if stamps else {})
        )

    def extension(self, call_id: str, amount: int, *, model: str = OTHER, attempt: int = 2) -> "Script":
        self._held[call_id] += amount
        payload = {"kind": "extension", **self._order(1, model=model)}
        return self._add("budget-reserved", call_id, amount, payload, attempt=attempt)

    def called(self, call_id: str, charge: int, *, attempt: int = 1, **fields: Any) -> "Script":
        return self._add("model-called", call_id, 0, called(charge=charge, **fields), attempt=attempt)

    def settle(
        self, call_id: str, cost: int, *, basis: str = "reported", assumed: int = 0, further: Iterable[str] = ()
    ) -> "Script":
        payload = {
            "hold": 1, "hold_nanousd": self._held.pop(call_id), "basis": basis, "outcome": "done",
            "assumed_nanousd": assumed, "budgets": [{"budget": name, "committed_nanousd": 0} for name in further],
        }  # fmt: skip
        return self._add("cost-recorded", call_id, cost, payload)

    def call(self, call_id: str, amount: int, cost: int, **bound: Any) -> "Script":
        return self.hold(call_id, amount, **bound).called(call_id, cost).settle(call_id, cost)

    def adjust(self, call_id: str, difference: int) -> "Script":
        payload = {"hold": 1, "basis": "reported", "reason": "late_answer", "author": "w"}
        return self._add("cost-adjusted", call_id, difference, payload)

    def charge(self, call_id: str, cost: int, **payload: Any) -> "Script":
        return self._add("cost-recorded", call_id, cost, {"basis": "reported", "outcome": "recorded", **payload})

    def deny(self, call_id: str, amount: int, *, reason: str = "cap", budget: str = "", cap: int = -1) -> "Script":
        payload = {
            "budget": budget or f"user:{self.user}:{PERIOD}", "cap_nanousd": self.cap if cap < 0 else cap,
            "settled_nanousd": 0, "held_nanousd": 0, "reason": reason, **order(self.plan),
        }  # fmt: skip
        return self._add("budget-denied", call_id, amount, payload)

    def assign(self, plan: str, cap: int) -> "Script":
        self.plan, self.cap = plan, cap
        payload = {"plan": plan, "cap_nanousd": cap, "author": "a", "reason": "r"}
        return self._add("plan-assigned", f"assign-{len(self.entries)}", 0, payload)

    def credit(self, amount: int) -> "Script":
        self.cap += amount
        return self._add("credit-granted", f"credit-{len(self.entries)}", amount, {"author": "a", "reason": "r"})

    def later(self, seconds: int) -> "Script":
        self.at_ms += 1_000 * seconds
        return self

    def as_user(self, user: str, *, plan: str = "trial", cap: int = MAX_NANOUSD) -> "Script":
        self.user, self.plan, self.cap = user, plan, cap
        return self

    def _order(self, hold: int, **bound: Any) -> dict[str, Any]:
        return {"hold": hold, "cap_nanousd": self.cap, **order(self.plan, **bound)}

    def _add(self, kind: str, call_id: str, amount: int, payload: Mapping[str, Any], *, attempt: int = 1) -> "Script":
        self.at_ms += 1_000
        values = (kind, 1, len(self.entries) + 1, self.user, PERIOD, call_id, attempt, amount, "", json.dumps(payload))
        fields = [str(part).encode() for pair in zip(ENVELOPE_FIELDS, values, strict=True) for part in pair]
        self.entries.append([f"{self.at_ms}-0".encode(), fields])
        return self


def numbered(calls: Iterable[tuple[int, int]]) -> Script:
    """One call after the other."""
    script = Script()
    for number, (amount, cost) in enumerate(calls):
        script.call(f"c{number}", amount, cost)
    return script
