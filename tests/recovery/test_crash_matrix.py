"""A worker dies, or is only slow, at each step of a call's life; another takes over (G2, G3, G4).

The worker is a process of its own that is killed when a command or request of its gets to a border. What
each row expects is what the ledger, the stored result, the provider's book and the publisher see in the end.
All of it is tried on one server; each border also on a cluster with replicas and on two servers with a Sentinel, where
the worker waits until replicas have each write.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio
from redis.asyncio import Redis

from tests.deployments import CLUSTER, ONE, REPLICATED, SENTINEL, Deployment, deployed, one_server
from tests.recovery.books import check_books, events_of, is_at_rest
from tests.recovery.border import Border, Moment
from tests.recovery.doomed import doomed_worker
from tests.servers import wait_until
from tests.system import REPLIES, RunningSystem, running_system, serving
from tollbook.inference.client import InferenceClient
from tollbook.inference.setting_tables import CapTable
from tollbook.schemas.events import CostAdjusted, CostRecorded, Event, ModelCalled
from tollbook.schemas.results import ErrorCode, InferenceResult, TaskStatus
from tollbook.standin import FaultPlan

pytestmark = pytest.mark.slow

STREAM: Final = "analysis"
USER: Final = "u1"
TASK_ID: Final = "t1"
# claude-3-haiku at $0.25 and $1.25 a million; the bound counts every byte, 32 for the message and 128 for the request.
PROMPT: Final = "a post [[completion_tokens=100]]"
COST: Final = (len(PROMPT) // 4 + 4) * 250 + 100 * 1_250
BOUND: Final = (len(PROMPT) + 32 + 128) * 250 + 500 * 1_250
# gemini-2.5-flash at $0.30 and $2.50 a million, and $0.383333334 to write into a cache; costs round up.
FALLBACK_COST: Final = (len(PROMPT) // 4 + 4) * 300 + 100 * 2_500
FALLBACK_BOUND: Final = -(-(len(PROMPT) + 32 + 128) * 383_333_334 // 10**6) + 500 * 2_500

RESERVE: Final = b"tollbook_v2_reserve"
RECORD: Final = b"tollbook_v2_record"
REQUEST: Final = b"POST /api/v1/chat/completions"
NOTE: Final = b"tollbook_v2_note"
SETTLE: Final = b"tollbook_v2_settle"
ANSWER: Final = b"\r\n$4\r\nXADD\r\n$7\r\nreplies\r\n"
ACK: Final = b"\r\n$4\r\nXACK\r\n"
# Its first field: tidying calls the same function without a letter.
BURY: Final = b"\r\n$6\r\nstream\r\n"
# {tollbook:P}:result:t1, in whichever partition; no other key that is set is as long.
PUT: Final = b"\r\n$3\r\nSET\r\n$22\r\n{tollbook:"

HELD: Final = ("budget-reserved", BOUND)
CALLED: Final = ("model-called", "ok", COST)
FAILED: Final = ("model-called", "http_error", 0)
SPENT: Final = ("cost-recorded", "reported", COST)
ASSUMED: Final = ("cost-recorded", "assumed", BOUND)
CORRECTED: Final = ("cost-adjusted", "reported", COST - BOUND)
# A reply that cannot be read may have been charged, so that the fallback needs a larger hold.
UNREAD: Final = ("model-called", "invalid_response", BOUND)
EXTENDED: Final = ("budget-reserved", FALLBACK_BOUND)
BOTH_ASSUMED: Final = ("cost-recorded", "assumed", BOUND + FALLBACK_BOUND)
FELL_BACK: Final = ("fallback-used", 0)
FALLBACK_CALLED: Final = ("model-called", "ok", FALLBACK_COST)
FALLBACK_CORRECTED: Final = ("cost-adjusted", "assumed", FALLBACK_COST - FALLBACK_BOUND)
GIVEN_BACK: Final = ("cost-adjusted", "released", -BOUND)

# The events of a run that ends; of one that died with a request perhaps sent; of one that died so after a recorded
# failed attempt; and those that a late answer adds.
WHOLE: Final = (HELD, CALLED, SPENT)
LOST: Final = (HELD, ASSUMED)
TOLD: Final = (HELD, FAILED, ASSUMED)
LONGER: Final = (HELD, UNREAD, EXTENDED, BOTH_ASSUMED)
LATE: Final = (CALLED, CORRECTED)
FALLBACK_LATE: Final = (FELL_BACK, FALLBACK_CALLED, FALLBACK_CORRECTED)
BUSY: Final = "http_503"
BROKEN: Final = "broken_json"


@dataclass(frozen=True, slots=True)
class Row:
    """`charged` counts the charges in the provider's book, `answers` what the publisher finds on its stream.

    `fallbacks` counts the charges of the fallback model, beside those.
    """

    name: str
    moment: Moment
    ledger: Sequence[tuple[Any, ...]]
    charged: int
    answers: int
    first_reply: str | None = None
    fallbacks: int = 0


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
    Row("before the failure is recorded", before(RECORD),   (*LOST, *WHOLE),              1, 1, BUSY),
    Row("failure recorded, reply lost",   after(RECORD),    (*TOLD, *WHOLE),              1, 1, BUSY),
    Row("retried, reply lost",            SECOND_REQUEST,   (*TOLD, *WHOLE),              2, 1, BUSY),
    # A first attempt that may have been charged, and the fallback under an extended hold.
    Row("before the hold is extended",    before(RECORD),   (*LOST, *WHOLE),              2, 1, BROKEN),
    Row("hold extended, reply lost",      after(RECORD),    (*LONGER, *WHOLE),            2, 1, BROKEN),
    Row("fallback asked, reply lost",     SECOND_REQUEST,   (*LONGER, *WHOLE),            2, 1, BROKEN, 1),
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
    Row("before the failure is recorded", before(RECORD),   (*LOST, *WHOLE, FAILED, GIVEN_BACK), 1, 1, BUSY),
    Row("failure recorded, reply late",   after(RECORD),    (*TOLD, *WHOLE, *LATE),       2, 2, BUSY),
    Row("retried, reply late",            SECOND_REQUEST,   (*TOLD, *WHOLE, *LATE),       2, 2, BUSY),
    Row("hold extended, reply late",      after(RECORD),    (*LONGER, *WHOLE, *FALLBACK_LATE), 2, 2, BROKEN, 1),
    Row("fallback asked, reply late",     SECOND_REQUEST,   (*LONGER, *WHOLE, *FALLBACK_LATE), 2, 2, BROKEN, 1),
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


async def ledger_rows(running: RunningSystem) -> list[tuple[Any, ...]]:
    """Return what the ledger says behind the policy, with which each partition begins."""
    events = await events_of(running)
    applied = [event for event in events if event.type == "policy-applied"]
    assert len(applied) == len(running.system.handle.keys)
    return [summary(event) for event in events if event not in applied]


@pytest.fixture
def one(server_url: str) -> Deployment:
    return one_server(server_url)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Deployment]:
    async with deployed(CLUSTER, tmp_path_factory.mktemp(CLUSTER)) as deployment:
        yield deployment


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sentinel(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Deployment]:
    async with deployed(SENTINEL, tmp_path_factory.mktemp(SENTINEL)) as deployment:
        yield deployment


@pytest.fixture
def deployment(request: pytest.FixtureRequest) -> Deployment:
    """The suite's one server, unless a test names another kind; each is started once."""
    return request.getfixturevalue(getattr(request, "param", ONE))


