"""What the live view gathers: exact numbers of a running system, and what it says when a part is away."""

import json
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

import pytest
from redis.asyncio import Redis

from tests.ledger_maker import PERIODS, LedgerMaker
from tests.servers import wait_until
from tests.system import REPLIES, GatedStandIn, RunningSystem, make_settings, running_system
from tollbook.inference.runtime import open_ledger
from tollbook.inference.setting_tables import CapTable
from tollbook.ledger.errors import LedgerUnavailable
from tollbook.ledger.keys import Keys, dead_letters, projector_lease
from tollbook.ledger.projection.store import Store
from tollbook.ledger.server.address import hide_password
from tollbook.ledger.server.embedded import EmbeddedServer
from tollbook.ledger.stream import Batch
from tollbook.schemas.events import ENVELOPE_FIELDS
from tollbook.schemas.identifiers import EntryId
from tollbook.schemas.results import TaskStatus
from tollbook.views.top.figures import Figures, Problem, UserFigures
from tollbook.views.top.gather import Gatherer
from tollbook.views.top.projection_reader import read_copy
from tollbook.views.top.spend import update_spend
from tollbook.views.top.tail import Tail, rates

DONE: Final = "done"
POOR: Final = "poor"
SLOW: Final = "slow"
NANO: Final = Decimal(1_000_000_000)


def make_tasks(user: str, number: int, prompt: str = "a post", **more: str) -> list[dict[str, str]]:
    base = {"task": "score_post", "user_id": user, "prompt": prompt, "reply_to": REPLIES, **more}
    return [{**base, "task_id": f"{user}-{prompt}-{n}".replace(" ", "-")} for n in range(number)]


async def run(running: RunningSystem, tasks: list[dict[str, str]]) -> list[TaskStatus]:
    await running.publish("analysis", tasks)
    return [result.status for result in await running.answers(task["task_id"] for task in tasks)]


def user(figures: Figures, name: str) -> UserFigures:
    assert figures.spend is not None
    (found,) = (user for user in figures.spend.by_spend if user.user_id == name)
    return found


@pytest.mark.slow
async def test_the_figures_are_those_of_the_system(private_server: EmbeddedServer, tmp_path: Path) -> None:
    caps = CapTable(users={POOR: 1})
    async with running_system(tmp_path / "data", private_server.url, caps=caps, retries=0) as running:
        gatherer = Gatherer(running.system.runtime.settings)
        try:
            await check_counts(running, gatherer)
            await check_lag(running, gatherer)
            await check_a_projector_that_is_away(running, gatherer)
            await check_a_server_that_may_lose_writes(running)
            await check_redis_away(running, gatherer, private_server)
        finally:
            await running.provider.open()
            await gatherer.aclose()


