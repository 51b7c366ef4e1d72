"""Early request ids: the cost of an abandoned request is asked of its provider and not assumed (G3)."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from tests.calling import API_KEY, COMPLETION_TOKENS, PROMPT, PROMPT_BOUND, PROMPT_TOKENS, Calling, open_calling
from tests.servers import wait_until
from tests.system import BackgroundCommand
from tollbook.consumers.sweeper import Sweeper
from tollbook.inference.calls.holds import Hold
from tollbook.inference.calls.lost_requests import LostRequests
from tollbook.inference.calls.notes import Notes
from tollbook.inference.cost_lookup import CostLookup
from tollbook.inference.providers.clients import ProviderClients
from tollbook.inference.reconcile import Reconciliation, reconcile
from tollbook.ledger.errors import LedgerUnavailable
from tollbook.ledger.gate.gate import Gate
from tollbook.ledger.gate.requests import NoteRequest, OpenCall
from tollbook.schemas.events import CostRecorded, ModelCalled
from tollbook.standin.book import Entry

PRICE: Final = PROMPT_TOKENS * 3_000 + COMPLETION_TOKENS * 15_000
CUT_PRICE: Final = PROMPT_TOKENS * 3_000 + 1 * 15_000
BOUND: Final = PROMPT_BOUND * 3_750 + 2_000 * 15_000


@pytest.fixture
async def calling(redis_client: Redis, server_url: str, tmp_path: Path) -> AsyncIterator[Calling]:
    settings = {"dialect": "openrouter", "attempt_timeout_s": 30.0}
    async with open_calling(server_url, tmp_path, is_served=True, **settings) as calling:
        yield calling
        await calling.check_guarantees()


async def open_hold(calling: Calling, call_id: str = "t1", generation_id: str | None = "gen-1") -> OpenCall:
    """Leave a hold, as a worker that dies in mid-call does."""
    hold = await calling.runtime.reservations.reserve(calling.call(call_id))
    assert isinstance(hold, Hold)
    hold.begin_attempt()
    if generation_id is not None:
        await calling.runtime.ledger.note(hold.note_request(generation_id))
    return await found(calling, call_id)


async def found(calling: Calling, call_id: str = "t1") -> OpenCall:
    record = await calling.runtime.ledger.gates[0].call_record(call_id)
    assert record is not None
    return record.hold


def charge(calling: Calling, generation_id: str = "gen-1", nanousd: int = PRICE) -> None:
    calling.provider.book.charge(Entry(generation_id, "u1", "anthropic/claude-sonnet-4", 1, 1, nanousd, None))


async def noted(calling: Calling, call_id: str = "t1") -> str:
    """Return the id beside an open hold, once it is there."""

    async def is_noted() -> bool:
        record = await calling.runtime.ledger.gates[0].call_record(call_id)
        return record is not None and record.hold.generation_id is not None

    await wait_until(is_noted, what="the id of the request")
    generation_id = (await found(calling, call_id)).generation_id
    assert generation_id is not None
    return generation_id


async def reconciled(calling: Calling) -> Reconciliation:
    await calling.folded()
    async with ProviderClients.from_settings(calling.runtime.settings) as providers:
        costs = CostLookup(providers, calling.runtime.rules)
        return await reconcile(calling.query, calling.runtime.ledger, costs, author="test")


async def test_a_streamed_answer_costs_and_says_what_a_plain_one_does(calling: Calling) -> None:
    acquired = await calling.runtime.reservations.reserve(calling.call("t1"))
    assert isinstance(acquired, Hold)
    result = await calling.runtime.runner.run(calling.call("t1"), acquired)
    assert (result.status.value, result.finish_reason) == ("done", "stop")
    assert result.content == f"[stand-in] {COMPLETION_TOKENS} tokens of nothing."
    assert await calling.spent() == calling.booked() == PRICE
    assert (await found(calling)).generation_id is None


@pytest.mark.slow
async def test_worker_that_is_killed_between_headers_and_end_leaves_an_exact_book(
    calling: Calling, tmp_path: Path
) -> None:
    """At a cap that its hold uses up."""
    await calling.set_cap(BOUND)
    calling.script("stalled", None)
    settings = calling.runtime.settings
    environment = {
        "REDIS_URL": str(settings.redis_url),
        "TOLLBOOK_DATA_DIR": str(settings.data_dir),
        "OPENROUTER_BASE_URL": calling.provider.base_url,
        "OPENROUTER_API_KEY": API_KEY,
        "TOLLBOOK_DIALECT": "openrouter",
        "TOLLBOOK_PROVIDER_USER": "plain",
    }
    (tmp_path / "worker").mkdir()
    worker = await BackgroundCommand.start(
        "worker", "--streams", "generation", cwd=tmp_path / "worker", env=environment
    )
    try:
        fields = {"task": "generate_draft", "task_id": "t1", "user_id": "u1", "prompt": PROMPT}
        await calling.runtime.handle.redis.xadd("generation", fields)  # pyright: ignore[reportArgumentType]
        generation_id = await noted(calling)
    finally:
        worker.process.kill()
        await worker.end()
    await wait_until(lambda: generation_id in calling.provider.book.entries, what="the provider's charge")
    assert generation_id in calling.provider.cut_off
    await calling.runtime.reservations.take_over(calling.call("t1"), await found(calling))
    assert await calling.spent() == calling.booked() == CUT_PRICE
    assert await calling.assumed() == 0


async def leave(calling: Calling) -> str:
    """Begin a call, and leave once its request has an id; return that id."""
    hold = await calling.runtime.reservations.reserve(calling.call("t1"))
    assert isinstance(hold, Hold)
    running = asyncio.create_task(calling.runtime.runner.run(calling.call("t1"), hold))
    generation_id = await noted(calling)
    running.cancel()
    await asyncio.wait({running})
    assert running.cancelled()
    called = [event.payload for event in await calling.events("t1") if isinstance(event.payload, ModelCalled)]
    assert [(each.outcome, each.generation_id) for each in called] == [("abandoned", generation_id)]
    return generation_id


async def test_call_that_is_cancelled_closes_its_connection_and_asks_what_it_cost(calling: Calling) -> None:
    calling.script("stalled")
    generation_id = await leave(calling)
    assert generation_id in calling.provider.cut_off
    assert await calling.spent() == calling.booked() == CUT_PRICE
    assert await calling.assumed() == 0
    assert (await reconciled(calling)).asked == 0


async def test_sweeper_asks_the_provider_before_it_assumes(calling: Calling) -> None:
    charge(calling)
    await open_hold(calling)
    await expire(calling)
    assert await calling.spent() == PRICE
    assert await calling.assumed() == 0
    assert (await reconciled(calling)).asked == 0


async def test_sweeper_does_not_wait_for_one_provider_after_another(calling: Calling) -> None:
    call_ids = [f"t{number}" for number in range(5)]
    for call_id in call_ids:
        await open_hold(calling, call_id)
    all_are_asked = asyncio.Barrier(len(call_ids))

    async def ask(_user_id: str, _found: OpenCall) -> int:
        async with asyncio.timeout(10):
            await all_are_asked.wait()
        return PRICE

    gate, ledger = calling.runtime.ledger.gates[0], calling.runtime.ledger
    for call_id in call_ids:
        charge(calling, call_id)
    later = Later(gate)
    assert await Sweeper(ledger, [later], ask_cost=ask)._sweep_partition(later) == len(call_ids)  # pyright: ignore[reportArgumentType]
    assert await calling.spent() == len(call_ids) * PRICE
    assert await calling.assumed() == 0


class Later:
    """A gate at a time when every hold is overdue."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def __getattr__(self, name: str) -> Any:
        return getattr(self._gate, name)

    async def now_ms(self) -> int:
        return await self._gate.now_ms() + 3_600_000


