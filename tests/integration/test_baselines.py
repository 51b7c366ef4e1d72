"""Kept baselines: how often DuckDB is asked, and what happens while it cannot be."""

import asyncio
from collections.abc import Sequence

import pytest

from tollbook.ledger.errors import BaselineUnavailable, LedgerAhead, LedgerError
from tollbook.ledger.gate.baselines import BaselinePage, Baselines
from tollbook.ledger.gate.requests import Baseline, Position
from tollbook.schemas.identifiers import EntryId

HERE = Position(EntryId(7, 0), 7)
ELSEWHERE = Position(EntryId(9, 0), 9)


class Reader:
    """The projection, at the boundary where it is read; a test may hold a read back."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []
        self.balances: dict[str, tuple[int, int]] = {"a": (1, 2), "b": (3, 4)}
        self.positions = {0: HERE, 1: ELSEWHERE}
        self.problem: Exception | None = None
        self.is_asked = asyncio.Event()
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def __call__(self, names: Sequence[str], /) -> BaselinePage:
        self.asked.append(tuple(names))
        self.is_asked.set()
        await self.may_answer.wait()
        if self.problem is not None:
            raise self.problem
        return BaselinePage(self.positions, {name: self.balances[name] for name in names if name in self.balances})


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
async def reader() -> Reader:
    return Reader()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def baselines(reader: Reader, clock: Clock) -> Baselines:
    return Baselines(reader, 0, monotonic=clock, max_age_s=3.0)


async def test_baselines_come_in_the_order_asked_for(baselines: Baselines) -> None:
    assert await baselines.get(["b", "a"]) == (Baseline(3, 4, HERE), Baseline(1, 2, HERE))


async def test_a_budget_without_spend_has_a_baseline_of_nothing_at_the_position_read(baselines: Baselines) -> None:
    assert await baselines.get(["new"]) == (Baseline(0, 0, HERE),)


async def test_the_position_is_the_partitions_own(reader: Reader, clock: Clock) -> None:
    assert await Baselines(reader, 1, monotonic=clock).get(["a"]) == (Baseline(1, 2, ELSEWHERE),)
    assert await Baselines(reader, 2, monotonic=clock).get(["a"]) == (Baseline(1, 2, Position()),)


@pytest.mark.parametrize(("age_s", "reads"), [(0.0, 1), (3.0, 1), (3.001, 2), (60.0, 2)])
async def test_a_baseline_is_kept_for_its_time(
    baselines: Baselines, reader: Reader, clock: Clock, age_s: float, reads: int
) -> None:
    await baselines.get(["a"])
    clock.now_s += age_s
    reader.balances["a"] = (5, 5)
    assert await baselines.get(["a"]) == (Baseline(1, 2, HERE) if reads == 1 else Baseline(5, 5, HERE),)
    assert len(reader.asked) == reads


async def test_a_fresh_baseline_is_read_whatever_is_kept(baselines: Baselines, reader: Reader) -> None:
    await baselines.get(["a"])
    reader.balances["a"] = (5, 5)
    assert await baselines.get(["a"], is_fresh=True) == (Baseline(5, 5, HERE),)
    assert await baselines.get(["a"]) == (Baseline(5, 5, HERE),)
    assert len(reader.asked) == 2


async def test_concurrent_misses_are_one_query(baselines: Baselines, reader: Reader) -> None:
    reader.may_answer.clear()
    first = asyncio.create_task(baselines.get(["a"]))
    await reader.is_asked.wait()
    later = [asyncio.create_task(baselines.get([name])) for name in ("b", "c", "b", "d", "c")]
    await asyncio.sleep(0)
    reader.may_answer.set()
    await asyncio.gather(first, *later)
    assert reader.asked == [("a",), ("b", "c", "d")]


async def test_a_request_during_a_read_gets_the_next_read(baselines: Baselines, reader: Reader) -> None:
    """A read under way may be older than the STALE reply that caused the request."""
    reader.may_answer.clear()
    first = asyncio.create_task(baselines.get(["a"], is_fresh=True))
    await reader.is_asked.wait()
    second = asyncio.create_task(baselines.get(["a"], is_fresh=True))
    await asyncio.sleep(0)
    reader.may_answer.set()
    await asyncio.gather(first, second)
    assert reader.asked == [("a",), ("a",)]


async def test_without_a_projection_an_old_baseline_still_serves(
    baselines: Baselines, reader: Reader, clock: Clock
) -> None:
    """G6: the gate knows whether it is still good."""
    await baselines.get(["a"])
    clock.now_s += 3_600
    reader.problem = BaselineUnavailable("down")
    assert await baselines.get(["a"]) == (Baseline(1, 2, HERE),)


@pytest.mark.parametrize("is_fresh", [False, True])
async def test_without_a_projection_an_unknown_budget_fails_closed(
    baselines: Baselines, reader: Reader, is_fresh: bool
) -> None:
    """G8."""
    reader.problem = BaselineUnavailable("down")
    with pytest.raises(BaselineUnavailable, match="down"):
        await baselines.get(["a", "b"], is_fresh=is_fresh)


async def test_an_old_baseline_never_passes_for_a_fresh_one(baselines: Baselines, reader: Reader) -> None:
    """G8: the gate has called the kept one stale."""
    await baselines.get(["a"])
    reader.problem = BaselineUnavailable("down")
    with pytest.raises(BaselineUnavailable):
        await baselines.get(["a"], is_fresh=True)


@pytest.mark.parametrize(
    ("problem", "raised"),
    [
        (RuntimeError("broken"), BaselineUnavailable),
        (KeyError("x"), BaselineUnavailable),
        (OSError("no route"), BaselineUnavailable),
        (LedgerAhead(folded_seq=2, ledger_seq=1), LedgerAhead),
    ],
)
async def test_whatever_goes_wrong_the_check_fails_closed_and_recovers(
    baselines: Baselines, reader: Reader, problem: Exception, raised: type[LedgerError]
) -> None:
    """G8."""
    reader.problem = problem
    outcomes = await asyncio.gather(*(baselines.get([name]) for name in "abc"), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [raised] * 3
    reader.problem = None
    assert await baselines.get(["a"]) == (Baseline(1, 2, HERE),)


async def test_a_cancelled_request_does_not_cancel_others(baselines: Baselines, reader: Reader) -> None:
    reader.may_answer.clear()
    first, second = (asyncio.create_task(baselines.get(["a"])) for _ in range(2))
    await reader.is_asked.wait()
    first.cancel()
    await asyncio.sleep(0)
    reader.may_answer.set()
    assert await second == (Baseline(1, 2, HERE),)
    assert first.cancelled()


async def test_cancelled_requests_leave_nothing_behind(baselines: Baselines, reader: Reader) -> None:
    reader.may_answer.clear()
    reader.problem = BaselineUnavailable("down")
    task = asyncio.create_task(baselines.get(["a"]))
    await reader.is_asked.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    reader.problem = None
    reader.may_answer.set()
    assert await baselines.get(["a"]) == (Baseline(1, 2, HERE),)
