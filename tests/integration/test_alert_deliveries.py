"""Alerts reach their receivers at least once, those about one budget in order, and no receiver waits for another."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import httpx
import pytest
import standardwebhooks
from aiohttp import web
from pydantic import SecretStr
from redis.asyncio import Redis

from tests.proxy import faulty_proxy
from tests.servers import wait_until
from tests.system import running_system
from tollbook.app import alerting
from tollbook.consumers.alerts.deliveries import Deliveries
from tollbook.consumers.alerts.feeding import alert_of
from tollbook.consumers.alerts.queue import AlertQueue
from tollbook.consumers.alerts.receivers import (
    AppriseReceiver,
    NotDelivered,
    Receiver,
    Webhook,
    receivers_of,
)
from tollbook.ledger.keys import alerts
from tollbook.ledger.server.connection import connect
from tollbook.schemas.alerts import Alert
from tollbook.schemas.policy import AlertRule

NOW_MS = 1_795_000_000_000
DAY_MS = 24 * 3600 * 1000
SECRET = "whsec_" + base64.b64encode(b"k" * 32).decode()


def alert(number: int, *, budget: str = "team-week", at_ms: int = NOW_MS) -> Alert:
    return Alert(
        id=f"{budget}-{number}",
        kind="budget",
        text=f"Budget {budget} of red has reached 80 % of $40.00.",
        at_ms=at_ms,
        budget=budget,
        value="red",
        window="2026-W48",
        fraction=Decimal("0.8"),
        cap_usd=Decimal(40),
        settled_usd=Decimal("32.5"),
    )


class Inbox:
    """A receiver in this process. `fails` returns why it refuses an alert."""

    name = "inbox"

    def __init__(self, fails: Callable[[Alert], str | None] = lambda _: None) -> None:
        self.fails = fails
        self.taken: list[str] = []
        self.tries: list[str] = []

    async def deliver(self, alert: Alert) -> None:
        self.tries.append(alert.id)
        if problem := self.fails(alert):
            raise NotDelivered(problem)
        self.taken.append(alert.id)


class Pauses:
    """Does not sleep, and records the requested times."""

    def __init__(self) -> None:
        self.asked: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.asked.append(seconds)
        await asyncio.sleep(0)


@asynccontextmanager
async def delivering(
    redis: Redis, *receivers: Receiver, now_ms: Callable[[], int] = lambda: NOW_MS, pauses: Pauses | None = None
) -> AsyncIterator[AlertQueue]:
    queue = AlertQueue(redis, "tollbook")
    deliveries = Deliveries(queue, receivers, now_ms=now_ms, sleep=(pauses or Pauses()).sleep)
    await deliveries.prepare()
    running = asyncio.create_task(deliveries.run())
    try:
        yield queue
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running


async def test_every_receiver_takes_every_alert_in_order(redis_client: Redis) -> None:
    first, second = Inbox(), Inbox()
    second.name = "second"
    async with delivering(redis_client, first, second) as queue:
        for number in range(5):
            await queue.put(alert(number))
        for inbox in (first, second):
            await wait_until(lambda inbox=inbox: len(inbox.taken) == 5, what="the alerts")
            assert inbox.taken == [f"team-week-{number}" for number in range(5)]
        await wait_until(lambda: _waits(queue, 0), what="the queue to be empty")
        assert [(state.name, state.delivered, state.problem) for state in await queue.states()] == [
            ("inbox", 5, None),
            ("second", 5, None),
        ]


async def _waits(queue: AlertQueue, waiting: int) -> bool:
    return all(state.waiting == waiting for state in await queue.states())


async def test_a_failing_alert_holds_back_only_those_about_the_same_budget(redis_client: Redis) -> None:
    is_broken = True
    inbox = Inbox(lambda alert: "HTTP 500" if is_broken and alert.budget == "team-week" else None)
    async with delivering(redis_client, inbox, pauses=Pauses()) as queue:
        for each in (alert(1), alert(2), alert(1, budget="other"), alert(2, budget="other")):
            await queue.put(each)
        await wait_until(lambda: inbox.taken == ["other-1", "other-2"], what="the other budget's alerts")
        await wait_until(lambda: inbox.tries.count("team-week-1") > 2, what="a third try")
        assert "team-week-2" not in inbox.tries
        (state,) = await queue.states()
        assert (state.problem, state.failing_since_ms, state.waiting) == ("HTTP 500", NOW_MS, 2)
        is_broken = False
        await wait_until(lambda: inbox.taken[2:] == ["team-week-1", "team-week-2"], what="both, in order")
        await wait_until(lambda: _waits(queue, 0), what="the queue to be empty")
        (state,) = await queue.states()
        assert (state.problem, state.failing_since_ms) == (None, None)


async def test_pauses_double_up_to_five_minutes(redis_client: Redis) -> None:
    pauses = Pauses()
    inbox = Inbox(lambda _: "HTTP 500" if len(inbox.tries) < 12 else None)
    async with delivering(redis_client, inbox, pauses=pauses) as queue:
        await queue.put(alert(1))
        await wait_until(lambda: inbox.taken, what="the alert")
    assert pauses.asked[:11] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]


async def test_undelivered_alerts_are_delivered_first_by_the_next_process(redis_client: Redis) -> None:
    broken = Inbox(lambda _: "HTTP 500")
    async with delivering(redis_client, broken) as queue:
        await queue.put(alert(1))
        await wait_until(lambda: broken.tries, what="a try")
    await queue.put(alert(2))
    successor = Inbox()
    async with delivering(redis_client, successor):
        await wait_until(lambda: len(successor.taken) == 2, what="both alerts")
    assert successor.taken == ["team-week-1", "team-week-2"]


async def test_an_alert_is_given_up_after_a_day_so_that_newer_ones_come_through(redis_client: Redis) -> None:
    inbox = Inbox(lambda alert: "HTTP 400" if alert.id == "team-week-1" else None)
    async with delivering(redis_client, inbox, now_ms=lambda: NOW_MS + DAY_MS + 1) as queue:
        await queue.put(alert(1))
        await queue.put(alert(2, at_ms=NOW_MS + DAY_MS))
        await wait_until(lambda: inbox.taken == ["team-week-2"], what="the newer alert")
        await wait_until(lambda: _waits(queue, 0), what="the queue to be empty")
        assert [(state.dropped, state.delivered) for state in await queue.states()] == [(1, 1)]


async def test_a_lost_connection_and_an_entry_written_by_hand_end_nothing(redis_client: Redis, server_url: str) -> None:
    inbox = Inbox()
    async with faulty_proxy(server_url) as proxy:
        redis = connect(proxy.url)
        async with delivering(redis, inbox):
            queue = AlertQueue(redis_client, "tollbook")
            await redis_client.xadd(alerts("tollbook"), {"alert": "{"})
            await queue.put(alert(1))
            await wait_until(lambda: inbox.taken == ["team-week-1"], what="the first")
            proxy.break_connections()
            await queue.put(alert(2))
            await wait_until(lambda: inbox.taken == ["team-week-1", "team-week-2"], what="the second")
        await redis.aclose()


async def test_a_receiver_that_is_no_longer_configured_is_forgotten(redis_client: Redis) -> None:
    async with delivering(redis_client, Inbox()) as queue:
        await queue.put(alert(1))
        await wait_until(lambda: _has_delivered(queue), what="the delivery")
    async with delivering(redis_client) as queue:
        assert await queue.states() == []


async def _has_delivered(queue: AlertQueue) -> bool:
    return any(state.delivered for state in await queue.states())


@pytest.mark.parametrize(
    ("fraction", "settled", "cap", "text"),
    [
        ("0.8", "32.5", "40", "80 % is spent: budget team-week of red, week 2026-W48, $32.50 of $40.00."),
        ("1", "40", "40", "100 % is spent: budget team-week of red, week 2026-W48, $40.00 of $40.00."),
        ("1", "39", "40", "A call was refused: budget team-week of red, week 2026-W48, $39.00 of $40.00."),
        ("1", "0", "0", "A call was refused: budget team-week of red, week 2026-W48, $0.00 of $0.00."),
        ("0.5", "0.0009", "0.001", "50 % is spent: budget team-week of red, week 2026-W48, $0.0009 of $0.001."),
    ],
)
def test_an_alert_says_what_happened(fraction: str, settled: str, cap: str, text: str) -> None:
    row = {
        "id": "1-1", "at_ms": NOW_MS, "budget": "team-week:red:2026-W48", "name": "team-week", "value": "red",
        "window": "2026-W48", "fraction": Decimal(fraction), "cap_usd": Decimal(cap), "settled_usd": Decimal(settled),
    }  # fmt: skip
    assert alert_of(row).text == text


@asynccontextmanager
async def served(status: Callable[[], int]) -> AsyncIterator[tuple[str, list[tuple[dict[str, str], bytes]]]]:
    """A receiver's server: its URL, and the headers and bodies that arrived."""
    seen: list[tuple[dict[str, str], bytes]] = []

    async def receive(request: web.Request) -> web.Response:
        seen.append(({name.lower(): value for name, value in request.headers.items()}, await request.read()))
        return web.Response(status=status(), headers={"Retry-After": "7"})

    app = web.Application()
    app.router.add_post("/hook", receive)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]  # pyright: ignore
    try:
        yield f"http://127.0.0.1:{port}/hook", seen
    finally:
        await runner.cleanup()


