"""Calls with a reader: deltas while the answer comes, no second attempt after the first delta, exact books.

After every test the ledger is compared with the stand-in's own book, and every hold is settled.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from redis.asyncio import Redis

from tests.calling import COMPLETION_TOKENS, PROMPT_BOUND, PROMPT_TOKENS, Calling, open_calling
from tests.loop_clock import LoopClock
from tests.quick import first_quick
from tests.replies import chat_request
from tests.servers import wait_until
from tollbook.inference.attempts import ChatRequest
from tollbook.inference.calls.call import Call
from tollbook.inference.calls.holds import Hold
from tollbook.inference.calls.runner import CallRunner
from tollbook.inference.deltas import Delta, OnDelta
from tollbook.inference.providers.client import ProviderClient
from tollbook.schemas.events import Event, ModelCalled
from tollbook.schemas.results import ErrorCode, InferenceResult, TaskStatus
from tollbook.standin.book import Entry
from tollbook.standin.event_streams import DONE

SONNET: Final = "anthropic/claude-sonnet-4"
PRICE: Final = PROMPT_TOKENS * 3_000 + COMPLETION_TOKENS * 15_000
BOUND: Final = PROMPT_BOUND * 3_750 + 2_000 * 15_000
WORDS: Final = " ".join(["[stand-in]", *["nothing"] * (COMPLETION_TOKENS - 1)])


@pytest.fixture
async def calling(redis_client: Redis, server_url: str, tmp_path: Path) -> AsyncIterator[Calling]:
    settings = {"dialect": "openrouter", "attempt_timeout_s": 30.0, "idle_timeout_s": 20.0}
    async with open_calling(server_url, tmp_path, **settings) as calling:
        calling.provider.config = replace(calling.provider.config, chunk_ms=0)
        yield calling
        await calling.check_guarantees()


class Reader:
    """A reader of deltas. `first` is set with the first delta; while `is_busy`, it takes no further delta."""

    def __init__(self, *, is_busy: bool = False) -> None:
        self.deltas: list[Delta] = []
        self.first = asyncio.Event()
        self.is_busy = is_busy

    async def take(self, delta: Delta) -> None:
        self.deltas.append(delta)
        self.first.set()
        if self.is_busy:
            await asyncio.get_running_loop().create_future()

    def said(self, name: str = "content") -> str:
        return "".join(delta["choices"][0]["delta"].get(name, "") for delta in self.deltas)

    def finishes(self) -> list[str]:
        return [word for delta in self.deltas if (word := delta["choices"][0]["finish_reason"])]


async def run(
    calling: Calling, on_delta: OnDelta, call: Call | None = None, runner: CallRunner | None = None
) -> InferenceResult:
    call = call or calling.call()
    hold = await calling.runtime.reservations.reserve(call)
    assert isinstance(hold, Hold)
    return await (runner or calling.runtime.runner).run(call, hold, on_delta=on_delta)


async def attempts(calling: Calling) -> list[tuple[str, str, str]]:
    called: list[Event] = [event for event in await calling.events("t1") if isinstance(event.payload, ModelCalled)]
    payloads = [event.payload for event in called if isinstance(event.payload, ModelCalled)]
    return [(each.model, each.outcome, each.charge_basis) for each in payloads]


async def test_deltas_joined_are_the_result(calling: Calling) -> None:
    reader = Reader()
    result = await run(calling, reader.take)
    assert (result.status, result.content) == (TaskStatus.DONE, WORDS)
    assert (reader.said(), reader.finishes()) == (WORDS, ["stop"])
    assert len(reader.deltas) == COMPLETION_TOKENS + 1
    assert not any("usage" in delta for delta in reader.deltas)
    assert await calling.spent() == calling.booked() == PRICE


async def test_first_delta_comes_before_the_end_and_a_leaving_reader_pays_for_it(calling: Calling) -> None:
    calling.script("stream_hang")
    reader = Reader()
    running = asyncio.create_task(run(calling, reader.take))
    async with asyncio.timeout(10):
        await reader.first.wait()
    assert calling.booked() == 0
    running.cancel()
    await asyncio.wait({running})
    assert running.cancelled()
    assert len(calling.provider.cut_off) == 1
    assert await attempts(calling) == [(SONNET, "abandoned", "reported")]
    assert 0 < await calling.spent() == calling.booked() < PRICE
    assert await calling.assumed() == 0


async def test_failing_reader_gets_its_error_and_the_hold_is_settled(calling: Calling) -> None:
    async def fail(_: Delta) -> None:
        raise ConnectionResetError("the browser is gone")

    with pytest.raises(ConnectionResetError, match="the browser is gone"):
        await run(calling, fail)
    assert [outcome for _, outcome, _ in await attempts(calling)] == ["abandoned"]


async def test_cost_that_the_provider_does_not_tell_is_assumed_after_some_tries(
    calling: Calling, monkeypatch: pytest.MonkeyPatch
) -> None:
    calling.script("stream_hang")
    reader = Reader()
    booked: list[Entry] = []
    monkeypatch.setattr(calling.provider.book, "charge", booked.append)
    async with calling.runner() as (single, pauses):
        running = asyncio.create_task(run(calling, reader.take, runner=single.runner))
        await reader.first.wait()
        running.cancel()
        await asyncio.wait({running})
    assert len(pauses) > 1
    assert await attempts(calling) == [(SONNET, "abandoned", "assumed")]
    assert (await calling.spent(), await calling.assumed()) == (BOUND, BOUND)
    assert len(booked) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "outcome", "basis"),
    [
        ("stream_cut", "connection_error", "assumed"),
        ("stream_half_event", "connection_error", "assumed"),
        ("stream_reset", "connection_error", "assumed"),
        ("stream_error", "provider_error", "released"),
    ],
)
async def test_failure_after_the_first_delta_is_the_end(calling: Calling, fault: str, outcome: str, basis: str) -> None:
    calling.script(fault, None)
    reader = Reader()
    result = await run(calling, reader.take)
    assert (result.status, result.error_code) == (TaskStatus.FAILED, ErrorCode.INFERENCE_FAILED)
    assert await attempts(calling) == [(SONNET, outcome, basis)]
    assert reader.said() == result.content
    assert WORDS.startswith(reader.said())
    assert reader.finishes() == []
    assert calling.provider.requests == 1


@pytest.mark.parametrize("fault", first_quick(1, ["http_503", "http_529", "error_in_200", "html_body"]))
async def test_before_the_first_delta_the_call_is_retried_as_usual(calling: Calling, fault: str) -> None:
    calling.provider.config = replace(calling.provider.config, chunk_ms=None)
    calling.script(fault, None)
    reader = Reader()
    result = await run(calling, reader.take)
    assert (result.status, reader.said()) == (TaskStatus.DONE, result.content)
    assert len(await attempts(calling)) == 2
    assert reader.finishes() == ["stop"]


async def test_fallback_before_the_first_delta(calling: Calling) -> None:
    calling.script("http_400")
    reader = Reader()
    result = await run(calling, reader.take)
    assert [model for model, _, _ in await attempts(calling)] == [SONNET, "openai/gpt-4o-mini"]
    assert reader.said() == result.content == WORDS


def with_larger_limit(calling: Calling) -> Call:
    call = calling.call()
    return replace(call, route=call.route.model_copy(update={"retry_max_tokens": 3_000}))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scenario", "tries"), first_quick(2, [("limit_before_text", 2), ("text_cut", 1), ("reasoning_used_up_limit", 1)])
)
async def test_larger_limit_is_tried_only_where_nothing_was_passed_on(
    calling: Calling, scenario: str, tries: int
) -> None:
    calling.script(scenario, None)
    reader = Reader()
    result = await run(calling, reader.take, with_larger_limit(calling))
    assert len(await attempts(calling)) == tries
    assert reader.said() == (result.content or "")
    assert reader.said("reasoning") == (result.reasoning or "")
    assert reader.finishes() == [result.finish_reason] == ["stop" if tries == 2 else "length"]


@pytest.mark.slow
async def test_second_try_that_fails_after_its_first_delta_is_the_end(calling: Calling) -> None:
    calling.script("limit_before_text", "stream_cut")
    reader = Reader()
    result = await run(calling, reader.take, with_larger_limit(calling))
    assert (result.status, len(await attempts(calling))) == (TaskStatus.FAILED, 2)
    assert reader.said() == result.content
    assert reader.finishes() == []


@pytest.mark.parametrize(
    "scenario", first_quick(2, ["text_cut", "tool_calls", "refusal", "text_parts", "nothing_said"])
)
async def test_answer_that_comes_whole_is_one_delta(calling: Calling, scenario: str) -> None:
    calling.script(scenario)

    async def unstreamed(asked: httpx.Request) -> httpx.Response:
        document: dict[str, Any] = {**json.loads(asked.content), "stream": False}
        async with httpx.AsyncClient() as client:
            return await client.post(
                asked.url, json=document, headers={"Authorization": asked.headers["Authorization"]}
            )

    reader = Reader()
    async with calling.runner(transport=httpx.MockTransport(unstreamed)) as (single, _):
        result = await run(calling, reader.take, runner=single.runner)
    (delta,) = reader.deltas
    said = delta["choices"][0]["delta"]
    assert (said.get("content"), said.get("refusal")) == (result.content, result.refusal)
    assert [{**call, "index": None} for call in said.get("tool_calls", [])] == [
        {**call, "index": None} for call in result.tool_calls or []
    ]
    assert reader.finishes() == [result.finish_reason]


CHUNK: Final = b'data: {"choices": [{"delta": {"content": "x"}}]}\n\n'
END: Final = b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": {"cost": 0.5}}\n\n'


class Upstream(httpx.AsyncByteStream):
    """An event stream that counts what was read of it; it never ends, but says what it is given first."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = pieces
        self.read = 0
        self.is_closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            self.read += 1
            yield piece
        await asyncio.get_running_loop().create_future()

    async def aclose(self) -> None:
        self.is_closed = True


