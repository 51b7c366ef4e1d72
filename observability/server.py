"""Serves metrics and health in the process's own event loop, so that an answer shows that the loop runs.

It handles no signals and logs no requests.
"""

import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import structlog
import uvicorn

from tollbook.inference.errors import SettingsError
from tollbook.observability.address import announced_address
from tollbook.observability.asgi import ObservabilityApp
from tollbook.observability.process_state import ProcessState

# A server that listens on all addresses is reachable on the loopback address.
_LOOPBACK_OF: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - nothing is bound to it here.
_log = structlog.get_logger(__name__)


class SignallessServer(uvicorn.Server):
    """A server inside a process that handles signals itself."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """Leave signals to the process."""
        yield


@asynccontextmanager
async def serve_metrics(state: ProcessState, *, host: str, port: int, data_dir: Path, name: str) -> AsyncGenerator[str]:
    """Serve until closed; yield the address as a URL. Port 0: any free port.

    Errors: SettingsError if it cannot listen on the address; AddressError.
    """
    listening = listen(host, port, setting="TOLLBOOK_METRICS")
    bound = shown_address(host, listening.getsockname()[1])
    server = SignallessServer(
        uvicorn.Config(
            ObservabilityApp(state),
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            http="h11",
            server_header=False,
            proxy_headers=False,
            limit_concurrency=64,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=1,
        )
    )
    with listening, announced_address(data_dir, name, bound, part=state.part):
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        # `tollbook up` prints the address itself, once everything is up.
        log = _log.debug if state.part == "up" else _log.info
        log("metrics.served", url=f"http://{bound}")
        try:
            yield f"http://{bound}"
        finally:
            server.should_exit = True
            await asyncio.gather(serving, return_exceptions=True)


def listen(host: str, port: int, *, setting: str) -> socket.socket:
    """Listen on an address; port 0: any free port. Errors: SettingsError, which names `setting`_HOST or _PORT."""
    problem: OSError | None = None
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as exc:
        raise SettingsError([f"{setting}_HOST: {host} is not an address of this machine ({exc.strerror})"]) from exc
    for family, kind, protocol, _, address in found:
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            # Listen at once, so that clients are not refused while the rest starts.
            listening.listen()
        except OSError as exc:
            listening.close()
            problem = exc
        else:
            return listening
    assert problem is not None, "every name that is found has an address"
    raise SettingsError(
        [f"{setting}_PORT: cannot listen on {shown_address(host, port)}: {problem.strerror or problem}"]
    ) from problem


def shown_address(host: str, port: int) -> str:
    """Return an address at which this machine reaches a server that listens there."""
    host = _LOOPBACK_OF.get(host, host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
