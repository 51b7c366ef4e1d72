"""The mark in a partition's `meta` that stops calls, wherever workers run, and says why; and that of a recovery.

Only the projector sets and lifts it, by the gate's function `stop`: set where it has stopped for a cause that a person
must look at, lifted once a projector has found the stores in order. `reserve` obeys it (G8). The mark of a recovery
stops nothing: it is there from the first event that is restored to the one that ends the recovery.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from redis.exceptions import ResponseError

from tollbook.ledger.errors import LedgerRefused
from tollbook.ledger.gate.functions import function
from tollbook.ledger.gate.replies import FunctionsMissing, refusal
from tollbook.ledger.keys import Keys
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.schemas.identifiers import ZERO_ENTRY, EntryId


class ProjectorFenced(LedgerRefused):
    """A later projector has the lease, of that epoch: what this one says of calls no longer counts."""

    def __init__(self, projector: str, epoch: int) -> None:
        super().__init__(f"another projector ({projector}) has taken over")
        self.projector = projector
        self.epoch = epoch


async def read_stop(pipeline: CommandPipeline, keys: Sequence[Keys]) -> str | None:
    """Return why no call may begin, or None while they may.

    Errors: LedgerUnavailable; redis.exceptions.ResponseError.
    """
    found: list[bytes | None] = await asyncio.gather(*(pipeline.execute("HGET", key.meta, "stopped") for key in keys))
    return next((reason.decode() for reason in found if reason is not None), None)


async def is_recovering(pipeline: CommandPipeline, keys: Keys) -> bool:
    """Return whether a recovery of this partition has begun to write, and not ended.

    Errors: LedgerUnavailable; redis.exceptions.ResponseError.
    """
    return bool(await pipeline.execute("HEXISTS", keys.meta, "recovering"))


@dataclass(frozen=True, slots=True)
class CallSwitch:
    """What a projector says of the calls of one partition; `epoch` is its lease's, `place` names its data directory.

    Errors of every method: ProjectorFenced; LedgerReplaced; FunctionsMissing; LedgerUnavailable.
    """

    pipeline: CommandPipeline
    keys: Keys
    ledger_id: str
    projector: str
    epoch: int
    place: str

    async def claim(self) -> str | None:
        """Let no earlier projector be listened to; return why calls are stopped, or None."""
        return await self._say("claim", ZERO_ENTRY) or None

    async def stop(self, reason: str, folded: EntryId) -> None:
        """Let no call begin. While the ledger lacks what an earlier stop goes by, that one stands.

        `folded` is the newest event that this projector has folded.
        """
        await self._say("stop", folded, " ".join(reason.split()))

    async def resume(self, folded: EntryId) -> None:
        """Let calls begin again. `folded` is as in `stop`.

        Errors: LedgerWentBack where that event is no longer there, or one that a projector elsewhere had folded.
        """
        await self._say("resume", folded)

    async def _say(self, word: Literal["claim", "stop", "resume"], folded: EntryId, reason: str = "") -> str:
        keys = self.keys
        try:
            reply: Any = await self.pipeline.execute(
                "FCALL", function("stop"), 2, keys.meta, keys.ledger,
                self.ledger_id, self.projector, self.epoch, self.place, word, str(folded), reason,
            )  # fmt: skip
        except ResponseError as exc:
            if "Function not found" in str(exc):
                raise FunctionsMissing(str(exc)) from exc
            raise
        if reply[0] == b"FENCED":
            raise ProjectorFenced(reply[1].decode(), int(reply[2]))
        if reply[0] != b"OK":
            raise refusal(reply, "", 0)
        return reply[1].decode()
