"""A gateway dies at each step of a call's life: a retry at another joins its call, or there is no retry (G2, G3, G4).

As in the crash matrix of workers, it is a process of its own behind a border; the provider's book has the true cost.
"""

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import httpx
import pytest
from redis.asyncio import Redis

from tests.forking import fork
from tests.recovery.books import check_books, events_of, is_at_rest
from tests.recovery.border import Border, Moment
from tests.recovery.test_crash_matrix import NOTE, REQUEST, RESERVE, SETTLE, after, before
from tests.servers import wait_until
from tests.system import STREAMS, RunningSystem, running_system
from tollbook.app.gateways import open_gateway, run_gateway
from tollbook.consumers.sweeper import Sweeper
from tollbook.inference.administration import Administration
from tollbook.inference.cost_lookup import CostLookup
from tollbook.inference.key_changes import KeyBounds
from tollbook.inference.providers.clients import ProviderClients
from tollbook.inference.reconcile import reconcile
from tollbook.inference.settings import Settings
from tollbook.ledger.gate.gate import Gate
from tollbook.ledger.keys import GROUP
from tollbook.ledger.signature import Signature
from tollbook.schemas.events import CostAdjusted, CostRecorded
from tollbook.standin import FaultPlan

pytestmark = pytest.mark.slow

USER: Final = "u1"
PATH: Final = "/v1/chat/completions"
RETRY: Final = "x-stainless-retry-count"
PROMPT: Final = "a post [[completion_tokens=100]]"
HOUR_MS: Final = 3_600_000
NEVER: Final = Moment("before", b"\x00 is never said \x00")
Dead = Literal["nothing", "assumed", "reported", "finished"]


@dataclass(frozen=True, slots=True)
class Row:
    """`requests`: what the dead gateway has sent. `left`: what it left behind.

    That is a hold, which whoever settles it must assume in full or learns the cost of, or a call that is over.
    """

    name: str
    moment: Moment
    requests: int
    left: Dead
    fault: str | None = None


ROWS: Final = (
    #   the gateway dies                    at               requests  left
    Row("before the hold",                  before(RESERVE), 0,        "nothing"),
    Row("after the hold",                   after(RESERVE),  0,        "assumed"),
    Row("before the request is sent",       before(REQUEST), 0,        "assumed"),
    Row("request sent",                     after(REQUEST),  1,        "assumed"),
    Row("after headers",                    after(NOTE),     1,        "reported", "slow"),
    Row("answer received, before settle",   before(SETTLE),  1,        "assumed"),
    Row("answer settled, before delivery",  after(SETTLE),   1,        "finished"),
)  # fmt: skip
MID_STREAM: Final = Row("in mid-stream", NEVER, 1, "reported", "stream_hang")


@pytest.fixture
async def running(redis_client: Redis, server_url: str, tmp_path: Path) -> AsyncIterator[RunningSystem]:
    async with running_system(tmp_path / "data", server_url, workers=0, claim_after_s=2.0) as running:
        for stream in STREAMS:  # As workers make them, of which there are none.
            await running.redis.xgroup_create(stream, GROUP, mkstream=True)
        yield running


def body_of(*, is_streamed: bool) -> dict[str, Any]:
    return {"model": "score_post", "messages": [{"role": "user", "content": PROMPT}], "stream": is_streamed}


async def key_of(running: RunningSystem) -> str:
    runtime = running.system.runtime
    keys = Administration(runtime.ledger, runtime.policies, runtime.user_ids).keys
    created = await keys.create(KeyBounds(user_id=USER), Signature("ann", "a test"))
    assert created.secret is not None
    return created.secret


