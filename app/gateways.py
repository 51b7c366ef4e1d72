"""The HTTP gateway: as a process of its own, and as a part of `tollbook up`."""

import asyncio
import socket
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from typing import Final

import structlog
from starlette.routing import BaseRoute

from tollbook.app.processes import PATIENCE, System, run_beside_projector
from tollbook.app.supervisor import Child
from tollbook.gateway.server import DEFAULT_PORT, Gateway, serve_gateway, settings_of_calls
from tollbook.inference.errors import SettingsError
from tollbook.inference.runtime import InferenceRuntime, open_runtime
from tollbook.inference.settings import Settings
from tollbook.observability.gateway_counts import GatewayCounts
from tollbook.observability.process_state import ProcessState
from tollbook.observability.server import shown_address

Pages = Callable[[InferenceRuntime], AbstractAsyncContextManager[Sequence[BaseRoute]]]
"""Opens further routes of a gateway, such as the pages for operators, for as long as it is served."""
_log: Final = structlog.get_logger(__name__)


async def run_gateway(settings: Settings, stop: asyncio.Event, *, redis_url: str, pages: Pages | None = None) -> None:
    """Serve the gateway until `stop`, next to a running projector. Errors: SettingsError; LedgerRefused."""
    if settings.gateway_port == "off":
        raise SettingsError(["TOLLBOOK_GATEWAY_PORT: is off, so there is nothing to serve; unset it, or give a port"])
    port = DEFAULT_PORT if settings.gateway_port is None else settings.gateway_port

    async def serve(runtime: InferenceRuntime, state: ProcessState) -> None:
        state.gateway = GatewayCounts()
        async with (
            _opened(pages, runtime) as routes,
            serve_gateway(runtime, port=port, pages=routes, counts=state.gateway) as gateway,
        ):
            await _until(stop, gateway)

    await run_beside_projector(
        settings_of_calls(settings),
        "gateway",
        serve,
        stop,
        redis_url=redis_url,
        max_call_s=settings.gateway_timeout_s,
    )


@asynccontextmanager
async def open_gateway(system: System, stop: asyncio.Event, *, pages: Pages | None = None) -> AsyncGenerator[str]:
    """Serve the gateway of `tollbook up` until `stop`; yield its address, or '' if it is off.

    Errors: SettingsError if the address or the certificate cannot be used.
    """
    settings = system.runtime.settings
    if settings.gateway_port == "off":
        yield ""
        return
    port = settings.gateway_port or 0
    address: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    counts = system.state.gateway = GatewayCounts()

    async def serve() -> None:
        async with (
            # A runtime of its own, because its requests may take longer than a worker's.
            open_runtime(
                settings_of_calls(settings),
                system.handle,
                system.projection.read,
                patience=PATIENCE,
                observer=system.state.tracing,
                max_call_s=settings.gateway_timeout_s,
            ) as runtime,
            _opened(pages, runtime) as routes,
            serve_gateway(runtime, port=port, pages=routes, counts=counts) as gateway,
        ):
            address.set_result(gateway.url)
            await _until(stop, gateway)

    serving = asyncio.create_task(serve())
    await asyncio.wait({serving, address}, return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        await serving  # Raises why the gateway could not be served.
    try:
        yield address.result()
    finally:
        stop.set()
        await serving


async def _until(stop: asyncio.Event, gateway: Gateway) -> None:
    """Wait for `stop`. If the server ends early, set `stop`, so that the process does not go on without its gateway."""
    gateway.serving.add_done_callback(lambda _: stop.set())
    await stop.wait()


def _opened(pages: Pages | None, runtime: InferenceRuntime) -> AbstractAsyncContextManager[Sequence[BaseRoute]]:
    return nullcontext(()) if pages is None else pages(runtime)


def gateway_child(settings: Settings) -> tuple[Child, str] | None:
    """Return the gateway process of `tollbook up --workers` and its address; None if the gateway is off."""
    if settings.gateway_port == "off":
        return None
    port = settings.gateway_port or _free_port(settings.gateway_host)
    scheme = "https" if settings.gateway_cert else "http"
    child = Child("gateway", ("gateway",), {"TOLLBOOK_GATEWAY_PORT": str(port)})
    return child, f"{scheme}://{shown_address(settings.gateway_host, port)}"


def _free_port(host: str) -> int:
    with socket.create_server((host, 0)) as listening:
        return listening.getsockname()[1]
