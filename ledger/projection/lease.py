"""The projector's lease: one projector per ledger, on any machine and in any directory.

Two projectors would not break a cap, since the watermark only rises. But each would drop
tail entries that the other has not folded yet, and calls would fail closed. A lease that is
not renewed expires. A lease held at the same place, that is on the same DuckDB file, is taken
over at once: only one process at a time can have that file open.
"""

import asyncio
from collections.abc import Callable
from typing import Final

import structlog

from tollbook.ledger.errors import LedgerRefused, LedgerUnavailable
from tollbook.ledger.keys import projector_lease
from tollbook.ledger.packaged import packaged_text
from tollbook.ledger.server.pipeline import CommandPipeline

_TTL_MS: Final = 10_000
_RENEWALS: Final = 4
_log = structlog.get_logger(__name__)


class ProjectorRunning(LedgerRefused):
    """Another projector runs on the ledger."""

    def __init__(self, *, owner: str, place: str, remaining_ms: int) -> None:
        super().__init__(
            f"a projector ({owner}, {place}) works on this ledger: stop it first, or start this one with --standby "
            f"to wait and take over. If it has died, its lease expires in {max(1, round(remaining_ms / 1000))} s"
        )
        self.owner = owner
        self.place = place
        self.remaining_ms = remaining_ms


class Lease:
    """One projector's lease of a ledger. Errors of every method but `wait`: LedgerUnavailable.

    `epoch` numbers the owners of the lease: a later owner has a higher epoch. 0: the lease was never taken.
    """

    def __init__(self, pipeline: CommandPipeline, *, namespace: str, owner: str, place: str) -> None:
        self.owner = owner
        self.place = place
        self.epoch = 0
        self._pipeline = pipeline
        self._key = projector_lease(namespace)
        self._script = packaged_text("tollbook.ledger.projection", "lease.lua")

    async def take(self, *, is_alone: bool = False, min_epoch: int = 0) -> None:
        """Take or renew the lease; `is_alone` if no other projector can be alive at this place.

        `min_epoch` raises the epoch to at least this.

        Errors: ProjectorRunning.
        """
        reply: list[bytes] = await self._pipeline.execute(
            "EVAL", self._script, 1, self._key, self.owner, self.place, _TTL_MS, int(is_alone), min_epoch
        )
        if reply[0] == b"HELD":
            raise ProjectorRunning(owner=reply[1].decode(), place=reply[2].decode(), remaining_ms=int(reply[3]))
        self.epoch = int(reply[1])

    async def wait(self, on_held: Callable[[ProjectorRunning], None] = lambda _: None) -> None:
        """Take the lease as soon as its owner releases it or dies; `on_held` is called with the present owner.

        Waits through an outage of Redis: a standby must survive the failures for which it stands by.
        """
        is_logged = False
        while True:
            try:
                return await self.take()
            except LedgerUnavailable as exc:
                _log.warning("lease.not_reached", problem=str(exc))
                await asyncio.sleep(1.0)
            except ProjectorRunning as exc:
                on_held(exc)
                if not is_logged:
                    _log.info("projector.standing_by", owner=exc.owner, place=exc.place)
                    is_logged = True
                await asyncio.sleep(min(1.0, max(0.05, exc.remaining_ms / 1000)))

    async def keep(self) -> None:
        """Renew until cancelled. Errors: ProjectorRunning if another projector has taken over."""
        while True:
            await asyncio.sleep(_TTL_MS / 1000 / _RENEWALS)
            try:
                await self.take()
            except LedgerUnavailable as exc:
                # Without Redis, nothing is folded or trimmed either.
                _log.warning("lease.renewal_missed", problem=str(exc))

    async def release(self) -> None:
        """Release the lease, if it is still this projector's."""
        try:
            await self.take()
            await self._pipeline.execute("DEL", self._key)
        except (ProjectorRunning, LedgerUnavailable) as exc:
            _log.debug("lease.not_released", problem=str(exc))
