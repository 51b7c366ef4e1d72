"""The stand-in's HTTP server: the endpoints of `apis.py`, and `/standin/` to read its book and to make it fail."""

import asyncio
import json
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from aiohttp import web

from tollbook.schemas.json_text import NotJson, RepeatedKey, parse_json
from tollbook.standin.apis import APIS, Api
from tollbook.standin.book import Book, Entry
from tollbook.standin.event_streams import COMMENT, cut, cut_into_tokens
from tollbook.standin.faults import FAULTS, STREAM_FAULTS, FaultPlan, check_fault, http_fault
from tollbook.standin.prices import EMBEDDINGS_PRICES, PRICES, ListPrice, listing, usd_literal
from tollbook.standin.replies import (
    BadRequest,
    CompletionRequest,
    EmbeddingsRequest,
    error,
    filler,
    read_embeddings_request,
)
from tollbook.standin.scenarios import SCENARIOS, fee_of_own_key
from tollbook.standin.streams import PacedStream

_MAX_BODY_BYTES: Final = 32 * 1024 * 1024
_WITHOUT_HEADERS: Final = ("in_flight", "hang", "hang_charged", "reset_before_charge", "reset_after_charge",
                           "reset_mid_body")  # fmt: skip
"""Faults before the headers, so that no stream begins."""


@dataclass(frozen=True, slots=True)
class StandInConfig:
    """How the stand-in behaves. Port 0: any free port. With an `api_key`, requests without it are refused.

    With `chunk_ms`, a streamed answer has a word for each token, sent as a separate part with this pause after it, and
    a client that disconnects is charged for the sent part. Without, the answer comes in two parts at once.
    With `lists_prices`, `/models` has prices, as OpenRouter's does; many servers' lists have none.
    """

    port: int = 0
    latency_ms: int = 0
    slow_ms: int = 500
    chunk_ms: int | None = None
    faults: FaultPlan = field(default_factory=FaultPlan)
    book_path: Path | None = None
    api_key: str | None = None
    lists_prices: bool = False