@pytest.fixture
async def running(deployment: Deployment, tmp_path: Path) -> AsyncIterator[RunningSystem]:
    await deployment.empty()
    async with running_system(
        tmp_path / "data", deployment.url, workers=0, claim_after_s=2.0, **deployment.settings
    ) as running:
        yield running


@pytest.fixture
def border_at(running: RunningSystem, deployment: Deployment) -> Callable[[Moment], Border]:
    """Make a border around a worker of the system."""

    def make(moment: Moment) -> Border:
        return Border(running.system.redis_url, running.provider.base_url, moment, deployment.ports)

    return make


def everywhere(names: str, rows: Sequence[tuple[str, Moment, tuple[Any, ...]]]) -> pytest.MarkDecorator:
    """Try rows (name, moment, arguments) on one server, and of each moment the first also on the other deployments."""
    first: dict[Moment, str] = {}
    for name, moment, _ in rows:
        first.setdefault(moment, name)
    cases = [pytest.param(ONE, *arguments, id=name) for name, _, arguments in rows]
    cases += [
        pytest.param(kind, *arguments, id=f"{name} ({kind})")
        for kind in REPLICATED
        for name, moment, arguments in rows
        if first[moment] == name
    ]
    return pytest.mark.parametrize(f"deployment, {names}", cases, indirect=["deployment"])