async def test_a_webhook_is_signed_as_standard_webhooks_says() -> None:
    async with served(lambda: 204) as (url, seen), httpx.AsyncClient() as http:
        await Webhook.of(url, SecretStr(SECRET), http).deliver(alert(1))
    ((headers, body),) = seen
    # The library that receivers use: it refuses an old, a changed and a foreign message.
    document = standardwebhooks.Webhook(SECRET).verify(body, headers)
    assert document == json.loads(body)
    assert document == {
        "id": "team-week-1",
        "kind": "budget",
        "text": "Budget team-week of red has reached 80 % of $40.00.",
        "at_ms": NOW_MS,
        "budget": "team-week",
        "value": "red",
        "window": "2026-W48",
        "fraction": "0.8",
        "cap_usd": "40",
        "settled_usd": "32.5",
    }
    with pytest.raises(standardwebhooks.WebhookVerificationError):
        standardwebhooks.Webhook(SECRET).verify(body + b" ", headers)


async def test_a_webhook_that_answers_no_success_has_not_taken_the_alert() -> None:
    async with served(lambda: 503) as (url, _), httpx.AsyncClient() as http:
        with pytest.raises(NotDelivered, match="HTTP 503") as refused:
            await Webhook.of(url, SecretStr(SECRET), http).deliver(alert(1))
    assert refused.value.pause_s == 7


