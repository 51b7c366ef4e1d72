"""The provider's client against the stand-in over a real socket, and over transports that fail as no server can.

Each failure must say what is known about the charge (G3), and which model may be asked next.
"""

import asyncio
import gzip
import json
import logging
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import httpx
import pytest
from pydantic import SecretStr
from structlog.testing import capture_logs

from tests.loop_clock import LoopClock
from tests.servers import wait_until
from tollbook.inference.attempts import Attempt, ChatRequest
from tollbook.inference.bounds import bound
from tollbook.inference.errors import ProviderRefused, ProviderUnavailable
from tollbook.inference.prices.catalogue import PriceCatalogue
from tollbook.inference.providers.client import ProviderClient
from tollbook.inference.providers.transport import MAX_BODY_BYTES
from tollbook.inference.settings import load_settings
from tollbook.schemas.messages import Message
from tollbook.schemas.usage import Usage
from tollbook.standin import FaultPlan, StandIn, StandInConfig

KEY, PROMPT, COMPLETION = "sk-or-v1-very-secret", "the secret prompt", "the secret completion"
MODEL = "anthropic/claude-3-haiku"
# 17 bytes are 5 tokens, and 4 for the message; the mark asks for 40 more.
MARKED = f"{PROMPT} [[completion_tokens=40]]"
PRICE = (-(-len(MARKED) // 4) + 4) * 250 + 40 * 1_250

# Fault of the stand-in -> outcome, charge, may be asked again, may fall back.
ATTEMPT_TIMEOUT_S = 600.0
FAULTS: list[tuple[str, str, str, bool, bool]] = [
    ("http_400", "http_error", "none", False, True),
    ("http_401", "http_error", "none", False, False),
    ("http_402", "http_error", "none", False, True),
    ("in_flight", "http_error", "none", True, True),
    ("http_403", "http_error", "none", False, True),
    ("http_404", "http_error", "none", False, True),
    ("http_408", "http_error", "unknown", True, True),
    ("http_413", "http_error", "none", False, True),
    ("http_422", "http_error", "none", False, True),
    ("http_429", "http_error", "none", True, True),
    ("http_500", "http_error", "none", True, True),
    ("http_502", "http_error", "none", True, True),
    ("http_503", "http_error", "none", True, True),
    ("http_524", "http_error", "unknown", True, True),
    ("http_529", "http_error", "none", True, True),
    ("hang", "timeout", "unknown", True, True),
    ("hang_charged", "timeout", "unknown", True, True),
    ("reset_before_charge", "connection_error", "unknown", True, True),
    ("reset_after_charge", "connection_error", "unknown", True, True),
    ("reset_mid_body", "connection_error", "unknown", True, True),
    ("broken_json", "invalid_response", "unknown", True, True),
    ("html_body", "invalid_response", "unknown", True, True),
    ("error_in_200", "provider_error", "none", True, True),
    ("error_finish", "provider_error", "known", True, True),
]

Answer = Callable[[httpx.Request], Awaitable[httpx.Response]]


class Transport(httpx.AsyncBaseTransport):
    """Answers with a function, and keeps the requests."""

    def __init__(self, answer: Answer | httpx.Response | BaseException) -> None:
        self.answer = answer
        self.requests: list[httpx.Request] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        if isinstance(self.answer, BaseException):
            raise self.answer
        if isinstance(self.answer, httpx.Response):
            return self.answer
        return await self.answer(request)


class Trickle(httpx.AsyncByteStream):
    """A body that comes in pieces; `fail` is raised after them, a future without a result never ends."""

    def __init__(self, *pieces: bytes, fail: Exception | None = None, is_endless: bool = False) -> None:
        self.pieces, self.fail, self.is_endless = pieces, fail, is_endless
        self.read = 0
        self.is_closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            self.read += len(piece)
            yield piece
        if self.fail is not None:
            raise self.fail
        while self.is_endless:
            await asyncio.sleep(0.01)
            yield b" "

    async def aclose(self) -> None:
        self.is_closed = True


def request(prompt: str = MARKED, **changes: Any) -> ChatRequest:
    values = {"model": MODEL, "messages": (Message(role="user", content=prompt),), "max_tokens": 200}
    return ChatRequest(**{**values, "parameters": {"temperature": 0.1}, "user": "u1", **changes})


@asynccontextmanager
async def standin(*script: str | None, **config: Any) -> AsyncIterator[tuple[StandIn, ProviderClient]]:
    async with (
        StandIn(StandInConfig(faults=FaultPlan(script=script), api_key=KEY, **config)) as server,
        client(base_url=server.base_url) as provider,
    ):
        yield server, provider


def client(**changes: Any) -> ProviderClient:
    values: dict[str, Any] = {
        "api_key": SecretStr(KEY),
        "dialect": "compatible",
        "attempt_timeout_s": ATTEMPT_TIMEOUT_S,
    }
    return ProviderClient(**{**values, "base_url": "http://provider.test/v1", **changes})


async def complete(answer: Answer | httpx.Response | BaseException, **changes: Any) -> Attempt:
    async with client(transport=Transport(answer), **changes) as provider:
        return await provider.complete(request())


def document(**changes: Any) -> dict[str, Any]:
    return {
        "id": "gen-body",
        "model": MODEL,
        "choices": [{"message": {"role": "assistant", "content": COMPLETION}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 5, "cost": 0.0000045},
    } | changes


async def test_completion_over_a_socket() -> None:
    async with standin() as (server, provider):
        attempt = await provider.complete(request())
    assert attempt == Attempt(
        outcome="ok",
        charge="known",
        latency_ms=attempt.latency_ms,
        content="[stand-in] 40 tokens of nothing.",
        model_used=MODEL,
        finish_reason="stop",
        http_status=200,
        usage=Usage(prompt_tokens=-(-len(MARKED) // 4) + 4, completion_tokens=40),
        reported_cost_nanousd=PRICE,
        generation_id=next(iter(server.book.entries)),
    )
    assert server.book.totals() == {"u1": PRICE}


@pytest.mark.parametrize(("fault", "outcome", "charge", "is_retryable", "may_fall_back"), FAULTS)
async def test_fault_is_classified(
    fault: str, outcome: str, charge: str, is_retryable: bool, may_fall_back: bool, loop_clock: LoopClock
) -> None:
    async with standin(fault) as (server, provider):
        asked = asyncio.create_task(provider.complete(request()))
        if outcome == "timeout":
            await wait_until(lambda: server.requests == 1)
            loop_clock.advance(ATTEMPT_TIMEOUT_S + 1)
        attempt = await asked
        assert (attempt.outcome, attempt.charge) == (outcome, charge)
        assert (attempt.is_retryable, attempt.may_fall_back) == (is_retryable, may_fall_back)
        assert (attempt.content, attempt.is_ok) == (None, False)
        assert attempt.error
        assert server.requests == 1, "nothing is sent twice"
        if charge == "none":
            # G3: "none" is a promise.
            assert server.book.totals() == {}
        # If the headers have arrived, they name the generation, even if the body broke.
        has_headers = attempt.http_status is not None
        assert (attempt.generation_id is not None) == has_headers
        # The connection pool is sound afterwards.
        assert (await provider.complete(request())).is_ok


@pytest.mark.parametrize(
    ("fault", "charge", "cost", "has_usage"),
    [
        ("missing_usage", "unknown", None, False),
        ("missing_cost", "known", None, True),
        ("null_cost", "known", None, True),
        ("zero_cost", "known", 0, True),
        ("overcharge", "known", 10 * PRICE, True),
        ("slow", "known", PRICE, True),
    ],
)
async def test_completion_with_an_odd_cost(fault: str, charge: str, cost: int | None, has_usage: bool) -> None:
    async with standin(fault, slow_ms=1) as (_, provider):
        attempt = await provider.complete(request())
    assert (attempt.outcome, attempt.charge, attempt.reported_cost_nanousd) == ("ok", charge, cost)
    assert (attempt.usage is not None) == has_usage


async def test_nothing_listens() -> None:
    async with StandIn() as server:
        gone = server.base_url
    async with client(base_url=gone) as provider:
        attempt = await provider.complete(request())
        assert (attempt.outcome, attempt.charge) == ("not_sent", "none")
        assert (attempt.is_retryable, attempt.may_fall_back) == (True, False)
        with pytest.raises(ProviderUnavailable):
            await provider.models()


async def test_host_without_an_address() -> None:
    async with client(base_url="http://nowhere.invalid/v1") as provider:
        attempt = await provider.complete(request())
    assert (attempt.outcome, attempt.charge) == ("not_sent", "none")


async def test_server_that_does_not_speak_http() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"220 mail.test ESMTP\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server, client(base_url=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as provider:
        attempt = await provider.complete(request())
    assert (attempt.outcome, attempt.charge) == ("invalid_response", "unknown")


async def test_server_that_closes_before_it_answers() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server, client(base_url=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as provider:
        attempt = await provider.complete(request())
    # It has read the request, so the money may be gone.
    assert (attempt.outcome, attempt.charge) == ("connection_error", "unknown")


def _caused_by(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("raised", "outcome", "charge"),
    [
        (httpx.ConnectError("x"), "not_sent", "none"),
        (httpx.ConnectTimeout("x"), "not_sent", "none"),
        (httpx.PoolTimeout("x"), "not_sent", "none"),
        (httpx.ProxyError("x"), "not_sent", "none"),
        (httpx.UnsupportedProtocol("x"), "not_sent", "none"),
        (httpx.WriteTimeout("x"), "timeout", "unknown"),
        (httpx.ReadTimeout("x"), "timeout", "unknown"),
        (TimeoutError("x"), "timeout", "unknown"),
        (httpx.WriteError("x"), "connection_error", "unknown"),
        (httpx.ReadError("x"), "connection_error", "unknown"),
        (httpx.RemoteProtocolError("x"), "connection_error", "unknown"),
        (ConnectionResetError("x"), "connection_error", "unknown"),
        (BrokenPipeError("x"), "connection_error", "unknown"),
        (httpx.DecodingError("x"), "invalid_response", "unknown"),
        # What the aiohttp transport makes of a connection lost after sending: the cause decides, not its name.
        (_caused_by(httpx.ConnectTimeout("x"), aiohttp.ServerDisconnectedError()), "connection_error", "unknown"),
        (_caused_by(httpx.ConnectTimeout("x"), aiohttp.SocketTimeoutError()), "timeout", "unknown"),
        (_caused_by(httpx.ReadTimeout("x"), aiohttp.ConnectionTimeoutError()), "not_sent", "none"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
async def test_broken_request_is_classified_by_whether_it_can_have_been_sent(
    raised: Exception, outcome: str, charge: str
) -> None:
    attempt = await complete(raised)
    assert (attempt.outcome, attempt.charge, attempt.http_status) == (outcome, charge, None)


async def test_error_of_our_own_code_is_not_swallowed() -> None:
    with pytest.raises(ZeroDivisionError):
        await complete(ZeroDivisionError())


async def test_cancelling_passes_through() -> None:
    sent = asyncio.Event()

    async def never(_: httpx.Request) -> httpx.Response:
        sent.set()
        return await asyncio.get_running_loop().create_future()

    running = asyncio.create_task(complete(never))
    await sent.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_body_that_trickles_is_cut_at_the_limit_of_the_whole_attempt() -> None:
    body = Trickle(b'{"id": "', is_endless=True)
    attempt = await complete(
        httpx.Response(200, headers={"X-Generation-Id": "gen-1"}, stream=body), attempt_timeout_s=0.5
    )
    assert (attempt.outcome, attempt.charge, attempt.generation_id) == ("timeout", "unknown", "gen-1")
    assert attempt.latency_ms >= 500
    assert body.is_closed


async def test_body_that_breaks_keeps_status_and_generation() -> None:
    body = Trickle(b'{"id"', fail=httpx.ReadError("x"))
    attempt = await complete(httpx.Response(200, headers={"X-Generation-Id": "gen-1"}, stream=body))
    assert (attempt.outcome, attempt.charge) == ("connection_error", "unknown")
    assert (attempt.http_status, attempt.generation_id) == (200, "gen-1")


async def test_broken_body_of_a_refusal_is_still_a_refusal() -> None:
    attempt = await complete(httpx.Response(429, stream=Trickle(b'{"err', fail=httpx.ReadError("x"))))
    assert (attempt.outcome, attempt.charge, attempt.http_status) == ("http_error", "none", 429)


async def test_body_larger_than_any_completion_is_not_read_to_its_end() -> None:
    piece = b" " * (1024 * 1024)
    body = Trickle(*[piece] * 64)
    attempt = await complete(httpx.Response(200, stream=body))
    assert (attempt.outcome, attempt.charge) == ("invalid_response", "unknown")
    assert body.read <= MAX_BODY_BYTES + len(piece)
    assert body.is_closed


async def test_body_that_unpacks_to_too_much_is_refused() -> None:
    packed = gzip.compress(b" " * (MAX_BODY_BYTES + 1))
    attempt = await complete(httpx.Response(200, headers={"Content-Encoding": "gzip"}, stream=Trickle(packed)))
    assert (attempt.outcome, attempt.charge) == ("invalid_response", "unknown")


async def test_packed_body_is_read() -> None:
    packed = gzip.compress(json.dumps(document()).encode())
    attempt = await complete(httpx.Response(200, headers={"Content-Encoding": "gzip"}, stream=Trickle(packed)))
    assert (attempt.content, attempt.reported_cost_nanousd) == (COMPLETION, 4_500)


async def test_body_that_is_not_what_its_encoding_says() -> None:
    body = Trickle(b"not gzip")
    attempt = await complete(httpx.Response(200, headers={"Content-Encoding": "gzip"}, stream=body))
    assert (attempt.outcome, attempt.charge) == ("invalid_response", "unknown")


async def test_redirect_is_not_followed_and_the_key_goes_nowhere_else() -> None:
    transport = Transport(httpx.Response(307, headers={"Location": "http://elsewhere.test/"}))
    async with client(transport=transport) as provider:
        attempt = await provider.complete(request())
    assert (attempt.outcome, attempt.charge, attempt.http_status) == ("http_error", "none", 307)
    assert [sent.url.host for sent in transport.requests] == ["provider.test"]


async def test_cookies_are_not_kept() -> None:
    transport = Transport(httpx.Response(200, headers={"Set-Cookie": "session=1"}, json=document()))
    async with client(transport=transport) as provider:
        await provider.complete(request())
        transport.answer = httpx.Response(200, json=document())
        await provider.complete(request())
    assert "cookie" not in transport.requests[1].headers


@pytest.mark.parametrize(
    ("headers", "pause_s"),
    [
        ({"Retry-After": "7"}, 7.0),
        ({"Retry-After": "1.5"}, 1.5),
        ({"Retry-After": "-3"}, 0.0),
        ({"Retry-After": "Thu, 01 Jan 1970 00:16:50 GMT"}, 10.0),
        # The provider's own clock counts, where it tells it.
        ({"Retry-After": "Thu, 01 Jan 1970 00:16:50 GMT", "Date": "Thu, 01 Jan 1970 00:16:20 GMT"}, 30.0),
        ({"Retry-After": "Thu, 01 Jan 1970 00:00:00 GMT"}, 0.0),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "nan"}, None),
        ({"Retry-After": "1e12"}, 86_400.0),
        ({}, None),
    ],
)
async def test_pause_that_the_provider_asks_for(headers: dict[str, str], pause_s: float | None) -> None:
    response = httpx.Response(429, headers=headers, json={"error": {"code": 429, "message": "slow down"}})
    attempt = await complete(response, now_s=lambda: 1_000.0)
    assert attempt.retry_after_s == pause_s


async def test_pause_over_a_socket() -> None:
    async with standin("http_503:7") as (_, provider):
        assert (await provider.complete(request())).retry_after_s == 7


@pytest.mark.parametrize(
    ("status", "body", "charge"),
    [
        # A bare 5xx comes from a proxy in between, which cannot know how the request ended.
        (500, b"<html>oops</html>", "unknown"),
        (502, b"", "unknown"),
        (503, b'{"detail": "x"}', "unknown"),
        (504, b'{"error": {"code": 504}}', "unknown"),
        (520, b'{"error": {"code": 520}}', "unknown"),
        (429, b"", "none"),
        # A refusal that bills all the same.
        (500, b'{"error": {"code": 500}, "usage": {"prompt_tokens": 1, "completion_tokens": 0, "cost": 0.1}}', "known"),
    ],
)
async def test_refusal_and_what_is_known_of_its_charge(status: int, body: bytes, charge: str) -> None:
    attempt = await complete(httpx.Response(status, content=body))
    assert (attempt.outcome, attempt.charge) == ("http_error", charge)


async def test_request_has_what_the_provider_needs() -> None:
    transport = Transport(httpx.Response(200, json=document()))
    async with client(transport=transport) as provider:
        await provider.complete(request(parameters={"temperature": 0.7}))
    sent = transport.requests[0]
    assert (sent.method, str(sent.url)) == ("POST", "http://provider.test/v1/chat/completions")
    assert sent.headers["authorization"] == f"Bearer {KEY}"
    assert "x-openrouter-title" not in sent.headers
    assert sent.headers["content-type"] == "application/json"
    assert json.loads(sent.content) == {
        "model": MODEL,
        "messages": [{"role": "user", "content": MARKED}],
        "max_tokens": 200,
        "temperature": 0.7,
        "user": "u1",
    }


async def test_openrouter_gets_the_name_of_the_application() -> None:
    transport = Transport(httpx.Response(200, json=document()))
    application = {"app_title": "My App", "app_url": "https://app.test/"}
    async with client(transport=transport, dialect="openrouter", **application) as provider:
        await provider.complete(request())
    sent = transport.requests[0].headers
    assert (sent["http-referer"], sent["x-openrouter-title"]) == ("https://app.test/", "My App")


async def test_request_without_key_and_user_names_neither() -> None:
    transport = Transport(httpx.Response(200, json=document()))
    async with client(transport=transport, api_key=None) as provider:
        await provider.complete(request(user=None))
    assert "authorization" not in transport.requests[0].headers
    assert "user" not in json.loads(transport.requests[0].content)


async def test_openrouter_is_told_to_obey_max_tokens_and_to_stay_below_the_bound() -> None:
    # G1: the hold is an upper bound only as long as no dearer endpoint is chosen.
    limit = bound((Message(role="user", content=PROMPT),), 200, PriceCatalogue().price(MODEL, 1_795_000_000_000))
    transport = Transport(httpx.Response(200, json=document()))
    async with client(transport=transport, dialect="openrouter") as provider:
        await provider.complete(request(price_limit=limit))
    assert json.loads(transport.requests[0].content)["provider"] == {
        "require_parameters": True,
        "max_price": {"prompt": "0.250000000", "completion": "1.250000000", "request": "0.000000000"},
    }


async def test_generation_tells_its_cost() -> None:
    async with standin("overcharge", "http_500") as (_, provider):
        charged, refused = [(await provider.complete(request())).generation_id for _ in range(2)]
        assert charged is not None
        assert refused is not None
        assert await provider.generation(charged) == 10 * PRICE
        assert await provider.generation(refused) is None
        assert await provider.generation("no such & generation?") is None


@pytest.mark.parametrize(
    ("response", "error"),
    [
        (httpx.Response(500), ProviderUnavailable),
        (httpx.Response(429), ProviderUnavailable),
        (httpx.Response(200, content=b"<html>"), ProviderUnavailable),
        (httpx.Response(200, json={"data": {"total_cost": -1}}), ProviderUnavailable),
        (httpx.Response(200, json={"data": {"total_cost": True}}), ProviderUnavailable),
        (httpx.Response(200, content=b'{"data": {"total_cost": 1e9999}}'), ProviderUnavailable),
        (httpx.Response(401), ProviderRefused),
        (httpx.Response(302), ProviderRefused),
    ],
)
async def test_generation_that_cannot_be_read_is_an_error(response: httpx.Response, error: type[Exception]) -> None:
    async with client(transport=Transport(response)) as provider:
        with pytest.raises(error):
            await provider.generation("gen-1")


@pytest.mark.parametrize("body", [{}, {"data": None}, {"data": {}}, {"data": {"total_cost": None}}, []])
async def test_generation_without_a_cost_is_not_known_yet(body: object) -> None:
    async with client(transport=Transport(httpx.Response(200, json=body))) as provider:
        assert await provider.generation("gen-1") is None


@pytest.mark.parametrize(
    ("generation", "nanousd"),
    [
        ({"total_cost": 2, "is_byok": False, "upstream_inference_cost": 2}, 2_000_000_000),
        ({"total_cost": 2, "is_byok": False, "upstream_inference_cost": 3}, 2_000_000_000),
        ({"total_cost": 2, "upstream_inference_cost": 1}, 2_000_000_000),
        # With an own key the total is the fee; without a flag, what is above the total cannot be in it.
        ({"total_cost": 1, "is_byok": True, "upstream_inference_cost": 20}, 21_000_000_000),
        ({"total_cost": 0, "is_byok": True, "upstream_inference_cost": 20}, 20_000_000_000),
        ({"total_cost": 1, "upstream_inference_cost": 20}, 21_000_000_000),
        ({"total_cost": 1, "is_byok": True, "upstream_inference_cost": None}, None),
        ({"total_cost": 1, "is_byok": True}, None),
        ({"total_cost": None, "is_byok": True, "upstream_inference_cost": 20}, None),
    ],
)
async def test_generation_under_an_own_key_costs_what_both_bill(
    generation: dict[str, Any], nanousd: int | None
) -> None:
    async with client(transport=Transport(httpx.Response(200, json={"data": generation}))) as provider:
        assert await provider.generation("gen-1") == nanousd


@pytest.mark.parametrize("name", ["own_key", "routers_key"])
async def test_generation_costs_what_the_reply_said(name: str) -> None:
    async with standin(name) as (server, _), client(base_url=server.base_url, dialect="openrouter") as provider:
        attempt = await provider.complete(request())
        assert attempt.generation_id is not None
        assert await provider.generation(attempt.generation_id) == attempt.reported_cost_nanousd
        assert [attempt.reported_cost_nanousd] == list(server.book.totals().values())


async def test_models_and_key() -> None:
    async with standin() as (server, provider):
        assert MODEL in await provider.models()
        assert "4 models" in await provider.check_key()
        async with client(base_url=server.base_url, dialect="openrouter") as openrouter:
            assert await openrouter.check_key() == "the key is valid"
        async with client(base_url=server.base_url, dialect="openrouter", api_key=SecretStr("sk-wrong")) as wrong:
            with pytest.raises(ProviderRefused) as refused:
                await wrong.check_key()
            assert refused.value.http_status == 401
            assert (await wrong.complete(request())).http_status == 401


async def test_client_is_made_from_settings() -> None:
    async with standin() as (server, _):
        settings = load_settings(env_file=None, openrouter_base_url=server.base_url, openrouter_api_key=KEY)
        async with ProviderClient.from_settings(settings) as provider:
            assert (await provider.complete(request())).reported_cost_nanousd == PRICE


SPEAKING = [
    # The provider quotes the prompt, as OpenRouter's moderation does.
    httpx.Response(403, json={"error": {"code": 403, "message": PROMPT, "metadata": {"flagged_input": PROMPT}}}),
    httpx.Response(200, json={"error": {"code": 502, "message": f"{PROMPT} {KEY}"}}),
    httpx.Response(200, json=document(usage={"prompt_tokens": 1, "completion_tokens": 1, "cost": -1})),
    httpx.Response(200, json=document(choices=[{"message": {"content": None, "refusal": PROMPT}}])),
    httpx.Response(401, json={"error": {"code": 401, "message": f"wrong key {KEY}"}}),
    httpx.Response(500, content=f"Bearer {KEY}".encode()),
    httpx.ReadError(f"{PROMPT} Bearer {KEY}"),
    httpx.ConnectError(f"http://user:{KEY}@provider.test/{PROMPT}"),
]


@pytest.mark.parametrize("answer", SPEAKING, ids=range(len(SPEAKING)))
async def test_secrets_are_in_no_repr_no_error_and_no_log_line(
    answer: httpx.Response | Exception, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    # G10
    caplog.set_level(logging.DEBUG)
    with capture_logs() as lines:
        async with client(transport=Transport(answer)) as provider:
            attempt = await provider.complete(request())
            shown = [repr(provider), repr(vars(provider)), repr(attempt), str(attempt.error), str(attempt.usage_doubt)]
            try:
                await provider.generation("gen-1")
            except (ProviderRefused, ProviderUnavailable) as exc:
                shown += [repr(exc), "".join(traceback.format_exception(exc))]
    shown += [repr(lines), caplog.text, *capfd.readouterr()]
    for secret in (KEY, PROMPT, COMPLETION):
        assert not [text for text in shown if secret in text]


async def test_doubtful_cost_is_logged_with_provider_and_model_only() -> None:
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "cost": -1}
    with capture_logs() as lines:
        attempt = await complete(httpx.Response(200, json=document(usage=usage)))
    assert (attempt.charge, attempt.reported_cost_nanousd) == ("known", None)
    assert lines == [
        {
            "event": "provider.usage_doubted",
            "log_level": "warning",
            "asked": "default",
            "model": MODEL,
            "problem": "the reported cost is no amount of money and was ignored",
        }
    ]