async def check_counts(running: RunningSystem, gatherer: Gatherer) -> None:
    assert await run(running, make_tasks(DONE, 5)) == [TaskStatus.DONE] * 5
    assert await run(running, make_tasks(POOR, 3)) == [TaskStatus.DENIED] * 3
    assert await run(running, make_tasks(DONE, 2, "[[fault=http_400]]")) == [TaskStatus.FAILED] * 2
    assert await run(running, make_tasks(DONE, 1, "[[fault=http_503]]")) == [TaskStatus.FAILED]
    await running.publish("generation", [{"nonsense": "1"}])
    await running.provider.shut(SLOW)
    await running.publish("scraping", make_tasks(SLOW, 4))
    await running.provider.wait_for_arrivals(4, user=SLOW)
    await wait_until(running.dead_letters, what="the dead letter")

    async def are_acknowledged() -> bool:
        # A task is answered before its entry is acknowledged.
        return await running.pending() == 4

    await wait_until(are_acknowledged, what="the acknowledgement of what is answered")
    sums = "SELECT sum(spent_usd) AS spent, sum(reserved_usd) AS held, sum(fallbacks) AS fallbacks FROM spend"
    (folded,) = await running.query(sums)

    figures = await gatherer.gather(must_copy=True)

    redis, counted, spend = figures.redis, figures.rates, figures.spend
    assert redis is not None
    assert counted is not None
    assert spend is not None
    assert [(stream.name, stream.length, stream.waiting, stream.pending) for stream in redis.streams] == [
        ("scraping", 4, 0, 4),
        ("analysis", 5 + 3 + 2 + 1, 0, 0),
        ("generation", 1, 0, 0),
        ("monitoring", 0, 0, 0),
    ]
    assert (redis.open_holds, redis.pending, redis.dead_letters, redis.workers) == (4, 4, 1, 1)
    assert redis.streams[0].oldest_pending_s is not None
    assert (counted.finished, counted.failed, counted.denied) == (5 + 2 + 1, 2 + 1, 3)
    assert counted.fallbacks == folded["fallbacks"] > 0
    assert counted.cost_nanousd == folded["spent"] * NANO > 0
    assert (counted.window_s, sum(counted.finished_by_second) <= counted.finished) == (60, True)
    assert (spend.users, spend.calls, spend.denied) == (3, 5 + 2 + 1 + 4, 3)
    assert (spend.spent_nanousd, spend.held_nanousd) == (counted.cost_nanousd, folded["held"] * NANO)
    assert user(figures, SLOW).held_nanousd == spend.held_nanousd > 0
    assert (user(figures, POOR).denied, user(figures, POOR).calls, user(figures, POOR).cap_nanousd) == (3, 0, 1)
    assert (spend.is_current, spend.lag_events, spend.lag_s) == (True, 0, 0.0)
    assert [problem.text.partition(":")[0] for problem in figures.problems] == ["1 task could not be executed"]


async def check_lag(running: RunningSystem, gatherer: Gatherer) -> None:
    """What was not folded is counted as the lag, and in the spend all the same."""
    running.system.projection.projector.pause()
    before = await gatherer.gather(must_copy=True)
    assert await run(running, make_tasks(DONE, 2, "another post")) == [TaskStatus.DONE] * 2
    after = await gatherer.gather(must_copy=True)
    assert before.spend is not None
    assert after.spend is not None
    new = after.redis.seq - before.redis.seq if before.redis and after.redis else 0
    assert new >= 2 * 3  # For each: held, called, settled.
    assert after.spend.seq <= before.spend.seq + before.spend.newer_events
    assert after.spend.lag_events == after.spend.newer_events >= new
    assert after.spend.lag_s is not None
    assert 0 <= after.spend.lag_s < 60
    assert after.spend.is_current
    assert user(after, DONE).calls == user(before, DONE).calls + 2
    assert user(after, DONE).spent_nanousd > user(before, DONE).spent_nanousd
    running.system.projection.projector.resume()
    folded = (await running.query("SELECT spent_usd FROM spend WHERE user_id = 'done'"))[0]["spent_usd"]
    assert user(after, DONE).spent_nanousd == folded * NANO
    caught_up = await gatherer.gather(must_copy=True)
    assert caught_up.spend is not None
    assert (caught_up.spend.lag_events, caught_up.spend.newer_events) == (0, 0)


async def check_a_projector_that_is_away(running: RunningSystem, gatherer: Gatherer) -> None:
    wanted = Problem("person", "no projector runs, so calls wait: start `tollbook up` or `tollbook projector`")

    async def is_told() -> bool:
        # Again and again, since the projector takes its lease anew every few seconds.
        await running.redis.delete(projector_lease("tollbook"))
        return wanted in (await gatherer.gather()).problems

    await wait_until(is_told, what="the missing projector")


async def check_redis_away(running: RunningSystem, gatherer: Gatherer, server: EmbeddedServer) -> None:
    """What was seen last stays, with its age; and the gatherer goes on when Redis is back."""
    before = await gatherer.gather()
    await server.kill()
    away = await gatherer.gather()
    assert away.problems[0].level == "person"
    assert away.problems[0].text.startswith("Redis did not answer")
    assert away.redis is not None
    assert before.redis is not None
    assert away.redis.streams == before.redis.streams
    assert away.redis.age_s > before.redis.age_s
    assert away.spend is not None
    await server.start()
    back = await gatherer.gather()
    assert not any("answer" in problem.text for problem in back.problems)
    assert back.redis is not None
    assert back.redis.age_s < 1