@pytest.mark.slow
async def test_cost_that_is_reported_later_is_reconciled_once(calling: Calling) -> None:
    await open_hold(calling)
    await expire(calling)
    assert (await calling.spent(), await calling.assumed()) == (BOUND, BOUND)
    settled = [event.payload for event in await calling.events("t1") if isinstance(event.payload, CostRecorded)]
    assert [(each.outcome, each.basis, each.generation_id) for each in settled] == [("expired", "assumed", "gen-1")]
    assert (await reconciled(calling)).unknown == ["t1"]
    charge(calling)
    assert await reconciled(calling) == Reconciliation(asked=1, adjusted=1, difference_nanousd=PRICE - BOUND)
    assert await reconciled(calling) == Reconciliation()
    assert (await calling.spent(), await calling.assumed()) == (PRICE, 0)


async def test_late_answer_after_an_assumed_charge_is_not_corrected_twice(calling: Calling) -> None:
    calling.script("slow")
    calling.provider.config = type(calling.provider.config)(api_key=API_KEY, slow_ms=300)
    hold = await calling.runtime.reservations.reserve(calling.call("t1"))
    assert isinstance(hold, Hold)
    running = asyncio.create_task(calling.runtime.runner.run(calling.call("t1"), hold))
    generation_id = await noted(calling)
    entry = calling.provider.book.entries.pop(generation_id)
    await calling.runtime.reservations.take_over(calling.call("t1"), await found(calling))
    assert await calling.assumed() == BOUND
    calling.provider.book.charge(entry)
    assert (await running).status.value == "done"
    assert await calling.spent() == PRICE
    assert await reconciled(calling) == Reconciliation()
    assert (await calling.spent(), await calling.assumed()) == (PRICE, 0)


