"""A worker dies, or is only slow, at each step of a call's life; another takes over (G2, G3, G4).

The worker is a process of its own that is killed when a command or request of its gets to a border. What
each row expects is what the ledger, the stored result, the provider's book and the publisher see in the end.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
from redis.asyncio import Redis

from inference.standin import FaultPlan
from schemas.events import CostAdjusted, CostRecorded, Event, ModelCalled
from schemas.results import InferenceResult, TaskStatus
from tests.recovery.books import check_books, events_of, is_at_rest
from tests.recovery.border import Border, Moment
from tests.recovery.doomed import doomed_worker
from tests.servers import wait_until
from tests.system import REPLIES, RunningSystem, running_system, serving

STREAM: Final = "analysis"
USER: Final = "u1"
TASK_ID: Final = "t1"
# claude-3-haiku at $0.25 and $1.25 a million; the bound counts every byte, 32 for the message and 128 for the request.
PROMPT: Final = "a post [[completion_tokens=100]]"
COST: Final = (len(PROMPT) // 4 + 4) * 250 + 100 * 1_250
BOUND: Final = (len(PROMPT) + 32 + 128) * 250 + 500 * 1_250

RESERVE: Final = b"tollbook_v1_reserve"
RECORD: Final = b"tollbook_v1_record"
REQUEST: Final = b"POST /api/v1/chat/completions"
SETTLE: Final = b"tollbook_v1_settle"
ANSWER: Final = b"\r\n$4\r\nXADD\r\n$7\r\nreplies\r\n"
ACK: Final = b"\r\n$4\r\nXACK\r\n"

HELD: Final = ("budget-reserved", BOUND)
CALLED: Final = ("model-called", "ok", COST)
FAILED: Final = ("model-called", "http_error", 0)
SPENT: Final = ("cost-recorded", "reported", COST)
ASSUMED: Final = ("cost-recorded", "assumed", BOUND)
CORRECTED: Final = ("cost-adjusted", "reported", COST - BOUND)
GIVEN_BACK: Final = ("cost-adjusted", "released", -BOUND)

# What a run leaves behind that comes to its end; one that died with a request perhaps sent; one that died so with a
# failed attempt told; and what a late answer adds.
WHOLE: Final = (HELD, CALLED, SPENT)
LOST: Final = (HELD, ASSUMED)
TOLD: Final = (HELD, FAILED, ASSUMED)
LATE: Final = (CALLED, CORRECTED)
BUSY: Final = "http_503"


@dataclass(frozen=True, slots=True)
class Row:
    """`charged` counts the charges in the provider's book, `answers` what the publisher finds on its stream."""

    name: str
    moment: Moment
    ledger: Sequence[tuple[Any, ...]]
    charged: int
    answers: int
    first_reply: str | None = None


def before(said: bytes) -> Moment:
    return Moment("before", said)


def after(said: bytes) -> Moment:
    return Moment("after", said)


SECOND_REQUEST: Final = Moment("after", REQUEST, number=2)

# fmt: off
DEAD: Final = (
    #   the worker dies                   at                ledger                  charged  answers
    Row("before it reserves",             before(RESERVE),  WHOLE,                        1, 1),
    Row("reserved, reply lost",           after(RESERVE),   (*LOST, *WHOLE),              1, 1),
    Row("before the request is sent",     before(REQUEST),  (*LOST, *WHOLE),              1, 1),
    Row("request sent, reply lost",       after(REQUEST),   (*LOST, *WHOLE),              2, 1),
    Row("reply received, before settle",  before(SETTLE),   (*LOST, *WHOLE),              2, 1),
    Row("settled, reply lost",            after(SETTLE),    WHOLE,                        1, 1),
    Row("before the answer",              before(ANSWER),   WHOLE,                        1, 1),
    Row("answered, reply lost",           after(ANSWER),    WHOLE,                        1, 2),
    Row("before it acknowledges",         before(ACK),      WHOLE,                        1, 2),
    Row("acknowledged, reply lost",       after(ACK),       WHOLE,                        1, 1),
    # A first attempt that failed without a charge, and the second under the same hold.
    Row("before the failure is told",     before(RECORD),   (*LOST, *WHOLE),              1, 1, BUSY),
    Row("failure told, reply lost",       after(RECORD),    (*TOLD, *WHOLE),              1, 1, BUSY),
    Row("retried, reply lost",            SECOND_REQUEST,   (*TOLD, *WHOLE),              2, 1, BUSY),
)

