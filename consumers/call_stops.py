"""Stopping and resuming calls everywhere, as the projector of a ledger (G8).

Owns how a projector identifies itself to the gate: by its lease and the id of its data directory. Invariant: calls are
stopped and resumed only while the projector has the lease, and resumed only once the projector has folded everything
that was on the ledger when it looked. This module never opens, folds or repairs anything.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Final

import duckdb
import structlog
from redis.exceptions import RedisError

from tollbook.inference.runtime import LedgerHandle
from tollbook.ledger.errors import LedgerError, LedgerUnavailable
from tollbook.ledger.gate.functions import load_library
from tollbook.ledger.gate.requests import Position
from tollbook.ledger.gate.stops import CallSwitch, ProjectorFenced, read_stop
from tollbook.ledger.keys import Keys
from tollbook.ledger.private_files import read_private, write_private
from tollbook.ledger.projection.lease import Lease, ProjectorRunning
from tollbook.ledger.projection.projector import Projector
from tollbook.ledger.projection.store import Store
from tollbook.ledger.projection.store_errors import StoreFailed

_STOP_TRIES: Final = 10
_STOP_PAUSE_S: Final = 0.5
_RESUME_S: Final = 1.0
_ID_FILE: Final = "projection.id"
# These end a projector but are no fault of the ledger: another projector runs, or this machine has no disk space, no
# memory or no connection.
_OPERATIONAL: Final = (
    ProjectorRunning,
    ProjectorFenced,
    LedgerUnavailable,
    StoreFailed,
    OSError,
    MemoryError,
    duckdb.Error,
)
_log = structlog.get_logger(__name__)


class CallStops:
    """Stops and resumes the calls of every partition. `data_dir` is the folder of the projection."""

    def __init__(self, handle: LedgerHandle, lease: Lease, data_dir: Path) -> None:
        self._handle = handle
        self._lease = lease
        self._data_dir = data_dir
        self._data_id = lease.place

    async def identify(self) -> None:
        """Read the id of the data directory, or give it one. The projection must be open here.

        Errors: OSError.
        """
        self._data_id = await asyncio.to_thread(_data_id, self._data_dir, self._lease.owner)

    async def claim(self) -> None:
        """Fence off earlier projectors in every partition. Errors: ProjectorRunning; as `CallSwitch`."""
        await self._apply(lambda switch: switch.claim())

    async def stop(self, problem: Exception, store: Store | None, *, is_alone: bool = False) -> None:
        """Stop all calls if the problem is one that a person must look at (G8).

        `is_alone` as in `Lease.take`. A projector that has lost the lease stops nothing.
        """
        if isinstance(problem, _OPERATIONAL):
            return
        reason = f"the projector has stopped: {str(problem) or type(problem).__name__}"
        positions = await asyncio.to_thread(_positions, store)
        for _ in range(_STOP_TRIES):
            try:
                await load_library(self._handle.redis)  # Redis may have been restored without the library.
                await self._apply(
                    lambda switch: switch.stop(reason, positions.get(switch.keys.partition, Position()).entry),  # G8
                    is_alone=is_alone,
                )
            except LedgerUnavailable as exc:
                _log.warning("calls.not_stopped", problem=str(exc))
                await asyncio.sleep(_STOP_PAUSE_S)
            except (LedgerError, RedisError) as exc:
                # Another projector has the lease, or Redis holds another ledger, whose calls are not ours to stop.
                _log.warning("calls.not_stopped", problem=str(exc))
                return
            else:
                _log.error("calls.stopped", reason=reason)
                return

    async def resume_forever(self, open_projector: Callable[[], Projector]) -> None:
        """Resume stopped calls, once everything is folded that was on the ledger when the stop was seen.

        `open_projector` returns the projector that runs now, or raises BaselineUnavailable.

        Errors: ProjectorRunning; ProjectorFenced.
        """
        problem = ""
        while True:
            try:
                await self._resume(open_projector)
                problem = ""
            except (ProjectorRunning, ProjectorFenced):
                raise
            except (LedgerError, RedisError) as exc:
                # A fault of the fold ends the fold. Until it is repaired, calls stay stopped.
                if problem != (problem := str(exc)):
                    _log.warning("calls.not_resumed", problem=problem)
            await asyncio.sleep(_RESUME_S)

    async def _resume(self, open_projector: Callable[[], Projector]) -> None:
        reason = await read_stop(self._handle.pipeline, self._handle.keys)
        if reason is None:
            return
        projector = open_projector()
        await self.claim()
        heads = await projector.heads()
        for partition, head in heads.items():
            await projector.wait_for(partition, head)
        await self._apply(lambda switch: switch.resume(heads[switch.keys.partition]))  # G8
        _log.info("calls.resumed", reason=reason)

    async def _apply(self, step: Callable[[CallSwitch], Awaitable[object]], *, is_alone: bool = False) -> None:
        """Apply a step in every partition, as the owner of the lease; `is_alone` as in `Lease.take`.

        Errors: ProjectorRunning and ProjectorFenced if another projector has the lease; as `CallSwitch`.
        """
        handle, lease = self._handle, self._lease
        await lease.take(is_alone=is_alone)
        for keys in handle.keys:

            def switch(keys: Keys = keys) -> CallSwitch:
                return CallSwitch(
                    handle.pipeline,
                    keys,
                    handle.ledger_id,
                    projector=lease.owner,
                    epoch=lease.epoch,
                    place=self._data_id,
                )

            try:
                await step(switch())
            except ProjectorFenced as exc:
                # Either another projector has the lease, then `take` raises, or the clock of Redis was set back since
                # the last lease.
                await lease.take(is_alone=is_alone, min_epoch=exc.epoch + 1)
                await step(switch())


def _positions(store: Store | None) -> Mapping[int, Position]:
    """Return the folded position of each partition; none if the file cannot be read."""
    try:
        return store.baselines(()).positions if store is not None else {}
    except LedgerError:
        return {}


def _data_id(folder: Path, new_id: str) -> str:
    """Return the id of a data directory. It stays the same on another host: a new container has a new name."""
    path = folder / _ID_FILE
    try:
        return read_private(path)
    except FileNotFoundError:
        write_private(path, new_id)
        return new_id
