"""Observing a process: tracing and the server of metrics and health, opened as the settings ask, and their ports."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

from tollbook.inference.errors import SettingsError
from tollbook.inference.process_name import process_name
from tollbook.inference.settings import Settings
from tollbook.observability.exporting import open_tracing
from tollbook.observability.process_state import Part, ProcessState

_MAX_PORTS: Final = 65_536


@asynccontextmanager
async def observe_process(settings: Settings, part: Part) -> AsyncGenerator[ProcessState]:
    """Yield the state of this process, and serve it for as long as this is open.

    Errors: SettingsError where the port cannot be had or the exporter is not installed; AddressError.
    """
    async with AsyncExitStack() as stack:
        state = ProcessState(part, settings, tracing=await stack.enter_async_context(open_tracing(settings)))
        port = metrics_port_of(settings, part)
        if port is not None:
            # Imported here: what nobody asks for need not be loaded.
            from prometheus_client import CollectorRegistry

            from tollbook.observability.server import serve_metrics

            state.faststream = CollectorRegistry()
            state.url = await stack.enter_async_context(
                serve_metrics(
                    state,
                    host=settings.metrics_host,
                    port=port,
                    data_dir=settings.data_dir,
                    name=f"{part}-{process_name()}",
                )
            )
        yield state


def metrics_port_of(settings: Settings, part: Part) -> int | None:
    """Return the port of metrics and health, 0 for a free one, None for no server."""
    port = settings.metrics_port
    if port is None:
        # `tollbook up` prints the address to a person at a terminal; a service is configured.
        return 0 if part == "up" else None
    return None if port == "off" else port


def ports_of_processes(settings: Settings, processes: int) -> list[int | None]:
    """Return a port for each process of `tollbook up --workers`: consecutive ones, 0 for free ones, None for no server.

    Errors: SettingsError where there are not that many.
    """
    first = metrics_port_of(settings, "up")
    if not first:
        return [first] * processes
    if first + processes > _MAX_PORTS:
        raise SettingsError([f"TOLLBOOK_METRICS_PORT: {first} leaves no room for {processes} processes"])
    return list(range(first, first + processes))


def port_setting(port: int | None) -> dict[str, str]:
    """Return the environment with which a process takes this port."""
    return {"TOLLBOOK_METRICS_PORT": "off" if port is None else str(port)}


def describe_ports(settings: Settings, ports: Sequence[int | None], *, has_gateway: bool = False) -> str:
    """Say where the metrics of these processes are served; '' where they are not.

    The projector's is the first; with `has_gateway`, the gateway's is the last.
    """
    gateway = f", {ports[-1]} (gateway)" if has_gateway else ""
    ports = ports[:-1] if has_gateway else ports
    first, last = ports[0], ports[-1]
    if first is None or last is None:
        return ""
    if first == 0:
        return f"one address for each process in {settings.data_dir.resolve() / 'metrics'}"
    host = settings.metrics_host
    workers = f"{last}" if len(ports) == 2 else f"{first + 1} to {last}"
    return f"http://{host}:{first} (projector), the same on port {workers} (workers){gateway}"