class StandIn:
    """The server on 127.0.0.1; use it with `async with`. `base_url` ends with /api/v1, as OpenRouter's does.

    Other dialects have other paths, such as `/anthropic/v1`.
    """

    def __init__(self, config: StandInConfig | None = None) -> None:
        self.config = config or StandInConfig()
        self.book = Book(self.config.book_path)
        self.faults = self.config.faults
        self.list_prices: dict[str, ListPrice] = dict(PRICES) if self.config.lists_prices else {}
        """Prices in `/models`, by model; a change is visible at once. Charges do not depend on it."""
        self.requests = 0
        # A book outlives its server, so the ids of two servers must differ, or one charge would replace another.
        self._run = secrets.token_hex(4)
        self._ids = count(1)
        self._runner: web.AppRunner | None = None
        self._port = 0
        self._stopping = asyncio.Event()
        self.cut_off: set[str] = set()
        """Ids of the requests whose clients disconnected before the end of the reply."""

    @property
    def root_url(self) -> str:
        """The server's URL."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def base_url(self) -> str:
        """The value for OPENROUTER_BASE_URL."""
        return f"{self.root_url}/api/v1"

    async def start(self) -> None:
        """Listen. Errors: OSError if the port is taken."""
        app = web.Application(client_max_size=_MAX_BODY_BYTES)
        for api in APIS:
            app.router.add_post(f"{api.prefix}/{api.completion_path}", partial(self._complete, api=api))
            app.router.add_get(f"{api.prefix}/models", partial(self._models, api=api))
            if api.states_costs:
                app.router.add_post(f"{api.prefix}/embeddings", partial(self._embed, api=api))
                app.router.add_get(f"{api.prefix}/embeddings/models", self._embeddings_models)
                app.router.add_get(f"{api.prefix}/generation", partial(self._generation, api=api))
                app.router.add_get(f"{api.prefix}/key", partial(self._key, api=api))
        app.router.add_get("/standin/book", self._show_book)
        app.router.add_get("/standin/health", self._health)
        app.router.add_post("/standin/faults", self._set_faults)
        # A client that disconnects cancels its handler: otherwise a hanging request would outlive the test.
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.config.port)
        await site.start()
        self._port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Stop listening; hanging requests get an error."""
        self._stopping.set()
        if self._runner is not None:
            await self._runner.cleanup()
        self.book.close()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    async def _complete(self, request: web.Request, api: Api) -> web.StreamResponse:
        return await self._serve(request, api, api.read_request)

    async def _embed(self, request: web.Request, api: Api) -> web.StreamResponse:
        return await self._serve(request, api, read_embeddings_request)

    async def _serve(
        self, request: web.Request, api: Api, read: Callable[[Any], CompletionRequest]
    ) -> web.StreamResponse:
        self.requests += 1
        generation_id = f"gen-standin-{self._run}-{next(self._ids)}"
        reply = partial(_reply, generation_id=generation_id, id_header=api.id_header)
        if not self._is_authorised(request, api):
            return reply(401, api.error(401, "No auth credentials found"))
        try:
            asked = read(json.loads(await request.read()))
            fault = check_fault(asked.fault) if asked.fault else self.faults.next()
            if fault in SCENARIOS and SCENARIOS[fault].error is None and isinstance(asked, EmbeddingsRequest):
                fault = None  # Such scenarios are about the text of a completion.
        except BadRequest as exc:
            return reply(exc.status, api.error(exc.status, str(exc)))
        except (ValueError, RecursionError) as exc:
            return reply(400, api.error(400, str(exc)))
        try:
            return await self._answer(request, asked, generation_id, fault, api)
        except (asyncio.CancelledError, ConnectionResetError):
            self.cut_off.add(generation_id)
            raise

    async def _answer(
        self, request: web.Request, asked: CompletionRequest, generation_id: str, fault: str | None, api: Api
    ) -> web.StreamResponse:
        if fault is not None and fault in SCENARIOS:
            return await self._play(request, fault, asked, generation_id, api)
        if asked.is_streamed and (fault in STREAM_FAULTS or (fault is None and self.config.chunk_ms is not None)):
            return await self._stream(request, asked, generation_id, fault, api)
        if fault in STREAM_FAULTS:
            fault = None
        reply = partial(_reply, generation_id=generation_id, id_header=api.id_header)
        status = http_fault(fault) if fault else None
        # Charged before the wait: a client that disconnects meanwhile is charged in full, as by OpenRouter.
        charged = 0 if status else self._charge(asked, generation_id, fault)
        is_streamed = asked.is_streamed and not status and fault not in _WITHOUT_HEADERS
        stream = await _begin(request, generation_id, api) if is_streamed else None
        delay_ms = self.config.latency_ms + (self.config.slow_ms if fault == "slow" else 0)
        if delay_ms:
            await asyncio.sleep(delay_ms / 1000)
        if status is not None:
            return reply(status[0], api.error(status[0], "a fault of the stand-in"), retry_after_s=status[1])
        match fault:
            case "in_flight":
                body = api.error(402, "busy", {"error_type": "in_flight_budget_exhausted"})
                return reply(402, body, retry_after_s=1)
            case "hang" | "hang_charged":
                await self._stopping.wait()
                return reply(503, api.error(503, "stopping"))
            case "stalled":
                return await self._stall(stream or await _begin(request, generation_id, api), asked, generation_id)
            case "reset_before_charge" | "reset_after_charge":
                return _reset(request)
            case "reset_mid_body":
                return await _reset_mid_body(request, generation_id, api.id_header)
            case "broken_json":
                body = api.completion(asked, generation_id, charged, None)[:-20]
            case "cut_off":
                body = api.completion(asked, generation_id, charged, None)
                events = api.events(body, cut) if stream else None
                body = b"".join(events[: len(events) // 2]) if events else body[: len(body) // 2]
            case "html_body":
                body = b"<html><body>Bad gateway</body></html>"
            case "error_in_200":
                body = api.error(502, "provider failed")
            case _:
                body = api.completion(asked, generation_id, charged, fault)
        return await _end(stream, body, api) if stream else reply(200, body)

    async def _play(
        self, request: web.Request, name: str, asked: CompletionRequest, generation_id: str, api: Api
    ) -> web.StreamResponse:
        scenario = SCENARIOS[name]
        tokens = scenario.tokens(asked.model, asked.prompt_tokens, asked.completion_tokens)
        if scenario.is_charged:
            self._book(asked, generation_id, name, tokens.charge_nanousd)
        is_streamed = asked.is_streamed and scenario.status == 200
        stream = await _begin(request, generation_id, api) if is_streamed else None
        if self.config.latency_ms:
            await asyncio.sleep(self.config.latency_ms / 1000)
        body = api.scenario_body(scenario, tokens, generation_id, filler(asked))
        if stream:
            return await _end(stream, body, api)
        return _reply(scenario.status, body, generation_id, id_header=api.id_header)

    async def _stream(
        self, request: web.Request, asked: CompletionRequest, generation_id: str, fault: str | None, api: Api
    ) -> web.StreamResponse:
        """Stream an answer at its pace. The part that was sent, until the end or a disconnect, is charged."""
        asked = replace(asked, has_words=self.config.chunk_ms is not None)
        response = await _begin(request, generation_id, api)
        if self.config.latency_ms:
            await asyncio.sleep(self.config.latency_ms / 1000)
        body = api.completion(asked, generation_id, asked.price_nanousd, None)
        events = api.events(body, cut_into_tokens if asked.has_words else cut)
        assert events is not None, "a completion has events"

        def charge(share: float) -> None:
            generated = replace(asked, completion_tokens=max(1, round(asked.completion_tokens * share)))
            self._book(generated, generation_id, fault, generated.price_nanousd)

        stream = PacedStream(
            request=request,
            response=response,
            events=events,
            error=api.error_event(api.error(502, "provider failed")),
            charge=charge,
            stopping=self._stopping,
            pause_s=(self.config.chunk_ms or 0) / 1000,
        )
        return await stream.send(fault)

    async def _stall(
        self, stream: web.StreamResponse, asked: CompletionRequest, generation_id: str
    ) -> web.StreamResponse:
        """Send nothing more. Charge one token when the client disconnects or this server stops."""
        try:
            await self._stopping.wait()
        finally:
            self._book(asked, generation_id, "stalled", replace(asked, completion_tokens=1).price_nanousd)
        return stream

    def _charge(self, asked: CompletionRequest, generation_id: str, fault: str | None) -> int:
        if fault is not None and not FAULTS[fault]:
            return 0
        charged = asked.price_nanousd * (10 if fault == "overcharge" else 1)
        self._book(asked, generation_id, fault, charged)
        return charged

    def _book(self, asked: CompletionRequest, generation_id: str, fault: str | None, charged_nanousd: int) -> None:
        tokens = asked.prompt_tokens, asked.completion_tokens
        self.book.charge(Entry(generation_id, asked.user, asked.model, *tokens, charged_nanousd, fault))

    def _is_authorised(self, request: web.Request, api: Api) -> bool:
        key = self.config.api_key
        return key is None or api.has_key(request, key)

    async def _models(self, request: web.Request, api: Api) -> web.Response:
        if not api.states_costs and not self._is_authorised(request, api):
            return _unauthorised(api)  # OpenRouter lists its models without a key.
        if not api.states_costs:
            return web.json_response(api.models())
        models: list[dict[str, Any]] = [
            {"id": model, "description": "A stand-in, not OpenRouter"}
            | ({"pricing": listing(self.list_prices[model])} if model in self.list_prices else {})
            for model in PRICES.keys() | self.list_prices.keys()
        ]
        return web.json_response({"data": models})

    async def _embeddings_models(self, _: web.Request) -> web.Response:
        models = [
            {
                "id": model,
                "description": "A stand-in, not OpenRouter",
                "context_length": 8_192,
                "architecture": {"input_modalities": ["text"], "output_modalities": ["embeddings"]},
                "pricing": listing(price),
            }
            for model, price in EMBEDDINGS_PRICES.items()
        ]
        return web.json_response({"data": models if self.config.lists_prices else []})

    async def _generation(self, request: web.Request, api: Api) -> web.Response:
        if not self._is_authorised(request, api):
            return _unauthorised(api)
        entry = self.book.entries.get(request.query.get("id", ""))
        if entry is None:
            return web.Response(status=404, body=error(404, "Generation not found"), content_type="application/json")
        total, own_key = entry.charged_nanousd, ""
        if entry.fault == "own_key":
            total = fee_of_own_key(entry.charged_nanousd)
            upstream = usd_literal(entry.charged_nanousd - total)
            own_key = f', "is_byok": true, "upstream_inference_cost": {upstream}'
        text = (
            f'{{"data": {{"id": "{entry.generation_id}", "model": "{entry.model}", '
            f'"total_cost": {usd_literal(total)}, "tokens_prompt": {entry.prompt_tokens}, '
            f'"tokens_completion": {entry.completion_tokens}{own_key}}}}}'
        )
        return web.Response(text=text, content_type="application/json")

    async def _key(self, request: web.Request, api: Api) -> web.Response:
        if not self._is_authorised(request, api):
            return _unauthorised(api)
        return web.json_response({"data": {"label": "stand-in", "usage": 0, "limit": None, "is_free_tier": False}})

    async def _show_book(self, _: web.Request) -> web.Response:
        entries = [asdict(entry) for entry in self.book.entries.values()]
        return web.json_response({"totals": self.book.totals(), "requests": self.requests, "entries": entries})

    async def _health(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "ok", "is": "a stand-in, not OpenRouter"})

    async def _set_faults(self, request: web.Request) -> web.Response:
        try:
            document: Any = parse_json(await request.read())
            self.faults = FaultPlan.from_json(document)
        except ValueError as exc:
            problem = f"the body {exc}" if isinstance(exc, NotJson | RepeatedKey) else str(exc)
            return web.json_response({"error": problem}, status=400)
        return web.json_response({"status": "ok"})


def _reply(
    status: int, body: bytes, generation_id: str, *, id_header: str, retry_after_s: int | None = None
) -> web.Response:
    headers = {id_header: generation_id}
    if retry_after_s is not None:
        headers["Retry-After"] = str(retry_after_s)
    return web.Response(status=status, body=body, content_type="application/json", headers=headers)


def _unauthorised(api: Api) -> web.Response:
    return web.Response(status=401, body=api.error(401, "No auth credentials found"), content_type="application/json")


def _reset(request: web.Request) -> web.Response:
    """Break the connection at once, without a reply."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response(status=500)


async def _begin(request: web.Request, generation_id: str, api: Api) -> web.StreamResponse:
    """Send the headers of an event stream, with the id, and a comment."""
    stream = web.StreamResponse(headers={api.id_header: generation_id, "Content-Type": "text/event-stream"})
    await stream.prepare(request)
    await stream.write(COMMENT)
    return stream


async def _end(stream: web.StreamResponse, body: bytes, api: Api) -> web.StreamResponse:
    """Send a body, as events if it is a completion, and end the stream."""
    await stream.write(b"".join(api.events(body, cut) or [body]))
    await stream.write_eof()
    return stream


async def _reset_mid_body(request: web.Request, generation_id: str, id_header: str) -> web.StreamResponse:
    response = web.StreamResponse(headers={id_header: generation_id, "Content-Length": "500"})
    await response.prepare(request)
    await response.write(b'{"id": "')
    if request.transport is not None:
        request.transport.close()
    return response
