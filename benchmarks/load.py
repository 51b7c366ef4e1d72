"""The load of the benchmarks: typical calls, drawn from a seed.

`typical_entries` writes the three events of successful calls, stamped as by the gate, as raw
stream entries: much faster than real calls.
"""

import random
import time
from collections.abc import Iterable, Iterator
from typing import Any

from tollbook.ledger.gate.requests import BudgetCap, Reserved, ReserveRequest, SettleRequest
from tollbook.schemas.events import ENVELOPE_FIELDS, EVENT_VERSION
from tollbook.schemas.identifiers import Window, budget_name, month_at

CAP = 40_000_000_000
HOLD = 31_000_000
CONTENT_HASH = "9f86d081884c7d659a2feaa0c55ad015"
MODEL = "anthropic/claude-sonnet-4"
EVENTS_A_CALL = 3

# Payloads as inference/ writes them for a draft; only the numbers differ from call to call.
RESERVED = (
    '{{"task_type":"generate_draft","stream":"generation","plan":"growth","worker":"host-4711-a1b2c3.{n}",'
    '"bound":{{"model":"anthropic/claude-sonnet-4","prompt_tokens":312,"completion_tokens":2000,'
    '"prompt_nanousd_per_mtok":3000000000,"completion_nanousd_per_mtok":15000000000}}}}'
)
CALLED = (
    '{{"hold":1,"model":"anthropic/claude-sonnet-4","model_used":"anthropic/claude-sonnet-4","outcome":"ok",'
    '"http_status":200,"latency_ms":{latency},"usage":{{"prompt_tokens":78,"completion_tokens":{tokens}}},'
    '"generation_id":"gen-{n}","charge_nanousd":{cost},"charge_basis":"reported","finish_reason":"stop"}}'
)
HASH_STAMP = f'"content_hash":"{CONTENT_HASH}"'
RECORDED = '{"basis":"reported","outcome":"done"}'
RESULT = (
    '{{"task_id":"call-{n}","status":"done","content":"{content}","model_used":"anthropic/claude-sonnet-4",'
    '"token_count":178,"cost_usd":"0.001734","user_id":"user-1","task_type":"generate_draft"}}'
)


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def user_of(n: int) -> str:
    return f"user-{n:06}"


def budget_of(user: str, window: Window) -> str:
    return budget_name("user", user, window.name)


def reserve_request(call_id: str, user: str, window: Window, n: int, *, budgets: int = 1) -> ReserveRequest:
    """Return a reserve of a draft, against the user's budget and those of `budgets` - 1 teams."""
    teams = (budget_name("team", f"team-{each}-{n % 1_000}", window.name) for each in range(1, budgets))
    return ReserveRequest(
        call_id=call_id,
        user_id=user,
        window=window,
        content_hash=CONTENT_HASH,
        amount_nanousd=HOLD,
        worker=f"host-4711-a1b2c3.{n}",
        lease_ms=600_000,
        payload=RESERVED.format(n=n),
        budgets=tuple(BudgetCap(name, CAP) for name in (budget_of(user, window), *teams)),
    )


def settle_request(request: ReserveRequest, reserved: Reserved, n: int) -> SettleRequest:
    return SettleRequest(
        call_id=request.call_id,
        user_id=request.user_id,
        hold=reserved.hold,
        cost_nanousd=1_734_000,
        assumed_nanousd=0,
        attempt=reserved.attempt,
        is_final=True,
        payload=RECORDED,
        budgets=tuple(budget.name for budget in request.budgets),
        result=RESULT.format(n=n, content="x" * 200),
    )


def typical_entries(calls: int, *, users: int, seed: int = 1) -> Iterator[list[Any]]:
    """Yield raw entries in the order of the ledger; their ids end well before now, in the current month."""
    draw = random.Random(seed)
    window = month_at(now_ms())
    settled: dict[str, int] = {}
    seq = 0
    for n in range(calls):
        user, cost = user_of(draw.randrange(users)), draw.randrange(200_000, 2_000_000)
        before = settled.get(user, 0)
        settled[user] = before + cost
        reserved = (
            f'{{"hold":1,"cap_nanousd":{CAP},"deadline_ms":{window.end_ms},{HASH_STAMP},' + RESERVED.format(n=n)[1:]
        )
        called = CALLED.format(n=n, latency=draw.randrange(300, 9_000), tokens=draw.randrange(8, 200), cost=cost)
        recorded = f'{{"hold":1,"hold_nanousd":{HOLD},' + RECORDED[1:]
        for kind, amount, committed, payload in (
            ("budget-reserved", HOLD, before + HOLD, reserved),
            ("model-called", 0, before + HOLD, called),
            ("cost-recorded", cost, before + cost, recorded),
        ):
            seq += 1
            values = (kind, EVENT_VERSION, seq, user, window.name, f"call-{n}", 1, amount, committed, payload)
            fields = [str(part).encode() for pair in zip(ENVELOPE_FIELDS, values, strict=True) for part in pair]
            yield [f"{window.start_ms + seq // 100}-{seq % 100}".encode(), fields]


def tails_of(entries: Iterable[list[Any]]) -> dict[str, list[str]]:
    """Return the entries that the gate would have written on the tails for `typical_entries`, by budget."""
    tails: dict[str, list[str]] = {}
    for entry_id, fields in entries:
        event = dict(zip(fields[0::2], fields[1::2], strict=True))
        amount, committed = int(event[b"amount"]), int(event[b"committed"])
        if event[b"type"] == b"budget-reserved":
            entry = f"0 {amount} {committed - HOLD} {HOLD}"
        elif event[b"type"] == b"cost-recorded":
            entry = f"{amount} -{HOLD} {committed} 0"
        else:
            continue
        name = budget_name("user", event[b"user_id"].decode(), event[b"period"].decode())
        tails.setdefault(name, []).append(f"{entry_id.decode()} {entry}")
    return tails
