"""Bursts: hundreds of tasks of one user at once, with room for a few, and with room for all in the end."""

from pathlib import Path
from typing import Any, Final

import pytest
from redis.asyncio import Redis

from tests.servers import wait_until
from tests.system import REPLIES, GatedStandIn, RunningSystem, running_system
from tollbook.inference.bounds import TOKENS_PER_MESSAGE, TOKENS_PER_REQUEST
from tollbook.inference.setting_tables import CapTable, ConcurrencyTable
from tollbook.schemas.results import ErrorCode, TaskStatus
from tollbook.standin import StandInConfig

TASKS: Final = 500
USER: Final = "burst"
CONCURRENCY: Final = ConcurrencyTable(default=100)

# claude-3-haiku, nano-dollars a token: $0.25 and $1.25 per million.
PROMPT_PRICE: Final = 250
COMPLETION_PRICE: Final = 1_250


def make_task(number: int, *, user: str, completion_tokens: int, max_tokens: int) -> dict[str, str]:
    # The prompt's length does not depend on the number, so that all calls cost the same.
    return {
        "task": "score_post",
        "task_id": f"{user}-{number:03}",
        "user_id": user,
        "prompt": f"post {number:03} [[completion_tokens={completion_tokens:03}]]",
        "max_tokens": str(max_tokens),
        "reply_to": REPLIES,
    }