SLOW: Final = (
    #   the worker goes on after          at                ledger                  charged  answers
    Row("before it reserves",             before(RESERVE),  WHOLE,                        1, 2),
    Row("reserved, reply late",           after(RESERVE),   (*LOST, *WHOLE, *LATE),       2, 2),
    Row("before the request is sent",     before(REQUEST),  (*LOST, *WHOLE, *LATE),       2, 2),
    Row("request sent, reply late",       after(REQUEST),   (*LOST, *WHOLE, *LATE),       2, 2),
    Row("reply received, before settle",  before(SETTLE),   (*LOST, *WHOLE, *LATE),       2, 2),
    Row("settled, reply late",            after(SETTLE),    WHOLE,                        1, 2),
    Row("before the answer",              before(ANSWER),   WHOLE,                        1, 2),
    Row("before it acknowledges",         before(ACK),      WHOLE,                        1, 2),
    Row("before the failure is told",     before(RECORD),   (*LOST, *WHOLE, FAILED, GIVEN_BACK), 1, 1, BUSY),
    Row("failure told, reply late",       after(RECORD),    (*TOLD, *WHOLE, *LATE),       2, 2, BUSY),
    Row("retried, reply late",            SECOND_REQUEST,   (*TOLD, *WHOLE, *LATE),       2, 2, BUSY),
)
# fmt: on


def summary(event: Event) -> tuple[Any, ...]:
    match event.payload:
        case ModelCalled(outcome=outcome, charge_nanousd=charge):
            return (event.type, outcome, charge)
        case CostRecorded(basis=basis) | CostAdjusted(basis=basis):
            return (event.type, basis, event.amount)
        case _:
            return (event.type, event.amount)


@pytest.fixture
async def running(redis_client: Redis, server_url: str, tmp_path: Path) -> AsyncIterator[RunningSystem]:
    async with running_system(tmp_path / "data", server_url, workers=0, claim_after_s=2.0) as running:
        yield running


async def answers(running: RunningSystem) -> list[InferenceResult]:
    entries: Any = await running.redis.xrange(REPLIES)
    return [InferenceResult.model_validate_json(fields[b"result"]) for _, fields in entries]


async def publish(running: RunningSystem) -> None:
    task = {"task": "score_post", "task_id": TASK_ID, "user_id": USER, "prompt": PROMPT, "reply_to": REPLIES}
    await running.publish(STREAM, [task])


async def check(running: RunningSystem, row: Row, directory: Path) -> None:
    """See that the row came true, and that the books agree."""
    assert [summary(event) for event in await events_of(running)] == list(row.ledger)
    assert running.provider.book.totals()[USER] == row.charged * COST
    stored = await running.system.handle.results.get(TASK_ID)
    assert stored is not None
    assert (stored.status, stored.cost_usd * 10**9) == (TaskStatus.DONE, COST)
    # However often it is told: one result (G4).
    assert await answers(running) == [stored] * row.answers
    assert await running.dead_letters() == []
    await check_books(running, directory)


@pytest.mark.parametrize("row", DEAD, ids=lambda row: row.name)
async def test_a_dead_workers_task_ends_well(running: RunningSystem, tmp_path: Path, row: Row) -> None:
    if row.first_reply:
        running.provider.faults = FaultPlan(script=[row.first_reply])
    async with Border(running.system.redis_url, running.provider.base_url, row.moment) as border:
        await publish(running)
        async with doomed_worker(running, border) as worker:
            await border.is_reached()
            if row.moment.said == REQUEST and row.moment.side == "after":
                await wait_until(lambda: running.provider.requests == row.moment.number, what="the request's arrival")
            await worker.kill()
            await border.cut()
            await worker.fall_silent()
        async with serving(running, 1):
            await running.answers([TASK_ID])
            await is_at_rest(running)
    await check(running, row, tmp_path)


@pytest.mark.parametrize("row", SLOW, ids=lambda row: row.name)
async def test_a_slow_workers_call_ends_at_its_true_cost(running: RunningSystem, tmp_path: Path, row: Row) -> None:
    """What it does after the take-over corrects the books and changes no result."""
    if row.first_reply:
        running.provider.faults = FaultPlan(script=[row.first_reply])
    async with Border(running.system.redis_url, running.provider.base_url, row.moment) as border:
        await publish(running)
        async with doomed_worker(running, border) as worker:
            await border.is_reached()
            await worker.fall_silent()
            async with serving(running, 1):
                await running.answers([TASK_ID])
                await is_at_rest(running)
                border.open()

                async def has_gone_on() -> bool:
                    return (
                        len(await events_of(running)) >= len(row.ledger) and len(await answers(running)) >= row.answers
                    )

                await wait_until(has_gone_on, what="what the slow worker does")
                await is_at_rest(running)
    await check(running, row, tmp_path)
    if row.charged == 2:
        assert sum(event.amount for event in await events_of(running) if event.type != "budget-reserved") == 2 * COST
