"""A data directory at rest: the embedded server runs over it for as long as one command reads, and writes nothing.

The server is started as a replica of nobody. So it takes no write from anyone, and does not expire keys by itself: what
its append-only file holds stays as it is, but for an end that a power failure cut short, which it takes off as at any
start. A command that comes while another one reads waits for it.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from tollbook.ledger.server.directory import DirectoryInUse
from tollbook.ledger.server.embedded import EmbeddedServer, EmbeddedServerError
from tollbook.ledger.server.endpoint import read_endpoint

_POLL_S: Final = 0.1
_MAX_WAIT_S: Final = 600.0


def is_at_rest(data_dir: Path) -> bool:
    """Whether an embedded server has kept data here and no system runs on it."""
    return (data_dir / "valkey" / "appendonlydir").is_dir() and read_endpoint(data_dir) is None


@asynccontextmanager
async def server_at_rest(data_dir: Path, *, on_waiting: Callable[[], None] = lambda: None) -> AsyncGenerator[str]:
    """Yield the URL of a server over the data that takes no write; it ends with this.

    Where a system has been started meanwhile, its server is used. `on_waiting` is called once where another command
    must be waited for. Errors: EmbeddedServerError.
    """
    server = EmbeddedServer(data_dir, is_read_only=True)
    deadline, has_told = time.monotonic() + _MAX_WAIT_S, False
    while True:
        if (endpoint := read_endpoint(data_dir)) is not None:
            yield endpoint.redis_url
            return
        try:
            await server.start()
            break
        except DirectoryInUse as exc:
            if time.monotonic() > deadline:
                raise EmbeddedServerError(str(exc)) from exc
        if not has_told:
            has_told = True
            on_waiting()
        await asyncio.sleep(_POLL_S)
    try:
        yield server.url
    finally:
        await server.stop()