def cost_of(task: dict[str, str], completion_tokens: int) -> int:
    # The stand-in counts a quarter of the bytes, rounded up, and four tokens a message.
    prompt_tokens = -(-len(task["prompt"]) // 4) + 4
    return prompt_tokens * PROMPT_PRICE + completion_tokens * COMPLETION_PRICE


def bound_of(task: dict[str, str]) -> int:
    prompt_tokens = TOKENS_PER_REQUEST + TOKENS_PER_MESSAGE + len(task["prompt"])
    return prompt_tokens * PROMPT_PRICE + int(task["max_tokens"]) * COMPLETION_PRICE


async def spend_of_burst(running: RunningSystem) -> dict[str, Any]:
    return (await running.query("FROM spend WHERE user_id = 'burst'"))[0]


async def assert_cap_was_kept(running: RunningSystem, cap_nanousd: int) -> None:
    """G1 at every hold; G2; and the gate's sums equal the projector's."""
    holds = await running.query(
        "SELECT count(*) FILTER (committed_usd > cap_usd) AS over_cap, max(committed_usd) AS highest, "
        "max(cap_usd) AS cap FROM events WHERE type = 'budget-reserved'"
    )
    assert holds[0]["over_cap"] == 0
    assert holds[0]["highest"] * 10**9 <= cap_nanousd == holds[0]["cap"] * 10**9
    unsettled = await running.query(
        "SELECT call_id, hold FROM events WHERE kind = 'hold' OR type = 'cost-recorded' GROUP BY ALL "
        "HAVING count(*) FILTER (type = 'cost-recorded') <> 1 OR count(*) FILTER (kind = 'hold') <> 1"
    )
    assert unsettled == []
    assert await running.query("FROM discrepancies") == []


@pytest.mark.parametrize(
    ("workers", "is_projector_paused"),
    [
        pytest.param(1, False, id="one worker", marks=pytest.mark.slow),
        pytest.param(3, False, id="three workers"),
        pytest.param(1, True, id="projector paused", marks=pytest.mark.slow),
    ],
)
async def test_a_burst_with_budget_for_fifty_makes_exactly_fifty_calls(
    redis_client: Redis, server_url: str, tmp_path: Path, workers: int, is_projector_paused: bool
) -> None:
    """G1, G6: the check and the hold are one step, so a burst cannot slip between them."""
    affordable = 50
    tasks = [make_task(n, user=USER, completion_tokens=200, max_tokens=200) for n in range(TASKS)]
    cost, bound = cost_of(tasks[0], 200), bound_of(tasks[0])
    cap = (affordable - 1) * cost + bound  # The fiftieth call fits to the nano-dollar, and no fifty-first.
    async with running_system(
        tmp_path / "data",
        server_url,
        provider=GatedStandIn(StandInConfig(latency_ms=10)),
        workers=workers,
        concurrency=CONCURRENCY,
        caps=CapTable(users={USER: cap}),
    ) as running:
        projection = running.system.projection
        if is_projector_paused:
            projection.projector.pause()
        await running.publish("analysis", tasks)
        results = await running.answers(task["task_id"] for task in tasks)
        if is_projector_paused:
            assert projection.store.position().seq < affordable, "DuckDB knew next to nothing of the burst"
            projection.projector.resume()

        assert running.provider.requests == len(running.provider.book.entries) == affordable
        assert running.provider.book.totals() == {USER: affordable * cost}
        done = [result for result in results if result.status is TaskStatus.DONE]
        refused = [result for result in results if result.status is TaskStatus.DENIED]
        assert (len(done), len(refused)) == (affordable, TASKS - affordable)
        assert {result.error_code for result in refused} == {ErrorCode.PLAN_LIMIT_REACHED}
        assert {result.cost_usd for result in refused} == {0}
        spend = await spend_of_burst(running)
        assert spend["spent_usd"] * 10**9 == affordable * cost
        assert (spend["reserved_usd"], spend["calls"], spend["denied"]) == (0, affordable, TASKS - affordable)
        await assert_cap_was_kept(running, cap)
        assert await wait_until(lambda: _is_zero(running), what="every task acknowledged")


@pytest.mark.slow
async def test_a_burst_whose_costs_fit_is_served_in_full_and_delays_no_other_user(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    """G9: holds that together pass the cap ten times over only wait for each other."""
    at_once = TASKS // 10
    tasks = [make_task(n, user=USER, completion_tokens=100, max_tokens=2000) for n in range(TASKS)]
    others = [make_task(n, user="other", completion_tokens=100, max_tokens=2000) for n in range(20)]
    cost, bound = cost_of(tasks[0], 100), bound_of(tasks[0])
    cap = at_once * bound
    assert TASKS * bound == 10 * cap
    assert (TASKS - 1) * cost + bound <= cap
    async with running_system(
        tmp_path / "data", server_url, concurrency=CONCURRENCY, caps=CapTable(users={USER: cap})
    ) as running:
        await running.provider.shut(USER)
        await running.publish("analysis", tasks)
        await running.provider.wait_for_arrivals(at_once, user=USER)
        await running.publish("analysis", others)
        # No call of the burst is answered yet, all its money is held, and 450 of its tasks are before the others.
        answers = await running.answers(task["task_id"] for task in others)
        assert {answer.status for answer in answers} == {TaskStatus.DONE}
        assert running.provider.arrived[USER] == at_once
        await running.provider.open()
        results = await running.answers(task["task_id"] for task in tasks)

        assert {result.status for result in results} == {TaskStatus.DONE}
        assert running.provider.book.totals() == {USER: TASKS * cost, "other": len(others) * cost}
        order = await running.query(
            "SELECT max(seq) FILTER (user_id = 'other') AS others_last, "
            "min(seq) FILTER (user_id = 'burst') AS burst_first, count(*) FILTER (user_id = 'burst') AS burst "
            "FROM events WHERE type = 'cost-recorded'"
        )
        assert order[0]["others_last"] < order[0]["burst_first"]
        assert order[0]["burst"] == TASKS
        assert await running.query("SELECT 1 FROM events WHERE type = 'budget-denied'") == []
        spend = await spend_of_burst(running)
        assert spend["spent_usd"] * 10**9 == TASKS * cost
        assert (spend["reserved_usd"], spend["denied"]) == (0, 0)


async def _is_zero(running: RunningSystem) -> bool:
    return await running.pending() == 0
