"""Notes beside open holds: the provider's id of each request in flight, as soon as it is known.

No call waits for a note. One that is lost costs only certainty: the request then counts as if its id were not known.
"""

import asyncio

import structlog
from redis.exceptions import RedisError

from tollbook.ledger.errors import CallUnknown, LedgerError
from tollbook.ledger.gate.ledger import Ledger
from tollbook.ledger.gate.requests import NoteRequest

_log = structlog.get_logger(__name__)


class Notes:
    """Writes notes in the background. `lost` counts those that the ledger did not take."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._under_way = set[asyncio.Task[None]]()
        self.lost = 0

    def start(self, request: NoteRequest) -> None:
        """Begin to write a note."""
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
