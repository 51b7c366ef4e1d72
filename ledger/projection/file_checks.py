"""Checks of a projection's file: before it is read, and while it is open.

Owns when a file is checked and what follows from a failed check. Invariant (G8): no file is read before its balances
were recomputed from its events. Between two such checks, every balance that is read is compared with its checksum, and
the number of balances with the fold's count (`baseline_page`). It never folds, and never changes a file: a file that
others have changed is set aside whole.
"""

import asyncio
import time
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Final

import duckdb
import structlog

from tollbook.ledger.errors import BaselineUnavailable
from tollbook.ledger.projection.database import set_aside
from tollbook.ledger.projection.store import Store
from tollbook.ledger.projection.store_errors import StoreFailed

# A check takes about a second for a million events; checks take at most a fiftieth of the time.
CHECK_EVERY_S: Final = 60.0
_CHECK_SHARE: Final = 50
_WATCH_S: Final = 1.0
_log = structlog.get_logger(__name__)


def open_checked(
    path: Path, ledger_id: str, partitions: int, *, memory_limit: str, now: Callable[[], datetime]
) -> Store:
    """Open the file and check it before it is read; a file that others have changed is set aside. Blocks.

    Errors: as `Store.open`; StoreFailed if it cannot be checked now.
    """
    opening = partial(Store.open, path, ledger_id, partitions, memory_limit=memory_limit)
    store = opening()
    try:
        store.check()  # G8
    except StoreFailed as exc:
        store.close()
        if exc.is_recoverable:
            raise
        _log.error("projection.changed", problem=str(exc))
        set_aside(path, now())
        return opening()
    except BaseException:
        store.close()
        raise
    return store


async def check_forever(store: Store, *, every_s: float = CHECK_EVERY_S) -> None:
    """Recompute the file's balances from its events from time to time. Errors: StoreFailed."""
    pause_s = every_s
    while True:
        await asyncio.sleep(pause_s)
        began = time.monotonic()
        try:
            await asyncio.to_thread(store.check)  # G8
        except BaselineUnavailable as exc:
            raise StoreFailed(str(exc)) from exc
        took_s = time.monotonic() - began
        _log.debug("projection.checked", seconds=round(took_s, 3))
        pause_s = max(every_s, _CHECK_SHARE * took_s)


async def watch_file(store: Store, path: Path) -> None:
    """Check once a second that the file exists and can be read.

    Errors: StoreFailed if it does not or cannot, if it was replaced, or if a balance was read that others have changed.
    """
    file = await asyncio.to_thread(_identity, path)
    while True:
        await asyncio.sleep(_WATCH_S)
        if await asyncio.to_thread(_identity, path) != file:
            raise StoreFailed(f"{path} was deleted or replaced while it was open")
        if store.has_changed:
            raise StoreFailed(f"{path} has a balance that the fold did not write")
        try:
            await asyncio.to_thread(store.baselines, [f"user:{time.monotonic()}:none"])
        except (BaselineUnavailable, duckdb.Error) as exc:
            raise StoreFailed(f"{path} cannot be read: {exc}") from exc


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
