"""Makes ledgers of every kind of event, stamped as the gate stamps them, from a seed.

For tests that need stranger ledgers than calls would make. The integration tests fold what the
real gate writes.
"""

import json
import random
from dataclasses import dataclass, field
from typing import Any

from tollbook.schemas.events import ENVELOPE_FIELDS, EVENT_VERSION
from tollbook.schemas.identifiers import split_budget_name

CAP = 15_000_000_000
PERIODS = ("2026-10", "2026-11")


@dataclass
class Call:
    user: str
    period: str
    call_id: str
    budgets: tuple[str, ...]
    campaign: str | None
    hold: int = 0
    held: int = 0
    attempt: int = 0
    settled: list[int] = field(default_factory=list)


class LedgerMaker:
    """`entries` are raw stream entries, as Redis sends them."""

    def __init__(self, seed: int, *, users: int = 4, start_ms: int = 1_795_000_000_000) -> None:
        self.entries: list[list[Any]] = []
        self._random = random.Random(seed)
        self._users = [f"user:{n}" for n in range(users)]
        self._balances: dict[str, int] = {}
        self._credits: dict[str, int] = {}
        self._caps: dict[str, int] = {}
        self._plans: dict[str, str] = {}
        self._open: list[Call] = []
        self._settled: list[Call] = []
        self._ms = start_ms
        self._n = 0

    def run(self, steps: int) -> "LedgerMaker":
        actions = (
            [self.reserve] * 5
            + [self.model_called] * 4
            + [self.settle] * 4
            + [self.extend, self.fall_back, self.deny]
            + [self.adjust, self.charge, self.assign, self.credit, self.seal]
            + [self.revoke, self.clear]
        )
        for _ in range(steps):
            self._random.choice(actions)()
        return self

    def append(self, kind: str, call: Call, amount: int, payload: dict[str, Any], *, committed: int | None) -> None:
        if self._random.random() < 0.7:
            self._ms, self._n = self._ms + self._random.randrange(1, 5_000), 0
        else:
            self._n += 1
        values = (
            kind,
            EVENT_VERSION,
            len(self.entries) + 1,
            call.user,
            call.period,
            call.call_id,
            call.attempt,
            amount,
            "" if committed is None else committed,
            json.dumps(payload, separators=(",", ":")),
        )
        flat = [str(part).encode() for pair in zip(ENVELOPE_FIELDS, values, strict=True) for part in pair]
        self.entries.append([f"{self._ms}-{self._n}".encode(), flat])

    def _move(self, call: Call, amount: int) -> int:
        for name in call.budgets:
            self._balances[name] = self._balances.get(name, 0) + amount
        return self._balances[call.budgets[0]]

    def _stamps(self, call: Call, *, cap: bool = False) -> dict[str, Any]:
        further = [
            {"budget": name, **({"cap_nanousd": 2 * CAP} if cap else {}), "committed_nanousd": self._balances[name]}
            for name in call.budgets[1:]
        ]
        return {"budgets": further} if further else {}

    def _new_call(self) -> Call:
        user, period = self._random.choice(self._users), self._random.choice(PERIODS)
        campaign = self._random.choice([None, None, "spring:sale", "autumn"])
        budgets = [f"user:{user}:{period}"]
        if self._random.random() < 0.3:
            budgets.append(f"day:{user}:{period}-07")
        if campaign is not None and self._random.random() < 0.7:
            budgets.append(f"campaign:{campaign}:{period}")
        return Call(user, period, f"call-{len(self.entries)}", tuple(budgets), campaign)

    def _cap(self, call: Call) -> int:
        name = call.budgets[0]
        return self._caps.get(call.user, CAP) + self._credits.get(name, 0)

    def _order(self, call: Call) -> dict[str, Any]:
        return {
            "task_type": self._random.choice(["generate_draft", "score_post"]),
            "plan": self._random.choice(["trial", "starter", "growth"]),
            **({"assigned_plan": self._plans[call.user]} if call.user in self._plans else {}),
            **({"campaign_id": call.campaign} if call.campaign else {}),
            **({"stream": "generation"} if self._random.random() < 0.8 else {}),
            "worker": f"host:{self._random.randrange(9)}",
            "bound": {
                "model": "m/large",
                "prompt_tokens": 10,
                "completion_tokens": 20,
                "prompt_nanousd_per_mtok": 3_000_000_000,
                "completion_nanousd_per_mtok": 15_000_000_000,
            },
        }

    def reserve(self) -> None:
        closed = [call for call in self._settled if call.settled and call.settled[-1] < 0]
        call = self._random.choice(closed) if closed and self._random.random() < 0.5 else self._new_call()
        amount = self._random.randrange(1, 50_000_000)
        call.hold, call.held, call.attempt = call.hold + 1, amount, call.attempt + 1
        if call in self._settled:
            self._settled.remove(call)
        self._open.append(call)
        committed = self._move(call, amount)
        stamps = {
            "hold": call.hold,
            "cap_nanousd": self._cap(call),
            "deadline_ms": self._ms,
            **self._stamps(call, cap=True),
        }
        self.append("budget-reserved", call, amount, {**stamps, **self._order(call)}, committed=committed)

    def extend(self) -> None:
        if not self._open:
            return
        call, amount = self._random.choice(self._open), self._random.randrange(1, 9_000_000)
        call.held += amount
        committed = self._move(call, amount)
        stamps = {"hold": call.hold, "cap_nanousd": self._cap(call), **self._stamps(call, cap=True)}
        self.append(
            "budget-reserved", call, amount, {**stamps, "kind": "extension", **self._order(call)}, committed=committed
        )

    def model_called(self) -> None:
        if not self._open:
            return
        call = self._random.choice(self._open)
        payload: dict[str, Any] = {
            "hold": call.hold,
            "model": self._random.choice(["m/large", "m/small"]),
            "outcome": "timeout",
            "latency_ms": self._random.randrange(90_000),
            "charge_nanousd": call.held,
            "charge_basis": "assumed",
        }
        if self._random.random() < 0.7:
            usage = {
                "prompt_tokens": self._random.randrange(1, 9_000),
                "completion_tokens": self._random.randrange(1, 900),
            }
            if self._random.random() < 0.3:
                usage |= {"cached_tokens": 7, "cache_write_tokens": 5, "reasoning_tokens": 11}
            payload |= {
                "outcome": "ok",
                "http_status": 200,
                "usage": usage,
                "generation_id": f"gen-{len(self.entries)}",
                "model_used": "m/large-2026",
                "charge_basis": "reported",
                "finish_reason": "stop",
            }
        self.append("model-called", call, 0, payload, committed=self._balances[call.budgets[0]])

    def fall_back(self) -> None:
        if not self._open:
            return
        call = self._random.choice(self._open)
        call.attempt += 1
        payload = {"hold": call.hold, "from_model": "m/large", "to_model": "m/small", "reason": "timeout"}
        self.append("fallback-used", call, 0, payload, committed=self._balances[call.budgets[0]])

    def settle(self) -> None:
        if not self._open:
            return
        call = self._open.pop(self._random.randrange(len(self._open)))
        outcome = self._random.choice(["done", "done", "failed", "expired", "taken_over"])
        cost = self._random.choice([0, self._random.randrange(call.held + 1), call.held + 5_000])
        committed = self._move(call, cost - call.held)
        payload: dict[str, Any] = {"hold": call.hold, "hold_nanousd": call.held, **self._stamps(call)}
        if cost > call.held:
            payload["overage_nanousd"] = cost - call.held
        payload |= {"basis": "released" if cost == 0 else "reported", "outcome": outcome}
        if outcome != "done":
            payload |= {"reason": f"it {outcome}", "assumed_nanousd": cost}
        self.append("cost-recorded", call, cost, payload, committed=committed)
        call.held = 0
        call.settled.append(-cost - 1 if outcome == "taken_over" else cost)
        self._settled.append(call)

    def adjust(self) -> None:
        done = [call for call in self._settled if call.settled[-1] > 0]
        if not done:
            return
        call = self._random.choice(done)
        difference = self._random.randrange(-call.settled[-1], 1_000)
        call.settled[-1] += difference
        committed = self._move(call, difference)
        payload = {
            "hold": call.hold,
            "assumed_nanousd": self._random.randrange(-9, 9),
            **self._stamps(call),
            "basis": "reported",
            "reason": "late charge",
            "author": "reconciler",
        }
        self.append("cost-adjusted", call, difference, payload, committed=committed)

    def charge(self) -> None:
        call, cost = self._new_call(), self._random.randrange(9_000_000)
        committed = self._move(call, cost)
        payload = {
            **self._stamps(call),
            "basis": "reported",
            "outcome": "recorded",
            "model": "m/other",
            "usage": {"prompt_tokens": 5},
        }
        self.append("cost-recorded", call, cost, payload, committed=committed)

    def deny(self) -> None:
        call = self._new_call()
        call.attempt = 1
        refusing = self._random.choice(call.budgets)
        cap = self._cap(call) if refusing == call.budgets[0] else 2 * CAP
        payload = {
            "budget": refusing,
            "cap_nanousd": cap,
            "settled_nanousd": 1,
            "held_nanousd": 0,
            "reason": self._random.choice(["cap", "wait_timeout"]),
            **self._order(call),
        }
        self.append("budget-denied", call, cap, payload, committed=self._balances.get(call.budgets[0], 0))

    def assign(self) -> None:
        call = self._new_call()
        self._caps[call.user] = cap = self._random.randrange(10_000_000_000, 40_000_000_000)
        self._plans[call.user] = "growth"
        payload = {"plan": "growth", "cap_nanousd": cap, "author": "ops", "reason": "asked"}
        self.append("plan-assigned", call, 0, payload, committed=self._known(call))

    def credit(self) -> None:
        call, amount = self._new_call(), self._random.randrange(1, 5_000_000_000)
        name = call.budgets[0]
        self._credits[name] = self._credits.get(name, 0) + amount
        self.append("credit-granted", call, amount, {"author": "ops", "reason": "sorry"}, committed=self._known(call))

    def revoke(self) -> None:
        """Take back part of the credit that some user's period has."""
        name = next((name for name, credit in sorted(self._credits.items()) if credit > 1), None)
        if name is None:
            self.credit()
            return
        call, amount = self._new_call(), self._random.randrange(1, self._credits[name])
        call.budgets = (name, *call.budgets[1:])
        _, call.user, call.period = split_budget_name(name)
        self._credits[name] -= amount
        self.append("credit-revoked", call, -amount, {"author": "ops", "reason": "twice"}, committed=self._known(call))

    def clear(self) -> None:
        user = next(iter(self._plans), None)
        if user is None:
            self.assign()
            return
        call = self._new_call()
        while call.user != user:
            call = self._new_call()
        del self._caps[user], self._plans[user]
        self.append("plan-cleared", call, 0, {"author": "ops", "reason": "ended"}, committed=self._known(call))

    def _known(self, call: Call) -> int | None:
        return self._balances.get(call.budgets[0]) if self._random.random() < 0.7 else None

    def seal(self) -> None:
        call = Call("", "", "", ("",), None)
        payload = {
            "segment": "s-1",
            "first_id": "1-0",
            "last_id": "2-0",
            "events": 2,
            "chain_before": "a",
            "chain_after": "b",
        }
        self.append("segment-sealed", call, 0, payload, committed=None)
