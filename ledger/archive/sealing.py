"""Sealing: moves old events from the stream into the archive, step by step.

Invariant (G7): an event leaves the stream only after it is in a segment that was read back
and verified, is folded, and is older than what is kept. Each step can be repeated: after a
crash, the next pass continues where the last one stopped.

A pass: write the next segment; record it on the ledger (`segment-sealed`); trim the stream.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import pyarrow as pa
import structlog
from redis.asyncio import Redis

from tollbook.ledger.archive import chain
from tollbook.ledger.archive.manifests import Manifest
from tollbook.ledger.archive.segments import Archive, Segment, check_segment
from tollbook.ledger.archive.storage_errors import ArchiveRefused
from tollbook.ledger.errors import LedgerRefused, LedgerReplaced, LedgerUnavailable
from tollbook.ledger.gate.requests import Position
from tollbook.ledger.keys import Keys
from tollbook.ledger.packaged import packaged_text
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.ledger.stream import StreamReader
from tollbook.schemas.events import SegmentSealed, payload_json
from tollbook.schemas.identifiers import ZERO_ENTRY, EntryId

_PAGE: Final = 10_000
_log = structlog.get_logger(__name__)


class ArchiveBehind(LedgerRefused):
    """The ledger has more sealed events than this archive: the ledger's archive is in another place."""

    def __init__(self, *, partition: int, sealed_seq: int, archived_seq: int) -> None:
        super().__init__(
            f"partition {partition}: the ledger was sealed up to event {sealed_seq}, the archive here holds events up "
            f"to {archived_seq}. Copy the missing segments here, or set TOLLBOOK_ARCHIVE_DIR or TOLLBOOK_ARCHIVE_URL "
            "to where they are"
        )


@dataclass(frozen=True, slots=True)
class SealingSettings:
    """When a segment is sealed, and how much stays on the stream. Units: events, seconds.

    Sealed events stay on the stream while they are younger than `keep_s` and among the newest `keep_events`.
    """

    segment_events: int = 100_000
    segment_age_s: float = 3600.0
    keep_s: float = 7 * 86_400.0
    keep_events: int = 2_000_000
    every_s: float = 10.0


