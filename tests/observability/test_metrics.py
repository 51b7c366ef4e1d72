"""The metrics equal the ledger's numbers, and name no user."""

from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from tests.observability.pages import Samples, scrape_until
from tests.recovery.books import is_at_rest
from tests.servers import wait_until
from tests.system import REPLIES, RunningSystem, running_system
from tollbook.inference.setting_tables import CapTable
from tollbook.ledger.keys import GROUP
from tollbook.ledger.projection.store import Store
from tollbook.ledger.projection.totals import LATENCY_BUCKETS_S, Totals
from tollbook.observability.catalogue import METRICS

HAIKU, SONNET = "anthropic/claude-3-haiku", "anthropic/claude-sonnet-4"
SECRET = "the-prompt-nobody-may-see"
USER = "user-who-is-nobodys-business"


def task(task_id: str, prompt: str = "a post", **fields: str) -> dict[str, str]:
    given = {"task": "score_post", "task_id": task_id, "user_id": USER, "prompt": f"{SECRET} {prompt}"}
    return {**given, "campaign_id": "campaign-of-theirs", "reply_to": REPLIES, **fields}


TASKS = [
    *(task(f"good-{n}") for n in range(20)),
    task("falls-back", model=SONNET, task="generate_draft"),
    task("overcharged", "[[fault=overcharge]]"),
    task("unknown-cost", "[[fault=reset_after_charge]]"),
    task("refused-by-provider", "[[fault=http_400]]"),
    task("another-model", model="openai/gpt-4o"),
    task("no-answer", "[[fault=reasoning_used_up_limit]]"),
    task("doubted", "[[fault=total_alone]]"),
    task("denied", user_id="poor-user", plan="trial"),
]


async def one(running: RunningSystem, sql: str) -> Any:
    return next(iter((await running.query(sql))[0].values()))


async def series(running: RunningSystem, sql: str) -> dict[tuple[str, ...], float]:
    """Rows of labels and a number."""
    return {
        tuple(str(v) for v in list(row.values())[:-1]): float(list(row.values())[-1])
        for row in await running.query(sql)
    }


async def test_the_metrics_equal_what_sql_shows(redis_client: Redis, server_url: str, tmp_path: Path) -> None:
    caps = CapTable(users={"poor-user": 1})
    values: dict[str, Any] = {"metrics_port": 0, "caps": caps, "retries": 1}
    async with running_system(tmp_path / "data", server_url, **values) as running:
        url = running.system.state.url
        assert url is not None
        # One more batch than fits in a read, a message that is no task, and a redelivery of a finished task.
        await running.publish("analysis", [*TASKS, {"task": "score_post", "bogus": SECRET, "user_id": USER}])
        await running.answers(one["task_id"] for one in TASKS)
        await running.publish("generation", [TASKS[0]])
        events = await one(running, "SELECT sum(seq) FROM position")

        async def is_quiet() -> bool:
            return await running.pending() == 0 and running.workers[0].finished.total() == len(TASKS) + 2

        await wait_until(is_quiet, what="all acknowledged")
        await scrape_until(url, "tollbook_tasks_finished_total", 1, status="invalid")
        page = await scrape_until(url, "tollbook_tasks_finished_total", len(TASKS) - 4 + 1, status="done")

        assert events == await one(running, "SELECT count(*) FROM events")
        assert sum(page.all("tollbook_ledger_events_total").values()) == events
        assert page.get("tollbook_holds_open") == 0
        assert page.get("tollbook_held_usd") == 0
        assert page.get("tollbook_holds_total") == await one(
            running, "SELECT count(*) FROM events WHERE type = 'budget-reserved' AND kind = 'hold'"
        )
        settled = page.all("tollbook_settled_usd_total")
        spent = await one(running, "SELECT sum(settled_usd) FROM budgets WHERE name = 'user'")
        assert sum(settled.values()) == pytest.approx(float(spent))
        assert {key: usd for key, usd in settled.items() if usd} == pytest.approx(
            await series(
                running,
                "SELECT basis, sum(amount_usd) FROM events WHERE type = 'cost-recorded' AND amount_usd > 0 GROUP BY 1",
            )
        )
        assert page.get("tollbook_unconfirmed_usd") == pytest.approx(
            float(await one(running, "SELECT sum(assumed_usd) FROM spend"))
        )
        assert page.get("tollbook_unconfirmed_usd") > 0
        assert (
            page.get("tollbook_denied_total", reason="cap") == await one(running, "SELECT sum(denied) FROM spend") == 1
        )
        assert page.get("tollbook_budget_denied_total", budget="user") == 1
        attempts = page.all("tollbook_attempts_total")
        assert attempts == await series(
            running,
            "SELECT CASE WHEN model = 'openai/gpt-4o' THEN 'other' ELSE model END, outcome, count(*) FROM events "
            "WHERE type = 'model-called' GROUP BY ALL",
        )
        assert attempts["other", "http_error"] == 1
        assert page.get("tollbook_fallbacks_total", model="other", reason="http_error") == 1
        assert page.get("tollbook_attempt_duration_seconds_count", model=HAIKU) == sum(
            number for (model, _), number in attempts.items() if model == HAIKU
        )
        assert page.get("tollbook_attempt_duration_seconds_sum", model=HAIKU) == pytest.approx(
            float(
                await one(
                    running,
                    "SELECT sum(latency_ms) / 1000 FROM events "
                    "WHERE type = 'model-called' AND model LIKE '%claude-3-haiku'",
                )
            )
        )
        assert page.get("tollbook_provider_errors_total", model=HAIKU, status="400") == 1
        assert page.all("tollbook_failures_total") == await series(
            running,
            "SELECT CASE WHEN model = 'openai/gpt-4o' THEN 'other' ELSE model END, reason, count(*) FROM events "
            "WHERE type = 'model-called' AND reason IS NOT NULL GROUP BY ALL",
        )
        assert page.get("tollbook_failures_total", model=HAIKU, reason="output_limit") == 1
        assert page.get("tollbook_failures_total", model=HAIKU, reason="bad_request") == 1
        assert page.all("tollbook_usage_doubts_total")[HAIKU,] == 1
        assert sum(page.all("tollbook_fallbacks_total").values()) == await one(
            running, "SELECT sum(fallbacks) FROM spend"
        )
        assert page.get("tollbook_projector_lag_events") == 0
        assert page.get("tollbook_discrepancies") == 0
        assert page.get("tollbook_dead_letters") == 1
        assert page.get("tollbook_dead_letters_dropped_total") == 0
        assert page.get("tollbook_stream_entries", stream="analysis") == len(TASKS) + 1
        assert page.get("tollbook_stream_pending", stream="analysis") == 0
        assert page.get("tollbook_stream_unread", stream="analysis") == 0
        finished = page.all("tollbook_tasks_finished_total")
        assert finished == {("done",): len(TASKS) - 3, ("denied",): 1, ("failed",): 3, ("invalid",): 1}
        assert page.get("tollbook_tasks_in_flight") == 0
        # FastStream counts the entries of a batch, and the malformed one with the others.
        read = {"app_name": "tollbook", "broker": "redis"}
        assert page.get("faststream_received_messages_total", **read, handler="analysis") == len(TASKS) + 1
        batches = page.get("faststream_received_processed_messages_duration_seconds_count", **read, handler="analysis")
        assert batches >= (len(TASKS) + 1) / 16
        assert "acked" not in page.text
        assert_is_private_and_bounded(page)


