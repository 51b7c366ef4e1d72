"""The gate's contract: tables of commands and the answers that any server must give.

A row is a command, its arguments and its answer in the form of `tests/model.py`. The defaults
(user `u`, call `a`, cap 10, a hold of 4) are in `tests/gate_bench.py`; amounts are nano-dollars.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final

import pytest
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from tests.gate_bench import CAP, PERIOD, GateBench, open_bench
from tests.model import Answer
from tests.servers import PATIENCE_S, drop_functions
from tollbook.ledger.errors import LedgerAhead, LedgerDiverged, LedgerReplaced, ServerTooOld
from tollbook.ledger.gate.functions import LIBRARY, library_code, load_library
from tollbook.ledger.gate.gate import Gate, create_ledger
from tollbook.ledger.gate.replies import FunctionsMissing, WindowClosed
from tollbook.ledger.gate.requests import (
    AssignRequest,
    Baseline,
    BudgetCap,
    FinishedCall,
    OpenCall,
    Position,
    Reserved,
    ReserveRequest,
    Settled,
    Waiting,
)
from tollbook.ledger.keys import Keys
from tollbook.ledger.server.connection import connect
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.schemas.identifiers import EntryId, Window
from tollbook.schemas.money import MAX_NANOUSD

OWN: Final = "user:u:2026-11"
DAY: Final = "day:u:2026-11-05"
CAMPAIGN: Final = "campaign:spring:2026-11"
BOTH_BUDGETS: Final = (OWN, DAY)
ATTEMPT: Final = ("model-called",)
NOTHING: Final = Baseline(0, 0, Position())

Row = tuple[str, dict[str, Any], Answer]

SCENARIOS: dict[str, list[Row]] = {
    "a hold up to the last nano-dollar of the cap (G1)": [
        ("reserve", {"amount": CAP}, ("OK", 1, 1, CAP, CAP, CAP)),
        ("balance", {}, ("OK", (0, CAP, CAP))),
    ],
    "one nano-dollar over the cap (G1)": [
        ("reserve", {"amount": CAP + 1}, ("DENIED", OWN, 0, 0, CAP, CAP + 1, "cap")),
        ("balance", {}, ("OK", (0, 0, CAP))),
    ],
    "settled spend is in the way: refused for good": [
        ("reserve", {"amount": 7}, ("OK", 1, 1, 7, 7, CAP)),
        ("settle", {"cost": 7}, ("OK", 7)),
        ("reserve", {"call": "b", "amount": 4}, ("DENIED", OWN, 7, 0, CAP, 4, "cap")),
        ("reserve", {"call": "b", "amount": 4}, ("FINISHED", "denied", "", ("DENIED", OWN, 7, 0, CAP, 4, "cap"))),
        ("reserve", {"call": "c", "amount": 3}, ("OK", 1, 1, 3, 10, CAP)),
    ],
    "only an open hold is in the way: wait, then go (G9)": [
        ("reserve", {"amount": 7}, ("OK", 1, 1, 7, 7, CAP)),
        ("reserve", {"call": "b", "amount": 4}, ("WAIT", OWN, 0, 7, CAP)),
        ("settle", {"cost": 6}, ("OK", 6)),
        ("reserve", {"call": "b", "amount": 4}, ("OK", 1, 1, 4, 6 + 4, CAP)),
    ],
    "a wait that is over is a refusal": [
        ("reserve", {"amount": 7}, ("OK", 1, 1, 7, 7, CAP)),
        ("reserve", {"call": "b", "final": True}, ("DENIED", OWN, 0, 7, CAP, 4, "wait_timeout")),
        (
            "reserve",
            {"call": "b"},
            ("FINISHED", "denied", "", ("DENIED", OWN, 0, 7, CAP, 4, "wait_timeout")),
        ),
    ],
    "the last chance is taken where there is room": [
        ("reserve", {"amount": CAP, "final": True}, ("OK", 1, 1, CAP, CAP, CAP)),
    ],
    "a hold of nothing, for a model without a price": [
        ("reserve", {"amount": 0}, ("OK", 1, 1, 0, 0, CAP)),
        ("settle", {"cost": 0}, ("OK", 0)),
    ],
    "what costs nothing needs no room under a cap that is used up (G9)": [
        ("reserve", {}, ("OK", 1, 1, 4, 4, CAP)),
        ("reserve", {"call": "free", "amount": 0, "cap": 3}, ("OK", 1, 1, 0, 4, 3)),
        ("settle", {"cost": CAP + 1}, ("OK", CAP + 1)),
        ("reserve", {"call": "b", "amount": 1}, ("DENIED", OWN, CAP + 1, 0, CAP, 1, "cap")),
        ("reserve", {"call": "free again", "amount": 0}, ("OK", 1, 1, 0, CAP + 1, CAP)),
    ],
    "a trial refuses nothing, and is a hold where it fits": [
        ("reserve", {"amount": CAP + 1, "trial": True}, ("WAIT", OWN, 0, 0, CAP)),
        ("reserve", {"amount": 7, "trial": True}, ("OK", 1, 1, 7, 7, CAP)),
        ("reserve", {"call": "b", "trial": True}, ("WAIT", OWN, 0, 7, CAP)),
        ("reserve", {"call": "b", "amount": 3}, ("OK", 1, 1, 3, 10, CAP)),
        ("reserve", {"call": "b", "amount": 3, "trial": True}, ("OPEN", 1, 3, "worker", 0, 1, 0, 0, (OWN,), PERIOD)),
    ],
    "the largest amounts there are": [
        ("reserve", {"amount": MAX_NANOUSD, "cap": MAX_NANOUSD}, ("OK", 1, 1, MAX_NANOUSD, MAX_NANOUSD, MAX_NANOUSD)),
        ("settle", {"cost": MAX_NANOUSD}, ("OK", MAX_NANOUSD)),
        ("adjust", {"cost": MAX_NANOUSD - 1}, ("OK", -1, True)),
        ("balance", {"cap": MAX_NANOUSD}, ("OK", (MAX_NANOUSD - 1, 0, MAX_NANOUSD))),
    ],
    "a call that came twice is one call (G4)": [
        ("reserve", {"worker": "first"}, ("OK", 1, 1, 4, 4, CAP)),
        ("reserve", {"worker": "second"}, ("OPEN", 1, 4, "first", 0, 1, 0, 0, (OWN,), PERIOD)),
        ("settle", {"cost": 3}, ("OK", 3)),
        ("reserve", {"worker": "third"}, ("FINISHED", "settled", '{"done":1}', None)),
        ("balance", {}, ("OK", (3, 0, CAP))),
    ],
    "the id of a request is kept with the hold that pays for it (G3)": [
        ("reserve", {}, ("OK", 1, 1, 4, 4, CAP)),
        ("note", {"generation": "gen-1"}, ("OK",)),
        ("note", {"hold": 2}, ("UNKNOWN",)),
        ("reserve", {}, ("OPEN", 1, 4, "worker", 0, 1, 0, 0, (OWN,), PERIOD, "default", "gen-1")),
        ("record", {"extension": 6}, ("OK", 10)),
        ("reserve", {}, ("OPEN", 1, 10, "worker", 1, 2, 3, 1, (OWN,), PERIOD)),
        ("note", {"attempt": 1, "generation": "gen-1"}, ("OK",)),
        ("reserve", {}, ("OPEN", 1, 10, "worker", 1, 2, 3, 1, (OWN,), PERIOD)),
        ("note", {"attempt": 2, "provider": "own", "generation": "a=b"}, ("OK",)),
        ("reserve", {}, ("OPEN", 1, 10, "worker", 1, 2, 3, 1, (OWN,), PERIOD, "own", "a=b")),
        ("settle", {"cost": 9, "attempt": 2, "final": False}, ("OK", 9)),
        ("note", {"attempt": 2}, ("UNKNOWN",)),
    ],
    "the same call with other content (G4)": [
        ("reserve", {}, ("OK", 1, 1, 4, 4, CAP)),
        ("reserve", {"content": "other"}, ("CONFLICT",)),
        ("settle", {}, ("OK", 3)),
        ("reserve", {"content": "other"}, ("CONFLICT",)),
        ("charge", {"content": "other"}, ("CONFLICT",)),
        ("charge", {}, ("NEW", False)),
    ],
    "a call closed without a result is run again": [
        ("reserve", {}, ("OK", 1, 1, 4, 4, CAP)),
        ("settle", {"cost": 4, "final": False, "attempt_events": ATTEMPT}, ("OK", 4)),
        ("reserve", {"amount": 5}, ("OK", 2, 2, 5, 4 + 5, CAP)),
        ("settle", {"cost": 1}, ("SETTLED", 4, 0)),
        ("settle", {"cost": 1, "hold": 2}, ("OK", 4 + 1)),
        ("reserve", {}, ("FINISHED", "settled", '{"done":1}', None)),
    ],
    "a hold is settled once (G2)": [
        ("reserve", {}, ("OK", 1, 1, 4, 4, CAP)),
        ("settle", {"cost": 3, "assumed": 1}, ("OK", 3)),
        ("settle", {"cost": 3, "assumed": 1}, ("OK AGAIN",)),
        ("settle", {"cost": 2}, ("SETTLED", 3, 1)),
        ("settle", {"cost": 3, "assumed": 0}, ("SETTLED", 3, 1)),
        ("balance", {}, ("OK", (3, 0, CAP))),
    ],
    "a hold that never was": [
        ("settle", {}, ("UNKNOWN",)),
        ("record", {}, ("UNKNOWN",)),
        ("adjust", {}, ("UNKNOWN",)),
        ("reserve", {}, ("OK", 1, 1, 4, 4, CAP)),
        ("settle", {"hold": 2}, ("UNKNOWN",)),
        ("record", {"hold": 2}, ("UNKNOWN",)),
        ("adjust", {}, ("UNKNOWN",)),
        ("reserve", {"call": "b", "amount": 11}, ("DENIED", OWN, 0, 4, CAP, 11, "cap")),
        ("settle", {"call": "b"}, ("UNKNOWN",)),
    ],
    "more than the hold was charged: recorded, and the next call is refused (G1, G3)": [
        ("reserve", {"amount": 9}, ("OK", 1, 1, 9, 9, CAP)),
        ("settle", {"cost": 12}, ("OK", 12)),
        ("reserve", {"call": "b", "amount": 1}, ("DENIED", OWN, 12, 0, CAP, 1, "cap")),
    ],
    "other budgets than those of the hold": [
        ("reserve", {"further": [(DAY, 5)]}, ("OK", 1, 1, 4, 4, CAP)),
        ("settle", {}, ("MISMATCH", BOTH_BUDGETS)),
        ("record", {}, ("MISMATCH", BOTH_BUDGETS)),
        ("settle", {"budgets": (DAY, OWN)}, ("MISMATCH", BOTH_BUDGETS)),
        ("settle", {"budgets": BOTH_BUDGETS}, ("OK", 3)),
        ("adjust", {}, ("MISMATCH", BOTH_BUDGETS)),
        ("adjust", {"budgets": BOTH_BUDGETS}, ("OK", -1, True)),
        ("balance", {"further": [(DAY, 5)]}, ("OK", (2, 0, CAP), (2, 0, 5))),
    ],
    "all budgets or none": [
        ("reserve", {"amount": 6, "further": [(DAY, 5)]}, ("DENIED", DAY, 0, 0, 5, 6, "cap")),
        ("reserve", {"call": "b", "amount": 3, "further": [(DAY, 5)]}, ("OK", 1, 1, 3, 3, CAP)),
        ("reserve", {"call": "c", "amount": 3, "further": [(DAY, 5)]}, ("WAIT", DAY, 0, 3, 5)),
        ("reserve", {"call": "d", "amount": 11, "further": [(DAY, 5)]}, ("DENIED", OWN, 0, 3, CAP, 11, "cap")),
        ("balance", {"further": [(DAY, 5)]}, ("OK", (0, 3, CAP), (0, 3, 5))),
    ],
    "a refusal by one budget goes before a wait for another": [
        ("reserve", {"amount": 8}, ("OK", 1, 1, 8, 8, CAP)),
        ("reserve", {"call": "b", "amount": 3, "further": [(DAY, 2)]}, ("DENIED", DAY, 0, 0, 2, 3, "cap")),
    ],
    "a campaign's budget is shared by its users": [
        ("reserve", {"amount": 4, "further": [(CAMPAIGN, 6)]}, ("OK", 1, 1, 4, 4, CAP)),
        ("reserve", {"call": "b", "user": "v", "amount": 4, "further": [(CAMPAIGN, 6)]}, ("WAIT", CAMPAIGN, 0, 4, 6)),
        ("settle", {"cost": 2, "budgets": (OWN, CAMPAIGN)}, ("OK", 2)),
        ("reserve", {"call": "b", "user": "v", "amount": 4, "further": [(CAMPAIGN, 6)]}, ("OK", 1, 1, 4, 4, CAP)),
    ],
    "an extension within the cap": [
        ("reserve", {}, ("OK", 1, 1, 4, 4, CAP)),
        ("record", {"extension": 6}, ("OK", 10)),
        ("record", {"extension": 6}, ("OK", 10)),
        ("balance", {}, ("OK", (0, 10, CAP))),
        ("reserve", {}, ("OPEN", 1, 10, "worker", 1, 2, 3, 1, (OWN,), PERIOD)),
        ("settle", {"cost": 9, "attempt": 2}, ("OK", 9)),
    ],
    "an extension over the cap leaves the hold as it is": [
        ("reserve", {}, ("OK", 1, 1, 4, 4, CAP)),
        ("record", {"extension": 7}, ("WAIT", OWN, 0, 4, CAP)),
        ("record", {"extension": 11}, ("DENIED", OWN, 0, 4, CAP, 11, "cap")),
        ("reserve", {}, ("OPEN", 1, 4, "worker", 1, 1, 3, 1, (OWN,), PERIOD)),
        ("record", {"extension": 6}, ("OK", 10)),
    ],
    "an extension stands against all budgets of the hold": [
        ("reserve", {"further": [(DAY, 5)]}, ("OK", 1, 1, 4, 4, CAP)),
        ("record", {"extension": 2, "further": [(DAY, 5)]}, ("WAIT", DAY, 0, 4, 5)),
        ("record", {"extension": 1, "further": [(DAY, 5)]}, ("OK", 5)),
    ],
    "attempts are recorded without money": [
        ("reserve", {}, ("OK", 1, 1, 4, 4, CAP)),
        ("record", {"begun": 2, "spent": 1, "assumed": 0}, ("OK", 4)),
        ("record", {"begun": 3, "spent": 2, "assumed": 1}, ("OK", 4)),
        ("reserve", {}, ("OPEN", 1, 4, "worker", 2, 3, 2, 1, (OWN,), PERIOD)),
    ],
    "a record that is executed again after the next one winds nothing back (G3)": [
        ("reserve", {}, ("OK", 1, 1, 4, 4, CAP)),
        ("record", {"begun": 2, "spent": 0, "assumed": 0}, ("OK", 4)),
        ("record", {"begun": 3, "spent": 2, "assumed": 2, "extension": 3}, ("OK", 7)),
        ("record", {"begun": 2, "spent": 0, "assumed": 0}, ("OK", 7)),
        ("reserve", {}, ("OPEN", 1, 7, "worker", 2, 3, 2, 2, (OWN,), PERIOD)),
        # The last attempt is recorded without a next one: only the spent amount shows that it came later.
        ("record", {"begun": 4, "spent": 6, "assumed": 2, "extension": 9}, ("WAIT", OWN, 0, 7, CAP)),
        ("record", {"begun": 3, "spent": 2, "assumed": 2, "extension": 3}, ("OK", 7)),
        ("reserve", {}, ("OPEN", 1, 7, "worker", 3, 3, 6, 2, (OWN,), PERIOD)),
    ],
    "nothing is recorded for a settled hold": [
        ("reserve", {}, ("OK", 1, 1, 4, 4, CAP)),
        ("settle", {}, ("OK", 3)),
        ("record", {"extension": 1}, ("UNKNOWN",)),
        ("balance", {}, ("OK", (3, 0, CAP))),
    ],
    "a cost is adjusted to the true one, once (G3)": [
        ("reserve", {}, ("OK", 1, 1, 4, 4, CAP)),
        ("settle", {"cost": 4, "assumed": 4}, ("OK", 4)),
        ("adjust", {"cost": 1}, ("OK", 1 - 4, True)),
        ("adjust", {"cost": 1}, ("OK", 0, True)),
        ("adjust", {"cost": 6}, ("OK", 6 - 1, True)),
        ("settle", {"cost": 4, "assumed": 4}, ("SETTLED", 6, 0)),
        ("balance", {}, ("OK", (6, 0, CAP))),
    ],
    "a correction that is repeated late does not undo a newer one (G3)": [
        ("reserve", {}, ("OK", 1, 1, 4, 4, CAP)),
        ("settle", {"cost": 4, "assumed": 4}, ("OK", 4)),
        ("adjust", {"cost": 1, "seen": (4, 4)}, ("OK", 1 - 4, True)),
        ("adjust", {"cost": 1, "seen": (4, 4)}, ("OK", 0, True)),
        ("adjust", {"cost": 3, "seen": (1, 0)}, ("OK", 3 - 1, True)),
        ("adjust", {"cost": 1, "seen": (4, 4)}, ("CHANGED",)),
        ("adjust", {"cost": 1, "seen": (4, 4), "ends": True}, ("CHANGED",)),
        ("settle", {"cost": 4, "assumed": 4}, ("SETTLED", 3, 0)),
        ("balance", {}, ("OK", (3, 0, CAP))),
    ],
    "an answer that came after its hold had expired ends the call (G3)": [
        ("reserve", {}, ("OK", 1, 1, 4, 4, CAP)),
        ("settle", {"cost": 4, "assumed": 4, "final": False}, ("OK", 4)),
        ("adjust", {"cost": 2, "result": '{"late":1}'}, ("OK", -2, True)),
        ("reserve", {}, ("FINISHED", "settled", '{"late":1}', None)),
    ],
    "a call that is known to be over ends without an answer, at whatever cost (G4)": [
        ("reserve", {}, ("OK", 1, 1, 4, 4, CAP)),
        ("settle", {"cost": 4, "final": False}, ("OK", 4)),
        ("adjust", {"cost": 4, "ends": True}, ("OK", 0, True)),
        ("adjust", {"cost": 4, "ends": True}, ("OK", 0, True)),
        ("reserve", {}, ("FINISHED", "settled", "", None)),
        ("balance", {}, ("OK", (4, 0, CAP))),
    ],
    "a call that somebody else runs again is not over": [
        ("reserve", {}, ("OK", 1, 1, 4, 4, CAP)),
        ("settle", {"cost": 4, "final": False, "attempt_events": ATTEMPT}, ("OK", 4)),
        ("reserve", {"worker": "second"}, ("OK", 2, 2, 4, 8, CAP)),
        ("adjust", {"cost": 4, "ends": True}, ("OK", 0, False)),
    ],
    "a late answer does not end a call that somebody else runs again": [
        ("reserve", {}, ("OK", 1, 1, 4, 4, CAP)),
        ("settle", {"cost": 4, "final": False, "attempt_events": ATTEMPT}, ("OK", 4)),
        ("reserve", {"worker": "second"}, ("OK", 2, 2, 4, 8, CAP)),
        ("adjust", {"cost": 2, "result": '{"late":1}'}, ("OK", -2, False)),
        ("settle", {"hold": 2, "cost": 1, "attempt": 2}, ("OK", 3)),
        ("reserve", {}, ("FINISHED", "settled", '{"done":1}', None)),
    ],
    "spend without a hold is recorded whatever the cap says": [
        ("charge", {"cost": 25}, ("NEW", True)),
        ("charge", {"cost": 25}, ("NEW", False)),
        ("charge", {"content": "other"}, ("CONFLICT",)),
        ("reserve", {"call": "b", "amount": 1}, ("DENIED", OWN, 25, 0, CAP, 1, "cap")),
        ("reserve", {}, ("FINISHED", "settled", "", None)),
        ("adjust", {"hold": 0, "cost": 5}, ("OK", -20, True)),
        ("balance", {}, ("OK", (5, 0, CAP))),
    ],
    "a plan is in force from this step on, over the caller's cap": [
        ("assign", {"amount": 20}, ("NEW", True)),
        ("reserve", {"amount": 20}, ("OK", 1, 1, 20, 20, 20)),
        ("assign", {"command": "l", "amount": 3}, ("NEW", True)),
        ("reserve", {"call": "b", "amount": 3, "cap": 1_000}, ("WAIT", OWN, 0, 20, 3)),
        ("assign", {"amount": 20}, ("NEW", False)),
        ("balance", {}, ("OK", (0, 20, 3))),
        ("assign", {"content": "other"}, ("CONFLICT",)),
    ],
    "credit adds up on top of the cap, for its user and period": [
        ("assign", {"amount": 2, "kind": "credit-granted"}, ("NEW", True)),
        ("assign", {"amount": 2, "kind": "credit-granted"}, ("NEW", False)),
        ("assign", {"command": "l", "amount": 3, "kind": "credit-granted"}, ("NEW", True)),
        ("assign", {"command": "m", "amount": 9, "kind": "credit-granted", "period": "2026-12"}, ("NEW", True)),
        ("balance", {}, ("OK", (0, 0, CAP + 2 + 3))),
        ("balance", {"user": "v"}, ("OK", (0, 0, CAP))),
        ("assign", {"command": "n", "amount": 1}, ("NEW", True)),
        ("balance", {}, ("OK", (0, 0, 1 + 2 + 3))),
    ],
    "cap and credit together stay below the largest amount": [
        ("assign", {"amount": MAX_NANOUSD}, ("NEW", True)),
        ("assign", {"command": "l", "amount": 5, "kind": "credit-granted"}, ("NEW", True)),
        ("balance", {}, ("OK", (0, 0, MAX_NANOUSD))),
    ],
    "a tail that is gone: baselines are needed again": [
        ("reserve", {}, ("OK", 1, 1, 4, 4, CAP)),
        ("trim", {}, ("OK", 0)),
        ("reserve", {"call": "b"}, ("STALE",)),
        ("balance", {}, ("STALE",)),
        ("charge", {"call": "c"}, ("STALE",)),
        ("record", {"extension": 1}, ("STALE",)),
        ("record", {}, ("OK", 4)),
        ("settle", {}, ("OK", 3)),
        ("trim", {}, ("OK", 2)),
        ("adjust", {"cost": 1}, ("STALE",)),
    ],
    "a user nobody has seen is held to the cap like any other": [
        ("reserve", {"user": "stranger", "amount": CAP + 1}, ("DENIED", "user:stranger:2026-11", 0, 0, 10, 11, "cap")),
    ],
}  # fmt: skip


@pytest.fixture
async def bench(every_redis_client: Redis) -> AsyncIterator[GateBench]:
    async with open_bench(every_redis_client) as bench:
        yield bench


@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_answers_are_those_of_the_table(bench: GateBench, scenario: str) -> None:
    for number, (name, arguments, expected) in enumerate(SCENARIOS[scenario], 1):
        assert (number, name, await bench.do(name, **arguments)) == (number, name, expected)


async def test_a_burst_from_many_workers_stays_within_the_cap(bench: GateBench, every_server_url: str) -> None:
    """G1, G6, G9: all decide by the same old baseline, at once; what fits is held and the rest waits."""
    async with AsyncExitStack() as stack:
        gates: list[Gate] = []
        for _ in range(5):
            client = await stack.enter_async_context(connect(every_server_url))
            pipeline = CommandPipeline(client)
            stack.push_async_callback(pipeline.aclose)
            gates.append(Gate(pipeline, bench.keys, "ledger-1", idempotency_ttl_s=60, result_ttl_s=60))
        replies = await asyncio.gather(
            *(gates[number % 5].reserve(_request(f"c{number}", 3), [NOTHING]) for number in range(200))
        )
    held = [reply for reply in replies if isinstance(reply, Reserved)]
    assert len(held) == CAP // 3
    assert all(isinstance(reply, Waiting) for reply in replies if reply not in held)
    assert sorted(reply.committed_nanousd for reply in held) == [3, 6, 9]
    assert await bench.do("balance") == ("OK", (0, 9, CAP))


async def test_one_call_sent_by_many_workers_at_once_is_one_hold(bench: GateBench) -> None:
    """G4."""
    replies = await asyncio.gather(*(bench.do("reserve", worker=f"w{number}") for number in range(50)))
    assert Counter(reply[0] for reply in replies) == {"OK": 1, "OPEN": 49}
    assert len(await bench.events()) == 1


def _request(call_id: str, amount: int) -> ReserveRequest:
    return ReserveRequest(
        call_id=call_id, user_id="u", window=Window(PERIOD, 0, 2**52), content_hash="c", amount_nanousd=amount,
        worker="w", lease_ms=60_000, payload="{}", budgets=(BudgetCap(OWN, CAP),),
    )  # fmt: skip


# -- What is on the stream


async def test_each_step_appends_its_events_in_order(bench: GateBench) -> None:
    await bench.reserve(amount=4)
    await bench.record(extension=2)
    await bench.settle(cost=7, attempt=2, attempt_events=("model-called",))
    await bench.adjust(cost=5)
    found = [(e["type"], e["seq"], e["attempt"], e["amount"], e["committed"]) for e in await bench.events()]
    assert found == [
        ("budget-reserved", "1", "1", "4", "4"),
        ("model-called", "2", "1", "0", "4"),
        ("fallback-used", "3", "1", "0", "4"),
        ("budget-reserved", "4", "2", "2", "6"),
        ("model-called", "5", "2", "0", "6"),
        ("cost-recorded", "6", "2", "7", "7"),
        ("cost-adjusted", "7", "1", "-2", "5"),
    ]


async def test_reads_waits_and_refusals_without_a_decision_append_nothing(bench: GateBench) -> None:
    await bench.reserve(amount=8)
    before = await bench.everything()
    assert (await bench.do("balance"))[0] == "OK"
    assert await bench.do("reserve", content="other") == ("CONFLICT",)
    assert (await bench.do("reserve"))[0] == "OPEN"
    assert await bench.do("settle", hold=2) == ("UNKNOWN",)
    assert await bench.everything() == before
    assert (await bench.do("reserve", call="b"))[0] == "WAIT"
    assert set(await bench.everything()) - set(before) == {bench.keys.waiters.encode()}


async def test_large_amounts_are_written_in_full(bench: GateBench) -> None:
    """Lua would write 1e+15."""
    await bench.reserve(amount=MAX_NANOUSD, cap=MAX_NANOUSD)
    assert (await bench.events())[0]["amount"] == "1" + 15 * "0"


async def test_a_call_may_be_held_against_many_budgets(bench: GateBench) -> None:
    further = [(f"campaign:c{number}:2026-11", 5) for number in range(100)]
    assert await bench.do("reserve", further=further) == ("OK", 1, 1, 4, 4, CAP)
    assert await bench.do("balance", further=further) == ("OK", (0, 4, CAP), *[(0, 4, 5)] * 100)


# -- Time


async def test_a_period_that_is_over_by_the_redis_clock_is_refused(bench: GateBench) -> None:
    now = await bench.gate.now_ms()
    for window in (Window(PERIOD, 0, now), Window(PERIOD, now + 3_600_000, now + 7_200_000)):
        with pytest.raises(WindowClosed) as refused:
            await bench.reserve(window=window)
        assert now <= refused.value.now_ms < now + 60_000
    assert await bench.events() == []


async def test_a_call_is_found_again_in_the_next_period(bench: GateBench) -> None:
    """G4: a task redelivered after the turn of the month is the same call, in its own period."""
    await bench.reserve()
    now = await bench.gate.now_ms()
    found = await bench.reserve(window=Window("2026-12", now + 1_000_000, now + 2_000_000))
    assert isinstance(found, OpenCall)
    assert found.period == PERIOD


async def test_a_late_correction_is_booked_in_the_period_of_its_hold(bench: GateBench) -> None:
    """G1, G3: otherwise the money that comes back would make room in a period in which it was never spent."""
    december = Window("2026-12", 0, 2**52)
    own, decembers = BudgetCap(OWN, CAP), BudgetCap("user:u:2026-12", CAP)
    nothing = [Baseline(0, 0, Position())]
    await bench.reserve(amount=8, further=[(DAY, 9)])
    await bench.settle(cost=8, assumed=8, final=False, budgets=BOTH_BUDGETS)
    request = ReserveRequest(
        call_id="a", user_id="u", window=december, content_hash="content", amount_nanousd=6, worker="second",
        lease_ms=60_000, payload="{}", budgets=(decembers,),
    )  # fmt: skip
    second = await bench.gate.reserve(request, nothing)
    assert isinstance(second, Reserved)
    assert second.committed_nanousd == 6

    assert await bench.do("adjust", cost=1, budgets=[decembers.name]) == ("MISMATCH", BOTH_BUDGETS)
    assert await bench.do("adjust", cost=1, budgets=BOTH_BUDGETS) == ("OK", 1 - 8, False)
    assert await bench.do("adjust", cost=2, budgets=BOTH_BUDGETS) == ("OK", 2 - 1, False)
    assert [event["period"] for event in await bench.events()][-2:] == ["2026-11", "2026-11"]
    balances = [
        await bench.gate.balance(user_id="u", period=period, budgets=[budget], baselines=nothing)
        for period, budget in (("2026-11", own), ("2026-11", BudgetCap(DAY, 9)), ("2026-12", decembers))
    ]
    assert [(b.settled_nanousd, b.held_nanousd) for (b,) in balances] == [(2, 0), (2, 0), (0, 6)]

    assert await bench.do("settle", hold=2, cost=5, budgets=[decembers.name]) == ("OK", 5)
    assert await bench.do("adjust", hold=2, cost=4, budgets=[decembers.name]) == ("OK", -1, True)
    assert await bench.do("settle", cost=8, assumed=8, budgets=BOTH_BUDGETS) == ("SETTLED", 2, 0)


async def test_an_open_hold_is_overdue_after_its_lease_until_it_is_settled(bench: GateBench) -> None:
    reserved = await bench.reserve(lease_ms=60_000)
    assert isinstance(reserved, Reserved)
    assert await bench.gate.overdue(reserved.deadline_ms) == []
    assert await bench.gate.overdue(reserved.deadline_ms + 1) == ["a"]
    await bench.settle()
    assert await bench.gate.overdue(reserved.deadline_ms + 1) == []


async def test_finished_calls_expire_and_open_ones_do_not(bench: GateBench) -> None:
    key = bench.keys.call("a")
    await bench.reserve()
    assert await bench.redis.ttl(key) == -1
    await bench.settle(final=False)
    assert 3_500 < await bench.redis.ttl(key) <= 3_600
    await bench.reserve()
    await bench.adjust(cost=1)
    assert await bench.redis.ttl(key) == -1, "a late correction of the first hold must not let the second expire"
    await bench.settle(hold=2)
    assert 3_500 < await bench.redis.ttl(key) <= 3_600
    assert 500 < await bench.redis.ttl(bench.keys.result("a")) <= 600


# -- Announcements


async def test_a_freed_budget_is_announced_once_to_those_who_wait(bench: GateBench) -> None:
    async with bench.redis.pubsub() as channel:
        await channel.subscribe(bench.keys.waiters)
        await bench.reserve(amount=8)
        await bench.reserve(call="b")
        await bench.settle(cost=8)
        await bench.reserve(call="c", amount=1)
        await bench.settle(call="c", cost=1)
        await bench.redis.publish(bench.keys.waiters, "end")
        heard = [message["data"] async for message in _until_end(channel)]
    assert heard == [OWN.encode()]


async def test_a_result_is_announced_under_its_key(bench: GateBench) -> None:
    async with bench.redis.pubsub() as channel:
        await channel.subscribe(bench.keys.result("a"))
        await bench.reserve()
        await bench.settle()
        message = await channel.get_message(ignore_subscribe_messages=False, timeout=PATIENCE_S)
        while message is not None and message["type"] != "message":
            message = await channel.get_message(timeout=PATIENCE_S)
    assert message is not None
    assert message["data"] == b"a"
    assert await bench.redis.get(bench.keys.result("a")) == b'{"done":1}'


async def _until_end(channel: Any) -> AsyncIterator[dict[str, Any]]:
    async for message in channel.listen():
        if message["type"] != "message":
            continue
        if message["data"] == b"end":
            return
        yield message


# -- Positions and baselines


async def test_a_baseline_ahead_of_the_ledger_is_refused(bench: GateBench) -> None:
    """G8: Redis was restored from an older backup than DuckDB."""
    await bench.reserve()
    with pytest.raises(LedgerAhead, match="DuckDB has folded 9 events, the ledger has only 1"):
        await bench.reserve("b", baselines=[Baseline(0, 0, Position(EntryId(2**45, 0), 9))])


async def test_a_baseline_that_the_tail_contradicts_is_refused(bench: GateBench) -> None:
    """G8: the stores disagree."""
    await bench.reserve()
    with pytest.raises(
        LedgerDiverged,
        match=r"settled \$0.000000004 and held \$0.000000000, the ledger says "
        r"settled \$0.000000000 and held \$0.000000004",
    ):
        await bench.reserve("b", baselines=[Baseline(4, 0, await bench.head())])


@pytest.mark.parametrize("folded", range(7))
async def test_a_baseline_at_any_position_gives_the_same_balance(bench: GateBench, folded: int) -> None:
    """G6: settled and held after each event, and what is left to the tail."""
    states = [(0, 0), (0, 4), (0, 5), (2, 1), (2, 4), (6, 0), (3, 0)]
    positions = [Position()]
    for step in (
        bench.reserve("a", 4),
        bench.reserve("b", 1),
        bench.settle("a", 2),
        bench.reserve("c", 3),
    ):
        await step
        positions.append(await bench.head())
    await bench.settle("b", 1)
    await bench.settle("c", 3)
    positions.append(await bench.head())
    await bench.adjust("c", 0)
    positions.append(await bench.head())
    baseline = Baseline(*states[folded], positions[folded])
    assert await bench.do("balance", baselines=[baseline]) == ("OK", (3, 0, CAP))


async def test_a_baseline_at_the_watermark_is_accepted_and_an_older_one_is_not(bench: GateBench) -> None:
    await bench.reserve(amount=4)
    before = await bench.head()
    await bench.settle(cost=3)
    watermark = await bench.head()
    assert await bench.do("trim", to=watermark.entry) == ("OK", 2)
    assert await bench.do("balance", baselines=[Baseline(3, 0, watermark)]) == ("OK", (3, 0, CAP))
    assert await bench.do("balance", baselines=[Baseline(0, 4, before)]) == ("STALE",)


async def test_the_watermark_never_moves_back(bench: GateBench) -> None:
    await bench.reserve(amount=4)
    before = await bench.head()
    await bench.settle(cost=3)
    await bench.trim()
    assert await bench.do("trim", to=before.entry) == ("OK", 0)
    assert await bench.do("balance", baselines=[Baseline(0, 4, before)]) == ("STALE",)


# -- The ledger's identity, and the library


async def test_a_ledger_keeps_the_identity_it_was_created_with(bench: GateBench) -> None:
    await bench.reserve()
    state = await create_ledger(bench.pipeline, bench.keys, ledger_id="other", partitions=7)
    assert (state.ledger_id, state.partitions, state.head.seq) == ("ledger-1", 1, 1)
    assert str(state.trimmed_to) == "0-0"


async def test_a_stream_without_its_identity_is_refused(bench: GateBench) -> None:
    await bench.reserve()
    await bench.redis.delete(bench.keys.meta)
    with pytest.raises(LedgerReplaced):
        await create_ledger(bench.pipeline, bench.keys, ledger_id="other", partitions=1)


OTHER_LEDGER = {
    "reserve": {}, "record": {}, "settle": {}, "adjust": {}, "charge": {}, "assign": {}, "balance": {},
    "trim": {"to": EntryId(1, 0)},
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_LEDGER)
@pytest.mark.parametrize(("found", "message"), [("ledger-2", "holds ledger ledger-2"), ("", "holds no ledger")])
async def test_nothing_is_done_on_another_ledger(bench: GateBench, name: str, found: str, message: str) -> None:
    """G8: Redis was emptied, or replaced by another."""
    await bench.reserve()
    await bench.redis.flushall()
    if found:
        await create_ledger(bench.pipeline, bench.keys, ledger_id=found, partitions=1)
    before = await bench.everything()
    with pytest.raises(LedgerReplaced, match=message):
        await getattr(bench, name)(**OTHER_LEDGER[name])
    assert await bench.everything() == before


async def test_a_server_that_lost_the_library_is_recognised(bench: GateBench) -> None:
    await drop_functions(bench.redis)
    with pytest.raises(FunctionsMissing):
        await bench.reserve()
    await load_library(bench.redis)
    assert await bench.do("reserve") == ("OK", 1, 1, 4, 4, CAP)


async def test_other_code_under_the_same_name_is_replaced(bench: GateBench) -> None:
    await bench.redis.function_load(library_code() + "\n-- other", replace=True)
    await load_library(bench.redis)
    (library,) = await bench.redis.function_list(LIBRARY, withcode=True)
    code = library[b"library_code"] if isinstance(library, dict) else library[library.index(b"library_code") + 1]
    assert code.decode() == library_code()


@asynccontextmanager
async def _server_that_says(url: str, said: dict[str, str]) -> AsyncIterator[Redis]:
    """A client of a real server, whose answer to INFO is the fault to inject."""

    class Client(Redis):
        async def info(self, section: str | None = None, *args: Any, **options: Any) -> dict[str, str]:
            return said

    async with Client.from_url(url) as client:
        yield client


@pytest.mark.parametrize("version", ["6.2.14", "5.0.7", "0"])
async def test_a_server_without_functions_is_refused(every_server_url: str, version: str) -> None:
    async with _server_that_says(every_server_url, {"redis_version": version}) as client:
        with pytest.raises(ServerTooOld, match=f"version {version}; Tollbook needs Redis 7.0 or later, or Valkey"):
            await load_library(client)


@pytest.mark.parametrize(
    "said", [{"redis_version": "7.0.0"}, {"redis_version": "8.2.1"}, {"redis_version": "6.9", "valkey_version": "9.1"}]
)
async def test_a_server_with_functions_is_accepted(every_server_url: str, said: dict[str, str]) -> None:
    async with _server_that_says(every_server_url, said) as client:
        await load_library(client)
        assert await client.function_list(LIBRARY)


# -- Partitions


async def test_partitions_are_ledgers_of_their_own(bench: GateBench) -> None:
    other = Keys("bench", 1)
    await create_ledger(bench.pipeline, other, ledger_id="ledger-1", partitions=2)
    gate = Gate(bench.pipeline, other, "ledger-1", idempotency_ttl_s=60, result_ttl_s=60)
    await bench.reserve(amount=8)
    budgets, nothing = (BudgetCap(OWN, CAP),), (Baseline(0, 0, Position()),)
    (balance,) = await gate.balance(user_id="u", period=PERIOD, budgets=budgets, baselines=nothing)
    assert balance.remaining_nanousd == CAP


async def test_credit_past_the_largest_amount_is_refused(bench: GateBench) -> None:
    def grant(command: str) -> AssignRequest:
        return AssignRequest(
            command_id=command, user_id="u", period=PERIOD, content_hash="c", type="credit-granted", plan="",
            amount_nanousd=MAX_NANOUSD, payload="{}", budget=OWN,
        )  # fmt: skip

    assert await bench.gate.assign(grant("k"))
    before = await bench.everything()
    with pytest.raises(ResponseError, match="TOLLBOOK credit out of bounds"):
        await bench.gate.assign(grant("l"))
    assert await bench.everything() == before


@pytest.mark.parametrize("amount", [CAP, 6], ids=["refused", "waited for"])
async def test_a_trial_that_does_not_fit_leaves_everything_as_it_was(bench: GateBench, amount: int) -> None:
    await bench.reserve(amount=7)
    await bench.settle(cost=2, final=False)
    await bench.reserve("other", amount=5)
    before = await bench.everything()
    assert isinstance(await bench.reserve("b", amount=amount, trial=True), Waiting)
    assert await bench.everything() == before


async def test_a_call_record_from_before_alerts_can_still_be_read(bench: GateBench) -> None:
    """G2, G4: a hold that is open is settled, and a repeat of its task is no conflict."""
    await bench.reserve("a", 4)
    await bench.reserve("b", 3)
    await bench.settle("b", 2)
    for call_id in ("a", "b"):
        key = bench.keys.call(call_id)
        record: Any = await bench.redis.get(key)
        head, _, rest = record.decode().partition("\n")
        await bench.redis.set(key, head.rsplit(" ", 2)[0] + "\n" + rest)
    assert isinstance(await bench.reserve("a", 4), OpenCall)
    assert isinstance(await bench.settle("a", 4), Settled)
    assert isinstance(await bench.reserve("b", 3), FinishedCall)
    assert [event["type"] for event in await bench.events()][-1] == "cost-recorded"


@pytest.mark.parametrize("policy", ["no JSON", '{"content":{"budgets":[{"name":"x","alerts":["half"]}]}}', None])
async def test_a_cost_is_booked_even_if_the_policy_was_broken_by_hand(bench: GateBench, policy: str | None) -> None:
    """G3: it raises no alert; processes that read the policy find that it is broken."""
    await bench.reserve("a", 4)
    await bench.redis.hset(bench.keys.meta, "policy_version", "1")
    if policy is not None:
        await bench.redis.hset(bench.keys.meta, "policy", policy)
    assert isinstance(await bench.settle("a", 3), Settled)
    assert (await bench.events())[-1]["amount"] == "3"
