"""A ledger for the report: two months, plans, campaigns, models, failures, fallbacks, refusals.

Raw entries, drawn from a seed and stamped as by the gate. Users follow a power law: a few of them make most calls.
"""

import bisect
import itertools
import json
import random
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Final

from tollbook.schemas.events import ENVELOPE_FIELDS
from tollbook.schemas.identifiers import budget_name, month_at

PLANS: Final = {"trial": 5_000_000_000, "starter": 15_000_000_000, "growth": 40_000_000_000}
_START_MS: Final = round(datetime(2026, 10, 5, 8, tzinfo=UTC).timestamp() * 1000)
_SPAN_MS: Final = 50 * 86_400_000
_CAMPAIGNS: Final = (None, None, "autumn", "newsletter", "onboarding", "winback")
_TASKS: Final = {
    "generate_draft": ("anthropic/claude-sonnet-4", "openai/gpt-4o-mini", 2_400),
    "score_post": ("anthropic/claude-3-haiku", "google/gemini-2.5-flash", 600),
    "extract_patterns": ("anthropic/claude-3-haiku", "google/gemini-2.5-flash", 900),
}
_FAILURES: Final = ("timeout", "http_error", "invalid_response", "connection_error")


class ReportLoad:
    """Draws calls; `entries` yields their events, a little less than four per call on average."""

    def __init__(self, *, users: int, mean_hold_nanousd: int = 3_000_000, seed: int = 1) -> None:
        self._draw = random.Random(seed)
        self._mean_hold = mean_hold_nanousd
        self._users = [f"user-{n:04}" for n in range(1, users + 1)]
        self._weights = list(itertools.accumulate(n**-0.8 for n in range(1, users + 1)))
        self._plans = self._draw.choices(list(PLANS), (6, 3, 1), k=users)
        self._settled: dict[str, int] = {}
        self._seq = 0
        self._n = 0

    def entries(self, calls: int) -> Iterator[list[Any]]:
        for n in range(calls):
            at_ms = _START_MS + _SPAN_MS * n // calls
            for kind, call, amount, committed, payload in self._call(n, at_ms):
                self._seq += 1
                values = (kind, 1, self._seq, *call, 1, amount, committed, json.dumps(payload, separators=(",", ":")))
                fields = [str(part).encode() for pair in zip(ENVELOPE_FIELDS, values, strict=True) for part in pair]
                yield [f"{at_ms}-{self._seq}".encode(), fields]

    def _call(self, n: int, at_ms: int) -> Iterator[tuple[Any, ...]]:
        draw, period = self._draw, month_at(at_ms).name
        place = bisect.bisect(self._weights, draw.random() * self._weights[-1])
        user, plan = self._users[place], self._plans[place]
        task = draw.choice(list(_TASKS))
        model, fallback, latency_ms = _TASKS[task]
        cap, budget, call = PLANS[plan], budget_name("user", user, period), (user, period, f"call-{n}")
        before, hold = self._settled.get(budget, 0), draw.randrange(self._mean_hold // 5, 9 * self._mean_hold // 5)
        cost = hold * draw.randrange(5, 60) // 100
        order: dict[str, Any] = {"task_type": task, "stream": "generation", "plan": plan, "worker": f"host-{n % 4}"}
        order["bound"] = {"model": model, "prompt_tokens": 300, "completion_tokens": 2_000}
        if (campaign := draw.choice(_CAMPAIGNS)) is not None:
            order["campaign_id"] = campaign
        if before + hold > cap:
            sums = {"budget": budget, "cap_nanousd": cap, "settled_nanousd": before, "held_nanousd": 0}
            yield "budget-denied", call, hold, before, {**sums, "reason": "cap", **order}
            return
        stamps = {"hold": 1, "cap_nanousd": cap, "deadline_ms": at_ms + 60_000}
        yield "budget-reserved", call, hold, before + hold, {**stamps, **order}
        if draw.random() < 0.03:
            reason = draw.choice(_FAILURES)
            failed = {"hold": 1, "model": model, "outcome": reason, "latency_ms": 4 * latency_ms, "charge_nanousd": 0}
            yield "model-called", call, 0, before + hold, {**failed, "charge_basis": "released"}
            change = {"hold": 1, "from_model": model, "to_model": fallback, "reason": reason}
            yield "fallback-used", call, 0, before + hold, change
            model = fallback
        usage = {"prompt_tokens": draw.randrange(40, 2_000), "completion_tokens": draw.randrange(8, 900)}
        answered = {
            "hold": 1, "model": model, "model_used": model, "outcome": "ok", "http_status": 200, "usage": usage,
            "latency_ms": round(latency_ms * draw.lognormvariate(0, 0.5)), "charge_nanousd": cost,
            "charge_basis": "reported", "finish_reason": "stop", "generation_id": f"gen-{n}",
        }  # fmt: skip
        yield "model-called", call, 0, before + hold, answered
        self._settled[budget] = before + cost
        recorded: dict[str, Any] = {"hold": 1, "hold_nanousd": hold, "basis": "reported", "outcome": "done"}
        if draw.random() < 0.005:
            recorded |= {"basis": "assumed", "assumed_nanousd": cost}
        yield "cost-recorded", call, cost, before + cost, recorded