class Sealer:
    """Seals one partition. `folded` returns the projection's position."""

    def __init__(
        self,
        redis: Redis,
        pipeline: CommandPipeline,
        keys: Keys,
        archive: Archive,
        *,
        ledger_id: str,
        settings: SealingSettings,
        folded: Callable[[], Awaitable[Position]],
    ) -> None:
        self._redis = redis
        self._pipeline = pipeline
        self._keys = keys
        self._archive = archive
        self._ledger_id = ledger_id
        self._settings = settings
        self._folded = folded
        self._newest: Segment | None = None
        self._oldest: Manifest | None = None
        """The oldest segment that stays on the stream, as far as is known."""
        self._begun_seq: int | None = None
        """The last event of a segment that was begun and not finished: it is finished with the same events."""

    async def run(self) -> None:
        """Seal and trim until cancelled. Errors: ArchiveBehind; ArchiveDamaged; LedgerReplaced; UnreadableEvent."""
        while True:
            try:
                while await self.seal():
                    pass
                await self.trim()
            except (LedgerUnavailable, ArchiveRefused, OSError) as exc:
                # Redis or the object store is down, or the disk is full. Nothing is lost: events that are not sealed
                # stay on the stream.
                _log.warning("sealing.postponed", partition=self._keys.partition, problem=str(exc))
            await asyncio.sleep(self._settings.every_s)

    async def seal(self, *, is_forced: bool = False) -> bool:
        """Seal the next segment if it is due, with `is_forced` in any case; return whether one was sealed."""
        newest = await self._load_newest()
        after_seq = newest.manifest.last_seq if newest else 0
        events = await self._due(newest, after_seq, is_forced=is_forced)
        if events is None:
            return False
        head = bytes.fromhex(newest.manifest.chain_after) if newest else self._genesis()
        # If this fails halfway, the next pass must not seal the same events under another name.
        self._begun_seq = events["seq"][-1].as_py()
        segment = await asyncio.to_thread(
            self._archive.write, events, ledger_id=self._ledger_id, partition=self._keys.partition, head=head
        )
        await self._record(segment)
        self._newest, self._begun_seq = segment, None
        return True

    async def trim(self) -> int:
        """Trim sealed, verified and folded events that need not be kept; return the number of the last one."""
        folded, (removed, length), now_ms = await self._folded(), await self._extent(), await self._now_ms()
        oldest_ms = now_ms - round(1000 * self._settings.keep_s)
        surplus_seq = removed + length - self._settings.keep_events

        def can_be_trimmed(manifest: Manifest) -> bool:
            is_over = EntryId.parse(manifest.last_id).ms < oldest_ms or manifest.last_seq <= surplus_seq
            return is_over and manifest.last_seq <= folded.seq  # G7

        # While the oldest segment stays, the archive, which may be remote, is not read.
        if self._oldest is not None and self._oldest.last_seq > removed and not can_be_trimmed(self._oldest):
            return removed
        for segment in await asyncio.to_thread(self._archive.segments, self._keys.partition):
            self._oldest = segment.manifest
            if self._oldest.last_seq <= removed:
                continue
            if not can_be_trimmed(self._oldest):
                break
            await asyncio.to_thread(check_segment, segment)  # G7
            removed = await self._discard(segment)
        return removed

    async def _load_newest(self) -> Segment | None:
        """Return the archive's last segment. Segments that a crash left unrecorded are recorded on the ledger."""
        if self._newest is None:
            segments = await asyncio.to_thread(self._archive.segments, self._keys.partition)
            newest = segments[-1] if segments else None
            sealed_seq = await self._sealed_seq()
            archived_seq = newest.manifest.last_seq if newest else 0
            if sealed_seq > archived_seq:  # G8
                raise ArchiveBehind(partition=self._keys.partition, sealed_seq=sealed_seq, archived_seq=archived_seq)
            # There are several if lost events were restored from the archive alone.
            for segment in segments:
                if segment.manifest.last_seq > sealed_seq:
                    await asyncio.to_thread(check_segment, segment)
                    await self._record(segment)
            # What was begun here may be finished, and only its record was missing.
            if self._begun_seq is None or self._begun_seq <= archived_seq:
                self._begun_seq = await asyncio.to_thread(self._archive.begun, self._keys.partition, archived_seq)
            self._newest = newest
        return self._newest

    async def _due(self, newest: Segment | None, after_seq: int, *, is_forced: bool) -> pa.Table | None:
        """Return the events of the next segment, or None if it is not due yet."""
        folded = await self._folded()
        waiting = folded.seq - after_seq
        if waiting <= 0:
            return None
        settings = self._settings
        after = EntryId.parse(newest.manifest.last_id) if newest else ZERO_ENTRY
        if self._begun_seq is not None:
            return await self._read(after, self._begun_seq - after_seq) if self._begun_seq <= folded.seq else None
        events = await self._read(after, min(waiting, settings.segment_events))
        if waiting >= settings.segment_events or is_forced:
            return events
        # Without this check, an idle ledger would seal its own `segment-sealed` events for ever.
        if set(events["type"].unique().to_pylist()) == {"segment-sealed"}:
            return None
        age_ms = await self._now_ms() - events["ms"][0].as_py()
        return events if age_ms >= 1000 * settings.segment_age_s else None

    async def _read(self, after: EntryId, count: int) -> pa.Table:
        reader, tables = StreamReader(self._redis, self._keys), list[pa.Table]()
        try:
            while count > 0:
                batch = await reader.read_after(after, count=min(count, _PAGE))
                if not batch:
                    raise LedgerUnavailable("the stream has fewer events than were folded")
                tables.append(await asyncio.to_thread(batch.to_table, is_upcast=False))
                after, count = batch.last_id, count - len(batch)
        finally:
            await reader.aclose()
        return pa.concat_tables(tables)

    async def _record(self, segment: Segment) -> None:
        manifest = segment.manifest
        payload = SegmentSealed(
            segment=manifest.segment,
            first_id=manifest.first_id,
            last_id=manifest.last_id,
            events=manifest.events,
            chain_before=manifest.chain_before,
            chain_after=manifest.chain_after,
        )
        numbers = (manifest.first_seq, manifest.last_seq, manifest.chain_after)
        reply = await self._run("seal", *numbers, payload_json(payload))
        if reply[0] == b"GAP":
            raise ArchiveBehind(
                partition=manifest.partition, sealed_seq=int(reply[1]), archived_seq=manifest.first_seq - 1
            )
        _log.info("segment.sealed", segment=manifest.segment, events=manifest.events, bytes=manifest.file_bytes)

    async def _discard(self, segment: Segment) -> int:
        manifest = segment.manifest
        reply = await self._run("discard", manifest.last_seq, manifest.last_id)
        if reply[0] != b"OK":
            problem = f"its last event is not where it was sealed ({reply[0].decode()}); nothing is trimmed"
            raise LedgerRefused(f"{manifest.segment}: {problem}")
        _log.info("stream.trimmed", partition=manifest.partition, up_to=manifest.last_seq)
        return int(reply[1])

    async def _run(self, script: str, *arguments: str | int) -> list[bytes]:
        code = packaged_text("tollbook.ledger.archive", f"scripts/{script}.lua")
        keys = self._keys
        reply: list[bytes] = await self._pipeline.execute(
            "EVAL", code, 2, keys.meta, keys.ledger, self._ledger_id, *arguments
        )
        if reply[0] == b"LEDGER":
            raise LedgerReplaced(expected=self._ledger_id, found=reply[1].decode())
        return reply

    async def _sealed_seq(self) -> int:
        found: bytes | None = await self._pipeline.execute("HGET", self._keys.meta, "sealed_seq")
        return int(found or 0)

    async def _extent(self) -> tuple[int, int]:
        """Return how many events were trimmed off the stream, and how many are on it."""
        removed: bytes | None = await self._pipeline.execute("HGET", self._keys.meta, "removed")
        return int(removed or 0), int(await self._pipeline.execute("XLEN", self._keys.ledger))

    async def _now_ms(self) -> int:
        return await self._pipeline.now_ms(self._keys.meta)

    def _genesis(self) -> bytes:
        return chain.genesis(self._ledger_id, self._keys.partition)
