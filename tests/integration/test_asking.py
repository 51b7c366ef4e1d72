"""Baselines asked over Redis: exact, in few reads of DuckDB, and never from a projector that is not there."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import structlog
from redis.asyncio import Redis

from tests.proxy import faulty_proxy
from tests.servers import wait_until
from tollbook.consumers.baseline_answers import BaselineAnswers
from tollbook.ledger.errors import BaselineUnavailable, LedgerError, LedgerRefused, LedgerUnavailable
from tollbook.ledger.gate.asking import AskedBaselines
from tollbook.ledger.gate.baseline_messages import BaselineRequest, answer_text
from tollbook.ledger.gate.baselines import MAX_PAGE_NAMES, BaselinePage, BaselineReader, Baselines
from tollbook.ledger.gate.requests import Baseline, Position
from tollbook.ledger.keys import Keys
from tollbook.ledger.server.connection import connect
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.schemas.identifiers import EntryId

KEYS = (Keys("t", 0), Keys("t", 1))
HERE, ELSEWHERE = Position(EntryId(7, 1), 7), Position(EntryId(9, 0), 9)
# More digits than a float has.
SETTLED, HELD = 2**63 - 1, 2**53 + 1


class Projection:
    """What the projector reads; a test may hold a read back, or let it fail."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []
        self.problem: Exception | None = None
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def __call__(self, names: Sequence[str], /) -> BaselinePage:
        self.asked.append(tuple(names))
        await self.may_answer.wait()
        if self.problem is not None:
            raise self.problem
        balances = {name: (SETTLED, HELD) for name in names if name.startswith("user")}
        return BaselinePage({0: HERE, 1: ELSEWHERE}, balances, frozenset(name for name in names if "changed" in name))


@pytest.fixture
async def projection() -> Projection:
    return Projection()


@asynccontextmanager
async def answering(
    redis: Redis, read: BaselineReader, *, ledger_id: str = "ledger-1", max_waiting: int = 100
) -> AsyncIterator[BaselineAnswers]:
    answers = BaselineAnswers(redis, KEYS, read, ledger_id=ledger_id, max_waiting=max_waiting)
    await answers.start()
    try:
        yield answers
    finally:
        await answers.stop()


@asynccontextmanager
async def asking(redis: Redis, process: str = "host-1", *, answer_s: float = 30.0) -> AsyncIterator[AskedBaselines]:
    async with AsyncExitStack() as stack:
        pipeline = CommandPipeline(redis)
        stack.push_async_callback(pipeline.aclose)
        asked = AskedBaselines(redis, pipeline, KEYS, ledger_id="ledger-1", process=process, answer_s=answer_s)
        stack.push_async_callback(asked.aclose)
        yield asked


async def test_each_partition_gets_its_exact_balances_and_position(redis_client: Redis, projection: Projection) -> None:
    names = ["user:u1:2026-11", "user:it's \U0001f980:2026-11", "nobody", "changed"]
    async with answering(redis_client, projection), asking(redis_client) as asked:
        for partition, position in enumerate((HERE, ELSEWHERE)):
            page = await asked.reader(partition)(names)
            assert page == BaselinePage(
                {partition: position}, dict.fromkeys(names[:2], (SETTLED, HELD)), frozenset({"changed"})
            )


async def test_requests_that_come_during_a_read_share_the_next_one(redis_client: Redis, projection: Projection) -> None:
    async with answering(redis_client, projection) as answers, AsyncExitStack() as stack:
        askers = [await stack.enter_async_context(asking(redis_client, f"host-{number}")) for number in range(16)]
        projection.may_answer.clear()
        first = asyncio.ensure_future(askers[0].reader(0)(["user:first"]))
        await wait_until(lambda: len(projection.asked) == 1, what="the first read")
        rest = [
            asyncio.ensure_future(asked.reader(number % 2)([f"user:{number}", "user:common"]))
            for number, asked in enumerate(askers)
        ]
        await wait_until(lambda: answers.waiting >= len(askers), what="every request")
        projection.may_answer.set()
        pages = await asyncio.gather(first, *rest)
    assert [page.balances for page in pages[1:]] == [
        {f"user:{number}": (SETTLED, HELD), "user:common": (SETTLED, HELD)} for number in range(16)
    ]
    # The third is for the first asker, who may have asked again.
    assert 2 <= len(projection.asked) <= 3
    assert sum(name == "user:common" for names in projection.asked for name in names) == 1


async def test_without_a_projector_it_is_said_at_once(redis_client: Redis) -> None:
    """G8: not after the time that an answer is waited for."""
    async with asking(redis_client, answer_s=3_600) as asked:
        with pytest.raises(BaselineUnavailable, match="no projector runs on this ledger: start `tollbook projector`"):
            await asked.reader(0)(["user:u1"])