def asking(upstream: Upstream, **changes: Any) -> ProviderClient:
    response = httpx.Response(200, headers={"Content-Type": "text/event-stream"}, stream=upstream)
    values: dict[str, Any] = {"dialect": "compatible", "attempt_timeout_s": 100.0, **changes}
    return ProviderClient(base_url="http://p.test/v1", transport=httpx.MockTransport(lambda _: response), **values)


async def test_slow_reader_slows_the_provider_down(calling: Calling) -> None:
    upstream, reader = Upstream(*[CHUNK] * 50), Reader(is_busy=True)
    async with asking(upstream) as client:
        running = asyncio.create_task(client.complete(chat(calling), on_delta=reader.take))
        await reader.first.wait()
        assert upstream.read == 1
        running.cancel()
        await asyncio.wait({running})
    assert upstream.is_closed


def chat(calling: Calling) -> ChatRequest:
    return replace(chat_request(), messages=calling.call().messages)


async def test_stream_that_falls_silent_times_out(calling: Calling, loop_clock: LoopClock) -> None:
    upstream, reader = Upstream(CHUNK), Reader()
    async with asking(upstream, idle_timeout_s=60.0) as client:
        running = asyncio.create_task(client.complete(chat(calling), on_delta=reader.take))
        await wait_until(lambda: upstream.read == 1 and reader.deltas)
        loop_clock.advance(61)
        attempt = await running
    assert (attempt.outcome, attempt.charge, attempt.content) == ("timeout", "unknown", "x")
    assert upstream.is_closed


