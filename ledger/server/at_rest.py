"""A data directory at rest: a read-only embedded server runs on it while one command reads.

The server is started as a replica without a primary. So it refuses all writes and expires no keys: its append-only file
stays as it is, except that an entry which a power failure cut short is removed, as at any start. A second command waits
until the first has finished.
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
    """Whether the directory has data of an embedded server, and no system runs on it."""
    return (data_dir / "valkey" / "appendonlydir").is_dir() and read_endpoint(data_dir) is None


@asynccontextmanager
async def server_at_rest(data_dir: Path, *, on_waiting: Callable[[], None] = lambda: None) -> AsyncGenerator[str]:
    """Yield the URL of a read-only server on the data; the server ends after the block.

    If a system has been started meanwhile, its server is used. `on_waiting` is called once if another command must
    finish first. Errors: EmbeddedServerError.
    """
    server = EmbeddedServer(data_dir, is_read_only=True)
    deadline, is_waiting = time.monotonic() + _MAX_WAIT_S, False
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
        if not is_waiting:
            is_waiting = True
            on_waiting()
        await asyncio.sleep(_POLL_S)
    try:
        yield server.url
    finally:
        await server.stop()