def assert_is_private_and_bounded(page: Samples) -> None:
    """G10: no text of a task, and no label that grows with users, tasks or what publishers make up."""
    for private in (SECRET, USER, "poor-user", "campaign-of-theirs", "good-0", 'gpt-4o"', "stand-in]"):
        assert private not in page.text, private
    known = {metric.name: set(metric.labels) for metric in METRICS}
    for name, labels in page.values:
        base = name
        for suffix in ("_bucket", "_count", "_sum"):
            base = base.removesuffix(suffix) if base.removesuffix(suffix) in known else base
        if not name.startswith("process_"):
            assert {label for label, _ in labels} - {"le"} == known[base], name


@pytest.mark.slow
async def test_a_hold_is_open_while_its_call_runs_and_a_takeover_is_counted(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    async with running_system(tmp_path / "data", server_url, metrics_port=0, claim_after_s=1.0) as running:
        url = running.system.state.url
        assert url is not None
        await running.provider.shut()
        # One entry that another worker has read and let lie: it does not come by way of FastStream.
        await running.publish("scraping", [task("let-lie")])
        await wait_until(lambda: running.workers[0].in_flight == 1, what="the task at hand")
        page = await scrape_until(url, "tollbook_holds_open", 1)
        held = (await running.query("SELECT held_usd FROM budgets WHERE name = 'user'"))[0]["held_usd"]
        assert page.get("tollbook_held_usd") == pytest.approx(float(held))
        assert page.get("tollbook_tasks_in_flight") == 1
        assert page.get("tollbook_stream_pending", stream="scraping") == 1
        await running.provider.open()
        await running.answers(["let-lie"])
        [entry_id] = await running.publish("monitoring", [task("taken-over")])
        await running.answers(["taken-over"])
        await is_at_rest(running)  # It is acknowledged after its answer.
        async with running.redis.pipeline(transaction=True) as step:  # The worker must not read it in between.
            step.xgroup_setid("monitoring", GROUP, "0")
            step.xreadgroup(GROUP, "a-dead-worker", {"monitoring": ">"}, count=1)
            await step.execute()
        await running.redis.xclaim("monitoring", GROUP, "a-dead-worker", 0, [entry_id], idle=60_000, justid=True)
        await scrape_until(url, "tollbook_tasks_claimed_total", 1)
        page = await scrape_until(url, "tollbook_holds_open", 0)
        read = {"app_name": "tollbook", "broker": "redis", "handler": "monitoring"}
        assert page.get("faststream_received_messages_total", **read) == 1, "a claimed entry is not read anew"


async def test_reading_the_metrics_does_not_change_totals(tmp_path: Path) -> None:
    """And a file that is lost and rebuilt adds nothing twice: a counter neither falls nor leaps."""
    from benchmarks.load import typical_entries
    from tollbook.ledger.stream import Batch

    entries = list(typical_entries(100, users=7))
    fold = [Batch(0, entries[start : start + 130]) for start in range(0, len(entries), 130)]
    often, once = Totals([0]), Totals([0])
    first = Store.open(tmp_path / "first.duckdb", "ledger")
    for batch in fold:
        first.fold(batch)
        often.advance(first)
        often.advance(first)
    once.advance(first)
    assert dict(often.groups("model-called")) == dict(once.groups("model-called"))
    assert often.types == once.types == {"budget-reserved": 100, "model-called": 100, "cost-recorded": 100}
    assert (often.held_usd, often.holds_open) == (0, 0)
    calls = often.of("model-called")
    slow = first.query("SELECT count(*) FILTER (latency_ms <= 2500) AS n, sum(latency_ms) AS ms FROM events")[0]
    assert (calls.within[LATENCY_BUCKETS_S.index(2.5)], calls.latency_ms) == (slow["n"], slow["ms"])
    second = Store.open(tmp_path / "second.duckdb", "ledger")
    for batch in fold:
        second.fold(batch)
        often.advance(second)
        assert often.types == once.types
    first.close()
    second.close()
