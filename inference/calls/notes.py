"""Notes beside open holds: the provider's id of each request in flight, as soon as it is known.

No call waits for a note. If a note is lost, the request's id counts as unknown. A quick answer needs no note, so a note
is written only if its request is still in flight a moment later.
"""

import asyncio
from typing import Final

import structlog
from redis.exceptions import RedisError

from tollbook.ledger.errors import CallUnknown, LedgerError
from tollbook.ledger.gate.ledger import Ledger
from tollbook.ledger.gate.requests import NoteRequest

# A note takes a round trip to Redis and a write there: a fifth of the time of a quick call.
_DELAY_S: Final = 0.05
_log = structlog.get_logger(__name__)


class Notes:
    """Writes notes in the background. `lost` counts the notes that could not be written."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._waiting: dict[str, asyncio.TimerHandle] = {}
        self._under_way = set[asyncio.Task[None]]()
        self.lost = 0

    def start(self, request: NoteRequest) -> None:
        """Write a note after a moment, unless the request has ended by then."""
        self.drop(request.call_id)
        loop = asyncio.get_running_loop()
        self._waiting[request.call_id] = loop.call_later(_DELAY_S, self._begin, request)

    def drop(self, call_id: str) -> None:
        """Cancel the waiting note of a call, whose request has ended."""
        waiting = self._waiting.pop(call_id, None)
        if waiting is not None:
            waiting.cancel()

    def _begin(self, request: NoteRequest) -> None:
        self._waiting.pop(request.call_id, None)
        task = asyncio.create_task(self._write(request))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    async def _write(self, request: NoteRequest) -> None:
        try:
            await self._ledger.note(request)
        except CallUnknown:
            pass  # The reply was complete before the note: the hold is settled.
        except (LedgerError, RedisError, OSError) as exc:
            self.lost += 1
            _log.warning("call.id_not_kept", call_id=request.call_id, problem=str(exc))