async def answers(running: RunningSystem) -> list[InferenceResult]:
    entries: Any = await running.redis.xrange(REPLIES)
    return [InferenceResult.model_validate_json(fields[b"result"]) for _, fields in entries]


async def publish(running: RunningSystem) -> None:
    task = {"task": "score_post", "task_id": TASK_ID, "user_id": USER, "prompt": PROMPT, "reply_to": REPLIES}
    await running.publish(STREAM, [task])


async def check(running: RunningSystem, row: Row, directory: Path) -> None:
    """See that the row came true, and that the books agree."""
    assert await ledger_rows(running) == list(row.ledger)
    assert running.provider.book.totals()[USER] == row.charged * COST + row.fallbacks * FALLBACK_COST
    stored = await running.system.handle.results.get(TASK_ID)
    assert stored is not None
    assert (stored.status, stored.cost_usd * 10**9) == (TaskStatus.DONE, COST)
    # However often it is announced: one result (G4).
    assert await answers(running) == [stored] * row.answers
    assert await running.dead_letters() == []
    await check_books(running, directory)


@everywhere("row", [(row.name, row.moment, (row,)) for row in DEAD])
async def test_a_dead_workers_task_ends_well(
    running: RunningSystem, border_at: Callable[[Moment], Border], tmp_path: Path, row: Row
) -> None:
    if row.first_reply:
        running.provider.faults = FaultPlan(script=[row.first_reply])
    async with border_at(row.moment) as border:
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
async def test_a_slow_workers_call_ends_at_its_true_cost(
    running: RunningSystem, border_at: Callable[[Moment], Border], tmp_path: Path, row: Row
) -> None:
    """What it does after the take-over corrects the books and changes no result."""
    if row.first_reply:
        running.provider.faults = FaultPlan(script=[row.first_reply])
    async with border_at(row.moment) as border:
        await publish(running)
        async with doomed_worker(running, border) as worker:
            await border.is_reached()
            await worker.fall_silent()
            async with serving(running, 1):
                await running.answers([TASK_ID])
                await is_at_rest(running)
                border.open()

                async def has_gone_on() -> bool:
                    is_booked = len(await ledger_rows(running)) >= len(row.ledger)
                    return is_booked and len(await answers(running)) >= row.answers

                await wait_until(has_gone_on, what="what the slow worker does")
                await is_at_rest(running)
    await check(running, row, tmp_path)
    if row.charged == 2 and row.first_reply != BROKEN:
        assert sum(event.amount for event in await events_of(running) if event.type != "budget-reserved") == 2 * COST


