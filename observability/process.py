"""Opens tracing and the server of metrics and health for a process, by the settings; assigns their ports."""

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
    """Yield the state of this process, and serve its metrics and health for as long as this is open.

    Errors: SettingsError if the port is not available or the exporter is not installed; AddressError.
    """
    async with AsyncExitStack() as stack:
        state = ProcessState(part, settings, tracing=await stack.enter_async_context(open_tracing(settings)))
        port = metrics_port_of(settings, part)
        if port is not None:
            # Imported here: loaded only if metrics are on.
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
    """Return the port of metrics and health; 0: any free port; None: no server."""
    port = settings.metrics_port
    if port is None:
        # `tollbook up` prints the address to a person at a terminal; a service is configured.
        return 0 if part == "up" else None
    return None if port == "off" else port


def ports_of_processes(settings: Settings, processes: int) -> list[int | None]:
    """Return consecutive ports for the processes of `tollbook up --workers`; 0: any free port; None: no server.

    Errors: SettingsError if the ports would exceed 65535.
    """
    first = metrics_port_of(settings, "up")
    if not first:
        return [first] * processes
    if first + processes > _MAX_PORTS:
        raise SettingsError([f"TOLLBOOK_METRICS_PORT: {first} leaves no room for {processes} processes"])
    return list(range(first, first + processes))


def port_setting(port: int | None) -> dict[str, str]:
    """Return the environment variable that gives a process this port."""
    return {"TOLLBOOK_METRICS_PORT": "off" if port is None else str(port)}


def describe_ports(settings: Settings, ports: Sequence[int | None], *, has_gateway: bool = False) -> str:
    """Return where the metrics of these processes are served; '' if they are not.

    The first port is the projector's; with `has_gateway`, the last one is the gateway's.
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