@pytest.mark.parametrize(
    ("problem", "kind"),
    [
        (LedgerRefused("Redis was restored from an older backup"), LedgerRefused),
        (BaselineUnavailable("the projection in DuckDB is being reopened"), BaselineUnavailable),
        (LedgerUnavailable("Redis did not answer"), BaselineUnavailable),
        (ZeroDivisionError("a fault"), BaselineUnavailable),
    ],
)
async def test_an_error_of_the_projector_reaches_the_asking_process(
    redis_client: Redis, projection: Projection, problem: Exception, kind: type[LedgerError]
) -> None:
    projection.problem = problem
    async with answering(redis_client, projection), asking(redis_client) as asked:
        with pytest.raises(LedgerError, match=str(problem)) as refused:
            await asked.reader(0)(["user:u1"])
        assert type(refused.value) is kind
        projection.problem = None
        assert (await asked.reader(0)(["user:u1"])).balances


async def test_an_answer_of_another_ledger_is_refused(redis_client: Redis, projection: Projection) -> None:
    async with answering(redis_client, projection, ledger_id="ledger-2"), asking(redis_client) as asked:
        with pytest.raises(BaselineUnavailable, match="is of ledger ledger-2, this process works on ledger-1"):
            await asked.reader(0)(["user:u1"])


MALFORMED = [
    b"", b"\xff\xfe", b"[]", b"{}", b"null", b"[" * 100_000, b'{"v": 1}', b'{"v": 2, "asker": "a", "number": 1}',
    b'{"v": 1, "asker": "a b", "number": 1, "names": []}',
    b'{"v": 1, "asker": "a", "number": true, "names": []}',
    b'{"v": 1, "asker": "a", "number": -1, "names": []}',
    b'{"v": 1, "asker": "a", "number": 1, "names": "user"}',
    b'{"v": 1, "asker": "a", "number": 1, "names": [7]}',
    b'{"v": 1, "asker": "a", "number": 1, "names": ["\\u0000"]}',
    b'{"v": 1, "asker": "a", "number": 1, "names": ["\\ud800"]}',
    json.dumps({"v": 1, "asker": "a", "number": 1, "names": ["n"] * (MAX_PAGE_NAMES + 1)}).encode(),
    json.dumps({"v": 1, "asker": "a", "number": 1, "names": ["n" * 2_000_000]}).encode(),
]  # fmt: skip


async def test_a_malformed_request_does_not_stop_the_answers(redis_client: Redis, projection: Projection) -> None:
    with structlog.testing.capture_logs() as logs:
        async with answering(redis_client, projection) as answers, asking(redis_client) as asked:
            for message in MALFORMED * 3:
                assert await redis_client.publish(KEYS[0].baseline_requests, message) == 1
            assert (await asked.reader(0)(["user:u1"])).balances == {"user:u1": (SETTLED, HELD)}
            assert answers.malformed == 3 * len(MALFORMED)
    assert projection.asked == [("user:u1",)]
    ignored = [line for line in logs if line["event"] == "baselines.request_ignored"]
    assert 0 < len(ignored) < len(MALFORMED), "each kind once, however often it comes"


async def test_a_wrong_or_malformed_answer_is_ignored(redis_client: Redis, projection: Projection) -> None:
    """Malformed answers, answers to no request, and answers without the requested budgets are ignored."""
    async with asking(redis_client) as asked, redis_client.pubsub() as requests:
        await requests.subscribe(KEYS[0].baseline_requests)
        reading = asyncio.ensure_future(asked.reader(0)(["user:u1"]))
        await wait_until(lambda: requests.get_message(ignore_subscribe_messages=True, timeout=1), what="the request")
        request = BaselineRequest("host-1", 1, ("user:u1",))
        page = BaselinePage({0: HERE}, {"user:u1": (1, 2)})
        good = json.loads(answer_text(request, ledger_id="ledger-1", partition=0, found=page))
        channel = KEYS[0].baseline_answers("host-1")
        for bad in (b"", b"x" * 200_000, b"[]", json.dumps({**good, "number": 99}).encode()):
            await redis_client.publish(channel, bad)
        await redis_client.publish(channel, json.dumps(good))
        assert (await reading).balances == {"user:u1": (1, 2)}
        for number, bad in enumerate(({"balances": [[1.0, 2]]}, {"balances": []}, {"position": ["x", 7]}), 2):
            reading = asyncio.ensure_future(asked.reader(0)(["user:u1"]))
            await wait_until(lambda: requests.get_message(timeout=1), what="the request")
            await redis_client.publish(channel, json.dumps({**good, "number": number, **bad}))
            with pytest.raises(BaselineUnavailable, match="answer cannot be read"):
                await reading