async def check_a_server_that_may_lose_writes(running: RunningSystem) -> None:
    for name, value, problem in (
        ("appendfsync", "everysec", Problem("notice", "a crash of the Redis server loses its last writes: set "
         "appendfsync, now everysec, to always")),
        ("maxmemory-policy", "allkeys-lru", Problem("person", "the Redis server may evict keys: set its "
         "maxmemory-policy, now allkeys-lru, to noeviction")),
    ):  # fmt: skip
        before: Any = await running.redis.config_get(name)
        await running.redis.config_set(name, value)
        gatherer = Gatherer(running.system.runtime.settings)
        assert problem in (await gatherer.gather()).problems
        await gatherer.aclose()
        await running.redis.config_set(name, before[name])


async def test_without_any_data_it_ends_at_once(redis_client: Redis, server_url: str, tmp_path: Path) -> None:
    async with GatedStandIn() as provider:
        for url, problem in ((None, "no Tollbook runs in"), (server_url, "has no ledger 'tollbook'")):
            gatherer = Gatherer(make_settings(tmp_path, provider, redis_url=url))
            with pytest.raises(LedgerUnavailable, match=problem):
                await gatherer.check()
            await gatherer.aclose()
    assert await redis_client.dbsize() == 0, "looking makes no keys"


async def test_a_refused_command_is_shown_and_does_not_end_the_view(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    async with GatedStandIn() as provider:
        settings = make_settings(tmp_path, provider, redis_url=server_url)
        async with open_ledger(settings, server_url):
            await redis_client.set(dead_letters("tollbook"), "no stream")
            gatherer = Gatherer(settings)
            figures = await gatherer.gather(must_copy=True)
            await gatherer.aclose()
    assert figures.redis is None
    assert [problem.text for problem in figures.problems] == [
        f"Redis at {hide_password(server_url)} refuses: WRONGTYPE Operation against a key holding the wrong kind of value",  # noqa: E501
        f"there is no projection at {tmp_path}/tollbook.duckdb; start `tollbook up`, or set TOLLBOOK_DATA_DIR",
    ]


@pytest.mark.slow
async def test_a_long_ledger_is_read_by_its_end_only(redis_client: Redis, server_url: str, tmp_path: Path) -> None:
    """Bounded on the first look and after a gap; what the window covers less is told."""
    async with GatedStandIn() as provider:
        settings = make_settings(tmp_path, provider, redis_url=server_url)
        async with open_ledger(settings, server_url):
            gatherer = Gatherer(settings)
            for round_ in range(2):
                await append_denials(redis_client, 11_000, first=11_000 * round_ + 1)
                figures = await gatherer.gather()
                assert figures.rates is not None
                assert figures.rates.denied <= 10_000
                assert figures.rates.window_s < 60
            calls = await commands_called(redis_client)
            await gatherer.gather()
            more = {name: n - calls.get(name, 0) for name, n in (await commands_called(redis_client)).items()}
            await gatherer.aclose()
    assert more["xrevrange"] == 1
    called = {name for name, number in more.items() if number}
    looks = {"time", "hmget", "hget", "xlen", "zcard", "hlen", "get", "exists", "xrevrange", "xpending", "hgetall"}
    assert called <= looks | {"xinfo|groups", "xinfo|consumers", "info"}
    assert sum(more.values()) < 40


async def append_denials(redis: Redis, number: int, *, first: int) -> None:
    payload = json.dumps({"budget": "user:u1:2026-11", "reason": "cap"})
    pipe = redis.pipeline(transaction=False)
    for seq in range(first, first + number):
        values = ("budget-denied", 1, seq, "u1", "2026-11", f"c{seq}", 0, 1, "", payload)
        pipe.xadd(Keys().ledger, dict(zip(ENVELOPE_FIELDS, values, strict=True)))
    await pipe.execute()


async def commands_called(redis: Redis) -> dict[str, int]:
    stats: Any = await redis.info("commandstats")
    return {name.removeprefix("cmdstat_"): row["calls"] for name, row in stats.items()}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 3])