def clients(key: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(headers={"authorization": f"Bearer {key}"}, timeout=60, trust_env=False)


@asynccontextmanager
async def doomed_gateway(running: RunningSystem, border: Border) -> AsyncIterator[tuple[str, int]]:
    """Run a gateway of the same settings behind a border; yield address and process id. It is killed at the end."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    settings = running.system.runtime.settings.model_copy(
        update={"openrouter_base_url": border.provider_url, "redis_url": None, "gateway_port": port}
    )
    process = fork(_serve, settings, border.redis_url, settings.data_dir.with_name("doomed.log"))
    assert process.pid is not None
    url = f"http://127.0.0.1:{port}"
    try:
        async with httpx.AsyncClient(trust_env=False) as client:

            async def is_served() -> bool:
                with suppress(httpx.TransportError):
                    return (await client.get(f"{url}/openapi.json")).is_success
                return False

            await wait_until(is_served, what="the gateway")
        yield url, process.pid
    finally:
        process.kill()
        await asyncio.to_thread(process.join, 10)


def _serve(settings: Settings, redis_url: str, log: Path) -> None:
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    asyncio.run(run_gateway(settings, asyncio.Event(), redis_url=redis_url))


async def is_id_kept(running: RunningSystem, call_id: str) -> bool:
    record = await running.system.runtime.ledger.gates[0].call_record(call_id)
    return record is not None and record.hold.generation_id is not None


async def fall_silent(running: RunningSystem, pid: int) -> None:
    """Age its last heartbeat, so that no test needs to wait for its expiry."""
    namespace = running.system.runtime.settings.namespace
    async for key in running.redis.scan_iter(match=f"{namespace}:worker:*-{pid}-*"):
        await running.redis.delete(key)


async def die(running: RunningSystem, row: Row, key: str, *, is_streamed: bool, is_noticed: bool = True) -> None:
    """Ask a gateway, and kill it at the row's moment. Where it is not noticed, it lately gave a sign of life."""
    running.provider.faults = FaultPlan(script=[row.fault] if row.fault else [])
    url, moment = running.provider.base_url, row.moment
    async with (
        Border(running.system.redis_url, url, moment) as border,
        doomed_gateway(running, border) as (gateway_url, pid),
        clients(key) as client,
    ):
        body = body_of(is_streamed=is_streamed)
        if moment is NEVER:
            async with client.stream("POST", gateway_url + PATH, json=body, headers={RETRY: "0"}) as reply:
                chunks = reply.aiter_bytes()
                assert b"data:" in await anext(chunks)
                call_id = reply.headers["x-tollbook-call-id"]
                await wait_until(lambda: is_id_kept(running, call_id), what="the id beside the hold")
                os.kill(pid, signal.SIGKILL)
                with suppress(httpx.TransportError):
                    async for _ in chunks:
                        pass
        else:
            asking = asyncio.create_task(client.post(gateway_url + PATH, json=body, headers={RETRY: "0"}))
            await border.is_reached()
            await wait_until(lambda: running.provider.requests == row.requests, what="the request's arrival")
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(httpx.TransportError):
                await asking
        await border.cut()
        await wait_until(lambda: len(running.provider.book.entries) == row.requests, what="the provider's charge")
        if is_noticed:
            await fall_silent(running, pid)


class LateGate:
    """A gate an hour later: every hold is overdue."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    async def now_ms(self) -> int:
        return await self._gate.now_ms() + HOUR_MS

    def __getattr__(self, name: str) -> Any:
        return getattr(self._gate, name)


async def bases(running: RunningSystem) -> list[str]:
    """How each hold was settled, in order; all must be of one call."""
    events = [event for event in await events_of(running) if event.call_id and event.type != "key-created"]
    assert len({event.call_id for event in events}) <= 1
    return [event.payload.basis for event in events if isinstance(event.payload, CostRecorded)]


async def spent(running: RunningSystem) -> int:
    moved = [e for e in await events_of(running) if isinstance(e.payload, CostRecorded | CostAdjusted)]
    return sum(event.amount for event in moved)


def known_bases(row: Row) -> list[set[str]]:
    """How the dead gateway's hold may be settled. An id may be kept in the moment before it dies."""
    match row.left:
        case "nothing":
            return []
        case "finished":
            return [{"reported"}]
        case "assumed" if row.moment.said == SETTLE:
            return [{"assumed", "reported"}]
        case left:
            return [{left}]


@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
async def test_a_retry_at_another_gateway_joins_the_dead_ones_call(
    running: RunningSystem, tmp_path: Path, row: Row, is_streamed: bool
) -> None:
    key = await key_of(running)
    await die(running, row, key, is_streamed=is_streamed)
    await see_a_retry_join(running, row, key, is_streamed=is_streamed)
    await check_books(running, tmp_path)


async def see_a_retry_join(running: RunningSystem, row: Row, key: str, *, is_streamed: bool) -> None:
    stop = asyncio.Event()
    async with open_gateway(running.system, stop) as url, clients(key) as client:
        reply = await client.post(url + PATH, json=body_of(is_streamed=is_streamed), headers={RETRY: "1"})
        assert reply.status_code == 200, reply.text
        assert not is_streamed or reply.text.rstrip().endswith("data: [DONE]")
        await is_at_rest(running)
    is_over = row.left == "finished"
    assert running.provider.requests == row.requests + (not is_over)
    expected = known_bases(row) + ([] if is_over else [{"reported"}])
    found = await bases(running)
    assert len(found) == len(expected)
    assert all(basis in allowed for basis, allowed in zip(found, expected, strict=True)), found
    assert reply.headers["x-tollbook-call-id"] in {event.call_id for event in await events_of(running)}


async def test_a_stream_that_dies_is_joined_once_its_gateway_has_been_silent_for_four_seconds(
    running: RunningSystem, tmp_path: Path
) -> None:
    """The retry comes at once, as an SDK's does, and waits until it is known that nobody makes the call any more."""
    key = await key_of(running)
    await die(running, MID_STREAM, key, is_streamed=True, is_noticed=False)
    await see_a_retry_join(running, MID_STREAM, key, is_streamed=True)
    await check_books(running, tmp_path)
    assert await spent(running) == running.provider.book.totals()[USER]


@pytest.mark.parametrize(
    ("row", "is_streamed"),
    [*((row, False) for row in ROWS), (MID_STREAM, True), (replace(ROWS[4], name="after a stream's headers"), True)],
    ids=[*(row.name for row in ROWS), MID_STREAM.name, "after a stream's headers"],
)
async def test_without_a_retry_the_hold_of_a_dead_gateway_is_swept_and_reconciled(
    running: RunningSystem, tmp_path: Path, row: Row, is_streamed: bool
) -> None:
    key = await key_of(running)
    await die(running, row, key, is_streamed=is_streamed)
    runtime = running.system.runtime
    late: Any = [LateGate(gate) for gate in runtime.ledger.gates]
    swept = await Sweeper(runtime.ledger, late).sweep()
    assert swept == (row.left in ("assumed", "reported"))
    await check_books(running, tmp_path)
    assert running.provider.requests == row.requests
    booked = running.provider.book.totals().get(USER, 0)
    async with ProviderClients.from_settings(runtime.settings) as providers:
        await reconcile(running.query, runtime.ledger, CostLookup(providers, runtime.rules), author="test")
    if row.left in ("reported", "finished"):
        assert await spent(running) == booked > 0
    await check_books(running, tmp_path)