async def test_a_webhook_without_answer_is_told_without_its_address() -> None:
    async with httpx.AsyncClient() as http:
        with pytest.raises(NotDelivered) as refused:
            await Webhook.of("http://127.0.0.1:9/token-abc", SecretStr(SECRET), http).deliver(alert(1))
    assert str(refused.value) == "no answer (ConnectError)"


async def test_a_webhook_whose_answer_has_no_end_holds_back_nothing() -> None:
    answer = b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000\r\n\r\n"
    closed = asyncio.Event()

    async def send_on(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            writer.write(answer)
            while True:
                writer.write(b"x")
                await writer.drain()
                await asyncio.sleep(0)
        closed.set()

    async with await asyncio.start_server(send_on, "127.0.0.1", 0) as server, httpx.AsyncClient() as http:
        port = server.sockets[0].getsockname()[1]
        webhook = Webhook.of(f"http://127.0.0.1:{port}/hook", SecretStr(SECRET), http)
        async with asyncio.timeout(10):
            await webhook.deliver(alert(1))
            await closed.wait()


async def test_a_webhook_that_sends_its_answer_byte_by_byte_is_given_up() -> None:
    is_over = asyncio.Event()

    async def never_answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nx-slow: ")
        await is_over.wait()
        writer.close()

    async with await asyncio.start_server(never_answer, "127.0.0.1", 0) as server, httpx.AsyncClient() as http:
        port = server.sockets[0].getsockname()[1]
        webhook = replace(Webhook.of(f"http://127.0.0.1:{port}/hook", SecretStr(SECRET), http), limit_s=0.1)
        with pytest.raises(NotDelivered, match=r"no answer \(TimeoutError\)"):
            await webhook.deliver(alert(1))
        is_over.set()


async def test_apprise_reaches_its_addresses() -> None:
    async with served(lambda: 200) as (url, seen):
        await AppriseReceiver.of(url.replace("http://", "json://")).deliver(alert(1))
        document = json.loads(seen[0][1])
        assert (document["title"], document["message"]) == ("Tollbook: budget", alert(1).text)
    with pytest.raises(NotDelivered, match="an address did not take it"):
        await AppriseReceiver.of("json://127.0.0.1:9/hook").deliver(alert(1))


@pytest.mark.parametrize(
    ("secret", "variables", "rule", "words"),
    [
        (None, {"HOOK": "http://127.0.0.1:9"}, AlertRule(webhook_env="HOOK"), "TOLLBOOK_WEBHOOK_SECRET is not set"),
        (SECRET, {}, AlertRule(webhook_env="HOOK"), "HOOK is not set"),
        (SECRET, {"HOOK": "hooks.example"}, AlertRule(webhook_env="HOOK"), "must begin with https://"),
        (None, {"CHAT": "no-such-service://x"}, AlertRule(apprise_env="CHAT"), "Apprise does not accept an address"),
    ],
)
async def test_a_receiver_that_cannot_be_used_is_shown_with_its_reason(
    redis_client: Redis, secret: str | None, variables: dict[str, str], rule: AlertRule, words: str
) -> None:
    async with httpx.AsyncClient() as http:
        receivers, unusable = receivers_of(rule, SecretStr(secret) if secret else None, variables.get, http)
    ((name, problem),) = unusable.items()
    assert receivers == []
    assert words in problem
    queue = AlertQueue(redis_client, "tollbook")
    await Deliveries(queue, receivers, unusable, now_ms=lambda: NOW_MS).prepare()
    assert [(state.name, state.problem) for state in await queue.states()] == [(name, problem)]
    await Deliveries(queue, [], now_ms=lambda: NOW_MS).prepare()
    assert await queue.states() == []


async def test_a_fault_ends_no_alerts_and_no_process(
    redis_client: Redis, server_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[str] = []

    def fault(*_: object) -> tuple[list[Receiver], dict[str, str]]:
        tries.append("once")
        if len(tries) == 1:
            raise ZeroDivisionError
        return [], {"webhook": "it is broken"}

    monkeypatch.setattr(alerting, "receivers_of", fault)
    monkeypatch.setattr(alerting, "_RETRY_S", 0.0)
    async with running_system(tmp_path / "data", server_url, workers=0):
        queue = AlertQueue(redis_client, "tollbook")

        async def is_shown() -> bool:
            return [state.problem for state in await queue.states()] == ["it is broken"]

        await wait_until(is_shown, what="the second try")
