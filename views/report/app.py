"""Serves the notebook as an app, in this process; by default on the loopback interface.

The address contains a token made for this run. Without it nothing is shown, because other users of the machine, and
other pages in its browser, can reach the port too.
"""

import asyncio
import mimetypes
import os
import secrets
import signal
import socket
import sys
import webbrowser
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NoReturn
from urllib.parse import urlencode

import marimo
import uvicorn
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from tollbook.views.report.reading import Reading, Source

LOOPBACK: Final = "127.0.0.1"
_EVERY_INTERFACE: Final = ("0.0.0.0", "::")  # noqa: S104 - compared with, not listened on.
_NOTEBOOK: Final = "spend_report.py"
# The maximum age of a copy that was read before the browser asked for it.
_AHEAD_S: Final = 30.0
# The names of marimo's files change with their content.
_FOR_EVER: Final = {"cache-control": "public, max-age=31536000, immutable"}
_opened: list[Source] = []
_ahead: list[Reading] = []


class NotebookMissing(Exception):
    """The notebook is neither in the package nor in a checkout."""


def opened_source() -> Source | None:
    """Return the source that the running app shows; None in a notebook that was opened without this app."""
    return _opened[-1] if _opened else None


async def read(source: Source) -> Reading:
    """Read a source; the first time, use the copy that was read before the app started. Errors: as `Source.read`."""
    while _ahead:
        reading = _ahead.pop()
        if (datetime.now(UTC) - reading.freshness.read_at).total_seconds() <= _AHEAD_S:
            return reading
        reading.close()
    return await source.read()


def notebook_path() -> Path:
    """Return the notebook: beside this file in an installed package, in notebooks/ in a checkout."""
    here = Path(__file__).resolve().parent
    for path in (here / _NOTEBOOK, here.parents[1] / "notebooks" / _NOTEBOOK):
        if path.exists():
            return path
    raise NotebookMissing(f"the notebook {_NOTEBOOK} is not installed; install tollbook again")


@dataclass(frozen=True, slots=True)
class Address:
    """Where the app is served. `base_path` is the path prefix of a proxy in front of it: empty, or `/name`."""

    host: str = LOOPBACK
    port: int = 0
    base_path: str = ""


def serve(
    source: Source, reading: Reading, chosen: dict[str, str], address: Address, *, announce: Callable[[str], None]
) -> None:
    """Serve the report of a source, with its first reading, until Ctrl-C or SIGTERM; `announce` gets its address.

    Port 0: any free port. The caller should end the process afterwards with `leave`.
    Errors: OSError if the address cannot be used; NotebookMissing.
    """
    token = secrets.token_urlsafe(16)
    builder = marimo.create_asgi_app(quiet=True, token=token)
    app = builder.with_app(path=address.base_path, root=str(notebook_path())).build()
    listener = _listen(address)
    shown = LOOPBACK if address.host in _EVERY_INTERFACE else address.host
    host = f"[{shown}]" if ":" in shown else shown
    query = urlencode({"access_token": token, **chosen})
    url = f"http://{host}:{listener.getsockname()[1]}{address.base_path}/?{query}"
    # Open pages keep their connections forever; a second is enough to finish current responses.
    config = uvicorn.Config(_with_assets(app, address.base_path), log_level="error", timeout_graceful_shutdown=1)
    server = _Server(config, lambda: announce(url))
    _opened.append(source)
    _ahead.append(reading)
    try:
        asyncio.run(server.serve(sockets=[listener]))
    finally:
        _opened.remove(source)
        listener.close()


def leave(source: Source) -> NoReturn:
    """Exit the process. marimo's threads (0.25) wait for the next request and would never end."""
    source.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def open_browser(url: str) -> bool:
    """Open the address in a browser if there is a screen; return whether it was opened."""
    has_screen = sys.platform == "darwin" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    if not has_screen or os.environ.get("SSH_CONNECTION"):
        return False
    try:
        return webbrowser.open(url)
    except webbrowser.Error:
        return False


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._announce = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # Replaces marimo's handler of Ctrl-C, which asks for confirmation and then does not stop this server.
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._stop)
        if self.started:
            self._announce()

    def _stop(self) -> None:
        self.should_exit = True


def _with_assets(app: ASGIApp, base_path: str) -> ASGIApp:
    """Serve marimo's own scripts and fonts without its sessions and middlewares.

    They are public, and the same for everybody. A page needs more than 300 of them.
    """
    folder = Path(marimo.__file__).parent / "_static" / "assets"
    files = {f"{base_path}/assets/{path.name}": path for path in folder.glob("*")}

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        path = files.get(scope.get("path", "")) if scope["type"] == "http" else None
        await (app if path is None else _file(path))(scope, receive, send)

    return answer


def _file(path: Path) -> Response:
    # Read here and not in a thread (FileResponse), because most files have only a few kilobytes.
    return Response(path.read_bytes(), media_type=mimetypes.guess_type(path)[0], headers=_FOR_EVER)


def _listen(address: Address) -> socket.socket:
    """Errors: OSError, which names the address."""
    try:
        (family, *_, place), *_ = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except socket.gaierror as exc:
        raise OSError(f"the host {address.host} is not known: {exc.strerror}") from exc
    # asyncio sets TCP_NODELAY only if the protocol is given. Without it, each of the 300 files of marimo's page would
    # wait for an acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(place)
    except OSError as exc:
        listener.close()
        raise OSError(f"port {address.port} of {address.host} cannot be used: {exc.strerror}") from exc
    return listener