async def test_reader_does_not_use_up_the_wait_for_the_next_byte(calling: Calling, loop_clock: LoopClock) -> None:
    async def wait_long(_: Delta) -> None:
        loop_clock.advance(50)
        await asyncio.sleep(0)

    upstream = Upstream(CHUNK, CHUNK, END, DONE)
    async with asking(upstream, idle_timeout_s=40.0, attempt_timeout_s=1_000.0) as client:
        running = asyncio.create_task(client.complete(chat(calling), on_delta=wait_long))
        await wait_until(lambda: upstream.read == 4)
        loop_clock.advance(2)
        attempt = await running
    assert (attempt.outcome, attempt.content) == ("ok", "xx")


@pytest.mark.parametrize("pieces", [(CHUNK, END), (CHUNK, END, DONE)])
async def test_answer_that_is_complete_is_one_although_its_connection_stays_open(
    calling: Calling, loop_clock: LoopClock, pieces: tuple[bytes, ...]
) -> None:
    """G4."""
    upstream = Upstream(*pieces)
    async with asking(upstream) as client:
        running = asyncio.create_task(client.complete(chat(calling), on_delta=Reader().take))
        await wait_until(lambda: upstream.read == len(pieces))
        loop_clock.advance(2 if DONE in pieces else 101)
        attempt = await running
    assert (attempt.outcome, attempt.content, attempt.reported_cost_nanousd) == ("ok", "x", 500_000_000)


@pytest.mark.slow
@pytest.mark.parametrize("is_streamed", [True, False])
async def test_log_probabilities_are_in_the_result_that_asks_for_them(calling: Calling, is_streamed: bool) -> None:
    reader = Reader()
    call = calling.call(model="openai/gpt-4o-mini", logprobs=True)
    hold = await calling.runtime.reservations.reserve(call)
    assert isinstance(hold, Hold)
    result = await calling.runtime.runner.run(call, hold, on_delta=reader.take if is_streamed else None)
    assert result.content is not None
    assert result.logprobs is not None
    assert [each["token"] for each in result.logprobs["content"]] == result.content.split()
    assert await calling.runtime.handle.results.get_of("t1", "u1") == result