def test_a_copy_plus_newer_events_equals_a_fold_of_all_events(seed: int, tmp_path: Path) -> None:
    entries = LedgerMaker(seed).run(600).entries
    cut = 150 * seed + 1
    path, whole = tmp_path / "part.duckdb", tmp_path / "whole.duckdb"
    for file, folded in ((path, entries[:cut]), (whole, entries)):
        store = Store.open(file, "ledger-1")
        store.fold(Batch(0, folded))
        store.close()
    for period in PERIODS:
        copy, expected = read_copy(path, period, None), read_copy(whole, period, None).spend
        tail = Tail(entries[cut // 2 :], is_all=False, seq=0)
        moves = tail.moves_after(copy.positions[0].seq)
        assert moves is not None
        made = update_spend(copy.spend, moves, events=len(entries) - cut)
        assert figures_of(made.by_spend) == figures_of(expected.by_spend)
        for name in ("users", "spent_nanousd", "held_nanousd", "calls", "denied", "fallbacks"):
            assert getattr(made, name) == getattr(expected, name), name


def figures_of(users: tuple[UserFigures, ...]) -> list[tuple[str, int, int, int, int, int]]:
    return [(u.user_id, u.spent_nanousd, u.held_nanousd, u.calls, u.denied, u.fallbacks) for u in users]


def test_a_tail_that_does_not_reach_back_to_the_copy_says_so() -> None:
    entries = LedgerMaker(1).run(100).entries
    tail = Tail(entries[50:80], is_all=False, seq=0)
    assert tail.moves_after(49) is None
    moves = tail.moves_after(60)
    assert moves is not None
    assert {move.seq for move in moves} <= set(range(61, 81))
    assert tail.moves_after(59) is None, "a projection that was rebuilt is behind what was dropped"
    tail.extend(entries[80:])
    assert len(tail.moves_after(70) or ()) > 0


def test_rates_leave_out_the_second_that_is_not_over_and_sums_take_it_in() -> None:
    now_s = 1_795_000_000

    def denied(second: int, number: int) -> list[Any]:
        payload = b'{"reason":"cap"}'
        values = (b"budget-denied", b"1", b"%d" % number, b"u1", b"2026-11", b"c", b"0", b"1", b"", payload)
        pairs = zip((name.encode() for name in ENVELOPE_FIELDS), values, strict=True)
        return [b"%d-%d" % (second * 1000, number), [part for pair in pairs for part in pair]]

    def settled(second: int, number: int, cost: int, outcome: str = "done") -> list[Any]:
        made = denied(second, number)
        made[1][1], made[1][15] = b"cost-recorded", b"%d" % cost
        made[1][19] = json.dumps({"outcome": outcome, "hold_nanousd": cost}).encode()
        return made

    tail = Tail([], is_all=True, seq=0)
    tail.extend(
        [
            settled(now_s - 61, 1, 999),  # Out of sight.
            settled(now_s - 60, 2, 60),
            settled(now_s - 10, 3, 10, "failed"),
            settled(now_s - 1, 4, 1),
            settled(now_s - 1, 5, 1, "taken_over"),  # Its call goes on.
            denied(now_s - 1, 6),
            [b"%d-9" % (now_s * 1000), [b"type", b"nonsense"]],
            settled(now_s, 7, 5),
        ]
    )
    counted = rates([tail], now_s * 1000 + 700)
    assert (counted.finished, counted.failed, counted.denied) == (4, 1, 1)
    assert (counted.cost_nanousd, counted.nanousd_per_min) == (60 + 10 + 1 + 1 + 5, (10 + 1 + 1) * 60 // 10)
    assert counted.calls_per_s == 2 / 10
    assert counted.newest_event_s == 0.7
    assert (counted.finished_by_second[0], counted.finished_by_second[-1], len(counted.cost_by_second)) == (1, 1, 60)
    part = Tail([settled(now_s - 5, 8, 50)], is_all=False, seq=0)
    assert rates([tail, part], now_s * 1000).window_s == 5
    assert rates([part], now_s * 1000).nanousd_per_min == 50 * 60 // 5
    assert EntryId.parse(part.last.decode()).ms == (now_s - 5) * 1000
