"""Serves the gateway in the process's own event loop, over loopback or TLS."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final

import structlog
import uvicorn
from starlette.routing import BaseRoute

from tollbook.gateway.apis import Api
from tollbook.gateway.app import build_app
from tollbook.gateway.bodies import Bodies
from tollbook.gateway.callers import Callers, Keys
from tollbook.gateway.chat import ChatCompletions
from tollbook.gateway.connections import BoundedConnection, max_client_connections
from tollbook.gateway.embeddings import Embeddings
from tollbook.gateway.endpoints import Calls, Limits
from tollbook.gateway.heartbeat import PATIENCE_S, Heartbeat
from tollbook.gateway.idempotency import Idempotency
from tollbook.gateway.information import Information
from tollbook.gateway.routes import information_routes
from tollbook.gateway.translated import Messages, Responses
from tollbook.inference.api_keys import ApiKeys
from tollbook.inference.errors import SettingsError
from tollbook.inference.runtime import InferenceRuntime
from tollbook.inference.settings import Settings
from tollbook.observability.gateway_counts import GatewayCounts
from tollbook.observability.server import SignallessServer, listen, shown_address

DEFAULT_PORT = 8788
_CLOSING_S: Final = 1.0
_MAX_SETTLING_S: Final = 3.0
"""The part of the grace for cancelled calls: their cost is looked up and settled."""
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Gateway:
    """A running gateway. `url` is its address; `serving` ends early only if the server fails."""

    url: str
    calls: Calls
    counts: GatewayCounts
    serving: asyncio.Task[None]


def settings_of_calls(settings: Settings) -> Settings:
    """Return the settings of the gateway's calls: an attempt may take as long as its answer keeps arriving."""
    return settings.model_copy(
        update={"attempt_timeout_s": settings.gateway_timeout_s, "idle_timeout_s": settings.attempt_timeout_s}
    )


@asynccontextmanager
async def serve_gateway(
    runtime: InferenceRuntime,
    *,
    port: int,
    pages: Sequence[BaseRoute] = (),
    keys: Keys | None = None,
    counts: GatewayCounts | None = None,
) -> AsyncGenerator[Gateway]:
    """Serve until closed; running calls then have the grace to end. Port 0: any free port. `pages`: further routes.

    `keys` finds the keys of clients; by default those on the ledger. `counts` is read by metrics.

    `runtime` has the settings of `settings_of_calls`. Errors: SettingsError for an unusable address or certificate.
    """
    settings = runtime.settings
    listening = listen(settings.gateway_host, port, setting="TOLLBOOK_GATEWAY")

    counts = counts or GatewayCounts()
    heartbeat = Heartbeat(runtime.handle.pipeline, settings.namespace, runtime.name)
    callers = Callers(
        keys or ApiKeys(runtime.handle.pipeline, runtime.handle.keys[0], monotonic=time.monotonic), counts
    )
    idempotency = Idempotency(
        runtime.handle.pipeline,
        namespace=settings.namespace,
        gateway=runtime.name,
        is_alive=heartbeat.is_alive,
        patience_s=PATIENCE_S,
        remembered_s=settings.idempotency_ttl_s,
        counts=counts,
    )
    limits = Limits(
        max_calls=settings.gateway_max_calls,
        hold_wait_s=settings.gateway_wait_s,
        call_timeout_s=settings.gateway_timeout_s,
    )
    bodies = Bodies()
    calls = Calls(runtime, callers, idempotency, limits, counts, bodies, heartbeat.is_dead)
    apis: list[tuple[str, Api]] = [
        ("/v1/chat/completions", ChatCompletions()),
        ("/v1/responses", Responses()),
        ("/v1/embeddings", Embeddings()),
        ("/v1/messages", Messages()),
    ]
    routes = [*information_routes(Information(runtime, callers, bodies)), *pages]
    server = SignallessServer(
        _config(settings, build_app(calls, counts, apis, routes, cors_origins=settings.gateway_cors))
    )
    scheme = "https" if settings.gateway_cert else "http"
    url = f"{scheme}://{shown_address(settings.gateway_host, listening.getsockname()[1])}"
    with listening:
        async with heartbeat.running():
            serving = asyncio.create_task(server.serve(sockets=[listening]))
            _log.info("gateway.served", url=url)
            try:
                yield Gateway(url, calls, counts, serving)
            finally:
                server.should_exit = True  # No new connections; open ones may finish.
                grace_s = settings.stop_grace_s
                settling_s = min(_MAX_SETTLING_S, grace_s / 5)
                await calls.stop(max(0.0, grace_s - settling_s - _CLOSING_S), settling_s=settling_s)
                await serving
                # Calls that arrived during the first stop.
                await calls.stop(0.0, settling_s=min(settling_s, _CLOSING_S / 2))


def _config(settings: Settings, app: object) -> uvicorn.Config:
    config = uvicorn.Config(
        app,  # pyright: ignore[reportArgumentType] - any ASGI application.
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        http=partial(  # pyright: ignore[reportArgumentType] - any protocol of uvicorn's.
            BoundedConnection,
            max_connections=max_client_connections(),
            # A client that reads nothing for as long as a call may take will not read any more.
            unread_s=settings.gateway_timeout_s,
        ),
        server_header=False,
        proxy_headers=bool(settings.gateway_proxies),
        forwarded_allow_ips=settings.gateway_proxies or None,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=int(max(1.0, settings.stop_grace_s - _CLOSING_S)),
        ssl_certfile=settings.gateway_cert,
        ssl_keyfile=settings.gateway_key,
    )
    try:
        config.load()
    except (OSError, ValueError) as exc:  # The certificate or its key.
        raise SettingsError([f"TOLLBOOK_GATEWAY_CERT and TOLLBOOK_GATEWAY_KEY cannot be used: {exc}"]) from exc
    return config