@pytest.mark.slow
async def test_hold_without_an_id_is_assumed(calling: Calling) -> None:
    charge(calling)
    await open_hold(calling, generation_id=None)
    await expire(calling)
    assert (await calling.spent(), await calling.assumed()) == (BOUND, BOUND)


@pytest.mark.slow
async def test_provider_that_does_not_answer_delays_the_sweep_once(calling: Calling) -> None:
    await calling.provider.stop()
    asked = list[float]()

    def monotonic() -> float:
        asked.append(1.0)
        return 1.0

    async with ProviderClients.from_settings(calling.runtime.settings) as providers:
        lost = LostRequests(providers, calling.runtime.policies, answer_timeout_s=0.2, monotonic=monotonic)
        with capture_logs() as lines:
            for call_id in ("t1", "t2", "t3"):
                hold = await open_hold(calling, call_id)
                assert await lost.cost("u1", hold) is None
                await calling.runtime.reservations.take_over(calling.call(call_id), hold)
    assert [line["event"] for line in lines if line["event"] == "provider.cost_not_told"].count(
        "provider.cost_not_told"
    ) == 2  # One of this test's lookup, one of the system's own.


@pytest.mark.slow
async def test_note_that_is_lost_is_logged_and_counted(calling: Calling) -> None:
    class Away:
        async def note(self, request: NoteRequest) -> None:
            raise LedgerUnavailable(request.call_id)

    notes = Notes(Away())  # pyright: ignore[reportArgumentType]
    with capture_logs() as lines:
        notes.start(
            NoteRequest(call_id="t1", user_id="u1", hold=1, attempt=1, provider="default", generation_id="gen-1")
        )
        await wait_until(lambda: notes.lost == 1, what="the note's failure")
    # The projector, beside it, tells how far it has folded.
    assert [line["event"] for line in lines if line["log_level"] == "warning"] == ["call.id_not_kept"]


async def expire(calling: Calling) -> None:
    """Sweep as if every hold were past its deadline."""
    runtime = calling.runtime
    sweeper = Sweeper(runtime.ledger, runtime.ledger.gates, ask_cost=runtime.lost_requests.cost)
    gate = runtime.ledger.gates[0]
    later_ms = await gate.now_ms() + 3_600_000
    assert await gate.overdue(later_ms) == ["t1"]
    assert await sweeper._expire(gate, "t1", later_ms)