@pytest.mark.slow
async def test_a_repeated_request_is_answered_by_the_next_projector(
    redis_client: Redis, projection: Projection
) -> None:
    """The first one ends between request and answer."""
    stuck = Projection()
    stuck.may_answer.clear()
    async with asking(redis_client) as asked:
        async with answering(redis_client, stuck):
            reading = asyncio.ensure_future(asked.reader(0)(["user:u1"]))
            await wait_until(lambda: len(stuck.asked) == 1, what="the request")
            second = BaselineAnswers(redis_client, KEYS, projection, ledger_id="ledger-1")
            await second.start()
        assert (await reading).balances == {"user:u1": (SETTLED, HELD)}
        await second.stop()


async def test_a_projector_that_ends_before_it_answers_is_noticed_before_the_timeout(redis_client: Redis) -> None:
    stuck = Projection()
    stuck.may_answer.clear()
    async with asking(redis_client, answer_s=3_600) as asked:
        async with answering(redis_client, stuck):
            reading = asyncio.ensure_future(asked.reader(0)(["user:u1"]))
            await wait_until(lambda: len(stuck.asked) == 1, what="the request")
        with pytest.raises(BaselineUnavailable, match="no projector runs"):
            await reading


async def test_a_projector_that_does_not_answer_counts_as_down(redis_client: Redis) -> None:
    stuck = Projection()
    stuck.may_answer.clear()
    async with answering(redis_client, stuck), asking(redis_client, answer_s=0.2) as asked:
        with pytest.raises(BaselineUnavailable, match="the projector did not answer within 0 s"):
            await asked.reader(0)(["user:u1"])


@pytest.mark.slow
@pytest.mark.parametrize("is_lost", ["asker", "projector"])
async def test_a_lost_connection_is_made_again(
    redis_client: Redis, server_url: str, projection: Projection, is_lost: str
) -> None:
    async with faulty_proxy(server_url) as proxy, connect(proxy.url) as behind:
        sides = (behind, redis_client) if is_lost == "projector" else (redis_client, behind)
        async with answering(sides[0], projection), asking(sides[1]) as asked:
            assert (await asked.reader(0)(["user:u1"])).balances
            proxy.break_connections()

            async def is_answered() -> bool:
                try:
                    return bool((await asked.reader(0)(["user:u1"])).balances)
                except BaselineUnavailable:
                    return False

            await wait_until(is_answered, what="an answer")


@pytest.mark.slow
async def test_kept_baselines_go_on_while_redis_cannot_be_asked(
    redis_client: Redis, server_url: str, projection: Projection
) -> None:
    """G6 for what is kept, G8 for the others."""
    async with (
        faulty_proxy(server_url) as proxy,
        connect(proxy.url) as behind,
        answering(redis_client, projection),
        asking(behind, answer_s=0.5) as asked,
    ):
        kept = Baselines(asked.reader(0), 0, monotonic=lambda: 0.0, max_age_s=-1.0)
        assert await kept.get(["user:u1"]) == (Baseline(SETTLED, HELD, HERE),)
        await proxy.stop()
        assert await kept.get(["user:u1"]) == (Baseline(SETTLED, HELD, HERE),)
        with pytest.raises(BaselineUnavailable):
            await kept.get(["user:u2"])
        await proxy.start()
        await wait_until(lambda: _gets(kept, "user:u2"), what="the connection")


async def _gets(kept: Baselines, name: str) -> bool:
    try:
        return bool(await kept.get([name]))
    except LedgerUnavailable:
        return False


async def test_more_than_can_be_answered_is_dropped_oldest_first(redis_client: Redis) -> None:
    stuck = Projection()
    stuck.may_answer.clear()
    async with answering(redis_client, stuck, max_waiting=5):
        for number in range(50):
            text = json.dumps({"v": 1, "asker": "flood", "number": number, "names": [f"user:{number}"]})
            await redis_client.publish(KEYS[0].baseline_requests, text)
        await wait_until(lambda: len(stuck.asked) == 1, what="the first read")
        async with redis_client.pubsub() as answered:
            await answered.subscribe(KEYS[0].baseline_answers("flood"))
            await answered.get_message(timeout=5)
            stuck.may_answer.set()
            numbers: list[int] = []
            while not numbers or numbers[-1] != 49:
                message = await answered.get_message(ignore_subscribe_messages=True, timeout=5)
                if message is not None:
                    numbers.append(json.loads(message["data"])["number"])
    assert numbers[-5:] == [45, 46, 47, 48, 49]
    assert len(numbers) <= 10


async def test_many_budgets_are_asked_for_in_requests_of_bounded_size(
    redis_client: Redis, projection: Projection
) -> None:
    names = [f"user:{number}" for number in range(MAX_PAGE_NAMES + 10)] + [
        "user:" + "x" * 200_000,
        "user:" + "y" * 200_000,
    ]
    async with answering(redis_client, projection), asking(redis_client) as asked:
        kept = Baselines(asked.reader(0), 0, monotonic=lambda: 0.0)
        assert await kept.get(names) == (Baseline(SETTLED, HELD, HERE),) * len(names)
    assert [len(each) for each in projection.asked] == [MAX_PAGE_NAMES, 10, 1, 1]