# The reply has begun: its headers have the id under which the provider tells what the request cost.
STALLED_COST: Final = (len(PROMPT) // 4 + 4) * 250 + 1 * 1_250
NOTED: Final = Moment("after", NOTE)
BOTH_PARTLY: Final = ("cost-recorded", "assumed", BOUND + FALLBACK_COST)
# fmt: off
IN_ANSWER: Final = (
    #   the worker dies                     at            ledger                                     charged
    ("headers received, id not kept",       before(NOTE), (*LOST, *WHOLE),                           2 * COST,
     ("slow",)),
    ("id kept, between headers and end",    NOTED,        (HELD, SPENT, *WHOLE),                     2 * COST,
     ("slow",)),
    ("id kept, the provider stops with it", NOTED,        (HELD, ("cost-recorded", "reported", STALLED_COST), *WHOLE),
     STALLED_COST + COST, ("stalled",)),
    ("id of the fallback kept",             Moment("after", NOTE),
     (HELD, UNREAD, EXTENDED, BOTH_PARTLY, *WHOLE), 2 * COST + FALLBACK_COST, (BROKEN, "slow")),
)
# fmt: on


@everywhere("moment, ledger, charged, replies", [(row[0], row[1], row[1:]) for row in IN_ANSWER])
async def test_a_worker_that_dies_in_an_answer_leaves_what_the_provider_tells(
    running: RunningSystem,
    border_at: Callable[[Moment], Border],
    tmp_path: Path,
    moment: Moment,
    ledger: Sequence[tuple[Any, ...]],
    charged: int,
    replies: Sequence[str],
) -> None:
    """G3: nothing is assumed where the id of the request was kept with its hold."""
    running.provider.faults = FaultPlan(script=replies)
    book = running.provider.book
    async with border_at(moment) as border:
        await publish(running)
        async with doomed_worker(running, border) as worker:
            await border.is_reached()
            await worker.kill()
            await border.cut()
            await wait_until(lambda: len(book.entries) == len(replies), what="the provider's charge")
            await worker.fall_silent()
        async with serving(running, 1):
            await running.answers([TASK_ID])
            await is_at_rest(running)
    assert await ledger_rows(running) == list(ledger)
    assert book.totals()[USER] == charged
    stored = await running.system.handle.results.get(TASK_ID)
    assert stored is not None
    assert (stored.status, stored.cost_usd * 10**9) == (TaskStatus.DONE, COST)
    assert await answers(running) == [stored]
    await check_books(running, tmp_path)


TOOL: Final = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
IMAGE: Final = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
TASKS: Final[dict[str, tuple[dict[str, str], str | None]]] = {
    "tool calls": ({"task": "score_post", "prompt": PROMPT, "tools": json.dumps([TOOL])}, "tool_calls"),
    "an image": (
        {
            "task": "generate_draft",
            "messages": json.dumps([{"role": "user", "content": [{"type": "text", "text": PROMPT}, IMAGE]}]),
        },
        None,
    ),
}
# Of two requests the first is assumed, or told by its id; one that was settled is not asked again.
OTHER_MOMENTS: Final = (
    #                        requests  how the dead run's hold is settled
    (after(REQUEST),         2, "assumed"),
    (NOTED,                  2, "reported"),
    (before(SETTLE),         2, None),
    (after(SETTLE),          1, None),
)  # fmt: skip


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize(
    ("moment", "requests", "basis"),
    OTHER_MOMENTS,
    ids=["request sent", "id kept", "before it settles", "settled, reply lost"],
)
async def test_other_kinds_of_tasks_end_well_though_their_worker_dies(
    running: RunningSystem,
    border_at: Callable[[Moment], Border],
    tmp_path: Path,
    kind: str,
    moment: Moment,
    requests: int,
    basis: str | None,
) -> None:
    """G2, G3, G4."""
    fields, reply = TASKS[kind]
    # Where the border closes at the note, the answer must not come in the same breath.
    running.provider.faults = FaultPlan(script=[reply if moment != NOTED else "slow", reply])
    async with border_at(moment) as border:
        await running.publish(STREAM, [{"task_id": TASK_ID, "user_id": USER, "reply_to": REPLIES, **fields}])
        async with doomed_worker(running, border) as worker:
            await border.is_reached()
            await wait_until(lambda: len(running.provider.book.entries) == 1, what="the provider's charge")
            await worker.kill()
            await border.cut()
            await worker.fall_silent()
        async with serving(running, 1):
            await running.answers([TASK_ID])
            await is_at_rest(running)
    assert running.provider.requests == requests
    stored = await running.system.handle.results.get(TASK_ID)
    assert stored is not None
    assert (stored.status, bool(stored.tool_calls)) == (TaskStatus.DONE, kind == "tool calls")
    assert await answers(running) == [stored]
    recorded = [event.payload for event in await events_of(running) if isinstance(event.payload, CostRecorded)]
    assert len(recorded) == requests
    assert recorded[-1].basis == "reported"
    if basis is not None:
        assert recorded[0].basis == basis
    await check_books(running, tmp_path)


# What a worker does with a task that it cannot execute: four steps, none of which may be lost with it.
BURYING: Final = (
    #   the worker dies                    letters  answers
    ("before it is dead-lettered", before(BURY), 1, 1),
    ("dead-lettered, reply lost", after(BURY), 2, 1),
    ("its result is stored, reply lost", after(PUT), 2, 1),
    ("answered, reply lost", after(ANSWER), 2, 2),
)


@everywhere("moment, letters, replies", [(row[0], row[1], row[1:]) for row in BURYING])
async def test_a_malformed_task_is_dead_lettered_and_answered_although_its_worker_dies(
    running: RunningSystem,
    border_at: Callable[[Moment], Border],
    tmp_path: Path,
    moment: Moment,
    letters: int,
    replies: int,
) -> None:
    """It has one result, and at least one dead letter; nothing is held or asked for."""
    async with border_at(moment) as border:
        task = {"task": "do_magic", "task_id": TASK_ID, "user_id": USER, "reply_to": REPLIES}
        await running.publish(STREAM, [task])
        async with doomed_worker(running, border) as worker:
            await border.is_reached()
            await worker.kill()
            await border.cut()
            await worker.fall_silent()
        async with serving(running, 1):
            await is_at_rest(running)
    stored = await running.system.handle.results.get(TASK_ID)
    assert stored is not None
    assert stored.status is TaskStatus.INVALID
    assert await answers(running) == [stored] * replies
    assert [letter["reason"] for letter in await running.dead_letters()] == ["invalid_task"] * letters
    assert await ledger_rows(running) == []
    assert running.provider.requests == 0


@pytest.mark.parametrize("moment", [before(BURY), after(BURY)], ids=["before the letter", "after the letter"])
async def test_a_task_that_is_given_up_gets_its_letter_though_that_worker_dies_too(
    redis_client: Redis, server_url: str, tmp_path: Path, moment: Moment
) -> None:
    """The call ends with its settlement; a worker that finds it ended must still dead-letter the task."""
    async with running_system(
        tmp_path / "data", server_url, workers=0, claim_after_s=2.0, max_task_attempts=1
    ) as running:
        await publish(running)
        for at in (after(REQUEST), moment):
            async with (
                Border(running.system.redis_url, running.provider.base_url, at) as border,
                doomed_worker(running, border) as worker,
            ):
                await border.is_reached()
                await worker.kill()
                await border.cut()
                await worker.fall_silent()
        async with serving(running, 1):
            stored = (await running.answers([TASK_ID]))[0]
            await is_at_rest(running)
        assert stored.error_code is ErrorCode.ATTEMPTS_EXHAUSTED
        letters = await running.dead_letters()
        assert {(letter["reason"], letter["task_id"]) for letter in letters} == {("attempts_exhausted", TASK_ID)}
        assert await ledger_rows(running) == list(LOST)
        assert running.provider.requests <= 1


async def test_a_task_that_waits_for_money_is_not_lost_with_its_worker(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    """G9: nothing is held for it, so nothing is charged for the dead worker."""
    caps = CapTable(users={USER: 2 * BOUND - 1})
    async with running_system(tmp_path / "data", server_url, workers=0, claim_after_s=2.0, caps=caps) as running:
        await running.provider.shut()
        runtime = running.system.runtime
        client = InferenceClient("score_post", runtime)
        first = asyncio.create_task(client.call(PROMPT, user_id=USER, task_id="first"))
        await running.provider.wait_for_arrivals(1, user=USER)
        await publish(running)
        async with (
            Border(running.system.redis_url, running.provider.base_url, after(RESERVE)) as border,
            doomed_worker(running, border) as worker,
        ):
            await border.is_reached()
            await wait_until(lambda: running.redis.hlen(running.keys.waiters), what="the gate's WAIT")
            await worker.kill()
            await border.cut()
            await worker.fall_silent()
        async with serving(running, 1):
            await wait_until(lambda: runtime.reservations.waiting == 1, what="the next worker's wait")
            await running.provider.open()
            await first
            await running.answers([TASK_ID])
            await is_at_rest(running)
        assert [summary(event) for event in await events_of(running, TASK_ID)] == list(WHOLE)
        assert running.provider.book.totals()[USER] == 2 * COST
        await check_books(running, tmp_path)
