"""Building the sealers of a ledger's partitions from the settings.

Owns which settings limit sealing, and how a sealer finds the folded position of its partition. It never seals by
itself; see `ledger/archive/sealing.py`.
"""

import asyncio
from collections.abc import Callable

from tollbook.inference.archive_place import archive_of
from tollbook.inference.runtime import LedgerHandle
from tollbook.inference.settings import Settings
from tollbook.ledger.archive.sealing import Sealer, SealingSettings
from tollbook.ledger.gate.requests import Position
from tollbook.ledger.keys import Keys
from tollbook.ledger.projection.store import Store


def build_sealers(settings: Settings, handle: LedgerHandle, store: Callable[[], Store]) -> list[Sealer]:
    """Return one sealer per partition. `store` returns the file that is open now, or raises BaselineUnavailable."""
    archive = archive_of(settings)
    limits = SealingSettings(
        segment_events=settings.segment_events,
        segment_age_s=settings.segment_age_s,
        keep_s=settings.stream_keep_s,
        keep_events=settings.stream_keep_events,
    )

    def make(keys: Keys) -> Sealer:
        async def folded() -> Position:
            return await asyncio.to_thread(store().position, keys.partition)

        return Sealer(
            handle.redis,
            handle.pipeline,
            keys,
            archive,
            ledger_id=handle.ledger_id,
            settings=limits,
            folded=folded,
        )

    return [make(keys) for keys in handle.keys]
