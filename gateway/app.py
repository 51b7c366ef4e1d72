"""The gateway's ASGI application: its endpoints, and the middleware for every request."""

import secrets
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, Final

import structlog
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tollbook.gateway.apis import Api
from tollbook.gateway.chat import ChatCompletions
from tollbook.gateway.endpoints import CALL_ID_HEADER, COST_HEADER, Calls
from tollbook.gateway.problems import Problem
from tollbook.gateway.translated import Messages
from tollbook.observability.gateway_counts import GatewayCounts

REQUEST_ID_HEADERS: Final = ("x-request-id", "request-id")
"""Headers with the request id, as OpenAI's and Anthropic's SDKs read it."""
_log = structlog.get_logger(__name__)


class RequestLog:
    """Gives each request an id, and logs one line at its end: never a prompt, an answer or a key (G10)."""

    def __init__(self, app: ASGIApp, counts: GatewayCounts) -> None:
        self._app = app
        self._counts = counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, and log it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req-{secrets.token_hex(12)}"
        known: dict[str, Any] = {"request_id": request_id}
        scope["tollbook"] = known
        started, status, size = time.monotonic(), 0, 0

        async def send_noted(message: Message) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = message["status"]
                named = [(header.encode(), request_id.encode()) for header in REQUEST_ID_HEADERS]
                message["headers"] = [*message.get("headers", []), *named]
            else:
                size += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, send_noted)
        finally:
            status = status or 499  # The client left first.
            self._counts.requests[status] += 1
            _log.info(
                "gateway.answered",
                method=scope["method"],
                path=scope["path"],
                status=status,
                bytes=size,
                ms=round(1000 * (time.monotonic() - started)),
                **known,
            )


def build_app(
    calls: Calls,
    counts: GatewayCounts,
    apis: Sequence[tuple[str, Api]],
    further: Sequence[BaseRoute],
    *,
    cors_origins: Sequence[str] = (),
) -> ASGIApp:
    """Return the application: `apis` are the paths that make calls, `further` the other routes."""
    routes = [Route(path, partial(_answer, calls, api), methods=["POST"]) for path, api in apis]
    middleware = [Middleware(RequestLog, counts)]
    if cors_origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(cors_origins),
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=[CALL_ID_HEADER, COST_HEADER, *REQUEST_ID_HEADERS, "retry-after", "x-should-retry"],
            )
        )
    handlers: dict[Any, Any] = {404: _not_found, 405: _not_found}
    return Starlette(
        routes=[*routes, *further],
        middleware=middleware,
        exception_handlers=handlers,
    )


async def _answer(calls: Calls, api: Api, request: Request) -> Any:
    return await calls.answer(request, api)


def refusal(request: Request, problem: Problem) -> Response:
    """Return a refusal in the format of the API that the path or the headers belong to."""
    is_anthropic = request.url.path.startswith("/v1/messages") or "anthropic-version" in request.headers
    api = Messages() if is_anthropic else ChatCompletions()
    body = api.error_body(problem, request.scope["tollbook"]["request_id"])
    return JSONResponse(body, status_code=problem.status, headers=problem.headers)


async def _not_found(request: Request, exc: Exception) -> Response:
    status = getattr(exc, "status_code", 404)
    path = request.url.path
    meant = f"/v1{path.replace('/v1', '')}"
    is_there = any(route.path == meant for route in request.app.routes if isinstance(route, Route))
    hint = f"use {meant}: correct the base URL" if meant != path and is_there else "/openapi.json lists the endpoints"
    message = f"{request.method} {path}: there is no such endpoint; {hint}"
    return refusal(request, Problem(status, "not_found", message, should_retry=False))
