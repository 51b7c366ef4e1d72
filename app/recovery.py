"""`tollbook recover`: repairs a ledger that lost events (it went back in time), on a person's command.

It holds the projector's lease, and calls are stopped. If the stream has no newer events, the lost events are appended
again as they were. Otherwise new events enter their charges again, and the copies with the lost history are moved
aside. Each partition is recovered on its own. The next run finishes an interrupted one.
"""

import asyncio
import socket
import tempfile
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import takewhile
from pathlib import Path
from typing import Any, Final

from tollbook.app.processes import open_redis_url
from tollbook.inference.archive_place import archive_of
from tollbook.inference.process_name import process_name
from tollbook.inference.runtime import LedgerHandle, build_gates, open_ledger
from tollbook.inference.settings import Settings
from tollbook.ledger.archive.history import LedgerSource
from tollbook.ledger.archive.known_events import KnownEvents, Row
from tollbook.ledger.archive.losses import Loss, LossSummary, find_loss, lost_rows, summarise
from tollbook.ledger.archive.manifests import manifest_name, parquet_name
from tollbook.ledger.archive.reentering import LostSteps, Reentry
from tollbook.ledger.archive.replay import ReplayLimits, replay
from tollbook.ledger.archive.restoring import LedgerMoved, Restorer
from tollbook.ledger.archive.segments import Archive, Segment
from tollbook.ledger.archive.storage import Storage
from tollbook.ledger.errors import LedgerRefused, LedgerUnavailable
from tollbook.ledger.gate.baselines import BaselinePage, Baselines
from tollbook.ledger.gate.functions import function
from tollbook.ledger.gate.gate import Gate
from tollbook.ledger.gate.ledger import Ledger
from tollbook.ledger.gate.stops import CallSwitch, read_stop
from tollbook.ledger.gate.unbooked import UnbookedCharge
from tollbook.ledger.keys import Keys
from tollbook.ledger.private_files import make_private_folder
from tollbook.ledger.projection.database import set_aside
from tollbook.ledger.projection.lease import Lease, ProjectorRunning
from tollbook.ledger.projection.store import Store
from tollbook.ledger.server.at_rest import is_at_rest
from tollbook.ledger.server.endpoint import read_endpoint
from tollbook.ledger.signature import Signature
from tollbook.ledger.stream import StreamReader
from tollbook.schemas.events import LedgerRecovered, payload_json
from tollbook.schemas.identifiers import ZERO_ENTRY, EntryId
from tollbook.schemas.upcasters import payload_object

_STOPPED: Final = "`tollbook recover` works on the ledger"
_PAGE: Final = 10_000
_COSTS: Final = ("cost-recorded", "cost-adjusted")
# Tries to append the event that ends a recovery, while other processes write to the ledger.
_MAX_TRIES: Final = 100


class LeaseLost(LedgerRefused):
    """A projector has started on the ledger during the recovery."""

    def __init__(self, owner: str, place: str) -> None:
        super().__init__(
            f"a projector ({owner}, {place}) has started on this ledger in the meantime, so the recovery has stopped: "
            "stop that projector, and run this again; it continues from there"
        )


@dataclass(slots=True)
class PartitionReport:
    """What one partition has lost, and what was recovered. Amounts are nano-dollars."""

    loss: Loss
    summary: LossSummary
    unbooked: int
    """Unbooked charges whose hold is lost, or whose process has seen an event that is lost."""
    restored: int = 0
    entered: int = 0
    entered_nanousd: int = 0
    booked: int = 0
    left: list[str] = field(default_factory=list[str])
    """Ids of lost events about money that were not entered again."""
    unknown: EntryId | None = None
    """A lost event that another projector had folded when it stopped calls, and that no copy here has."""

    @property
    def is_whole(self) -> bool:
        """Whether there is nothing to recover."""
        return self.loss.is_whole and not self.unbooked


@dataclass(slots=True)
class Report:
    """The findings of all partitions. `moved_aside`: copies that have the lost history."""

    ledger_id: str
    partitions: list[PartitionReport]
    has_copies: bool
    """Whether there is a DuckDB file or a segment of the archive to compare with."""
    has_projection: bool
    """Whether there is a DuckDB file: without it, unsealed events cannot be compared."""
    is_applied: bool = False
    moved_aside: list[str] = field(default_factory=list[str])

    @property
    def is_whole(self) -> bool:
        """Whether nothing was lost and no charge is unbooked."""
        return all(partition.is_whole for partition in self.partitions)

    @property
    def is_in_order(self) -> bool:
        """Whether no event is known to be lost, or all lost events are recovered."""
        is_done = self.is_applied or (self.is_whole and self.has_copies)
        return is_done and not any(partition.unknown for partition in self.partitions)


class Recovery:
    """One run on one ledger. `projection` is the DuckDB file to compare with; by default the one in use."""

    def __init__(
        self, settings: Settings, handle: LedgerHandle, projection: Path | None = None, *, batch_events: int = 500
    ) -> None:
        self._settings = settings
        self._handle = handle
        self._projection = projection or settings.projection_path
        self._archive = archive_of(settings)
        self._batch_events = batch_events
        # These gates have seen no event, so they do not refuse a ledger that lost events.
        self._gates = build_gates(handle, settings)

    async def look(self) -> Report:
        """Find what is lost, and write nothing. Errors: LedgerRefused; LedgerUnavailable."""
        async with self._known() as known:
            return await self._look(known)

    async def apply(self, signature: Signature) -> Report:
        """Recover the ledger and return what was found and done. After an error, a repeat continues from there.

        Errors: ProjectorRunning; LeaseLost; LedgerMoved; LedgerRefused; LedgerUnavailable.
        """
        async with self._known() as known:
            report = await self._look(known)
            # Without a loss, calls need not be stopped. But a killed run may have left them stopped.
            if report.is_whole and await read_stop(self._handle.pipeline, self._handle.keys) != _STOPPED:
                return report
            async with self._alone():
                report = await self._look(known)
                for partition in report.partitions:
                    if not partition.loss.newer and (partition.loss.events or partition.loss.unfinished):
                        await self._restore(partition, known, signature)
                if any(partition.loss.newer or partition.unbooked for partition in report.partitions):
                    await self._enter(report, known, signature)
                report.is_applied = not report.is_whole
        return report

    async def _look(self, known: KnownEvents) -> Report:
        partitions = list[PartitionReport]()
        for keys, gate in zip(self._handle.keys, self._gates, strict=True):
            loss = await find_loss(self._handle.redis, keys, known)
            summary = await asyncio.to_thread(summarise, loss, known)
            unbooked = 0
            for charge in await gate.unbooked():
                unbooked += await _needs_person(gate, charge, loss)
            unknown = None if loss.events else await self._unknown(keys)
            partitions.append(PartitionReport(loss, summary, unbooked, unknown=unknown))
        has_copies = known.projection is not None or any(known.segments(keys.partition) for keys in self._handle.keys)
        return Report(known.ledger_id, partitions, has_copies, known.projection is not None)

    async def _unknown(self, keys: Keys) -> EntryId | None:
        """Return the event that the projector had folded when it stopped calls, if it is lost and not declared lost."""
        execute = self._handle.pipeline.execute
        values: Any = await execute("HMGET", keys.meta, "stopped", "stopped_seen", "removed_to")
        if values[0] is None or values[1] is None:
            return None
        seen, removed_to = (EntryId.parse((value or b"0-0").decode()) for value in values[1:])
        if seen <= removed_to or await execute("XRANGE", keys.ledger, str(seen), str(seen), "COUNT", 1):
            return None
        async for row in self._rows_after(keys, seen):
            is_end = row["type"] == "ledger-recovered"
            if is_end and EntryId.parse(payload_object(row["payload"])["last_id"]) >= seen:
                return None
        return seen

    async def _restore(self, partition: PartitionReport, known: KnownEvents, signature: Signature) -> None:
        loss = partition.loss
        note = loss.unfinished or payload_json(
            LedgerRecovered(
                first_id=await asyncio.to_thread(_first_id, loss, known),
                last_id=str(loss.known.entry),
                after_id=str(loss.common.entry),
                events=loss.events,
                restored=loss.events,
                author=signature.author,
                reason=signature.reason,
            )
        )
        if loss.events:
            limits = ReplayLimits({loss.keys.partition: loss.common.entry})
            async with self._folded(limits, known, [loss]) as ledger:
                restorer = Restorer(
                    self._handle.pipeline,
                    loss,
                    ledger,
                    idempotency_ttl_s=self._settings.idempotency_ttl_s,
                    batch_events=self._batch_events,
                )
                await asyncio.to_thread(restorer.check, lost_rows(loss, known))
                partition.restored = await restorer.restore(lost_rows(loss, known), note)
        await self._declare(loss, note)

    async def _enter(self, report: Report, known: KnownEvents, signature: Signature) -> None:
        losses = [partition.loss for partition in report.partitions]
        async with self._folded(ReplayLimits(), known, losses) as store:

            async def read(names: Sequence[str], /) -> BaselinePage:
                return await asyncio.to_thread(store.baselines, names)

            baselines = [Baselines(read, keys.partition, monotonic=time.monotonic) for keys in self._handle.keys]
            ledger = Ledger(self._handle.redis, self._gates, baselines)
            for partition in report.partitions:
                await self._enter_partition(partition, ledger, known, signature)
        if any(loss.newer for loss in losses):
            await self._replace_copies(report, known, losses)

    async def _enter_partition(
        self, partition: PartitionReport, ledger: Ledger, known: KnownEvents, signature: Signature
    ) -> None:
        loss, gate = partition.loss, self._gates[partition.loss.keys.partition]
        since = [row async for row in self._since(loss)] if loss.newer else []
        reentry = Reentry(
            ledger,
            gate,
            self._handle.pipeline,
            signature,
            since,
            idempotency_ttl_s=self._settings.idempotency_ttl_s,
            partitions=len(self._gates),
        )
        if loss.newer:
            await reentry.enter(await asyncio.to_thread(LostSteps.of, lost_rows(loss, known)))
        for charge in await gate.unbooked():
            if await reentry.book(charge, is_held_again=await self._is_held_again(loss.keys, charge)):
                await gate.forget(charge)
                partition.booked += 1
        partition.entered, partition.entered_nanousd = reentry.entered.events, reentry.entered.nanousd
        partition.left = reentry.entered.left
        declared = {payload_object(row["payload"]).get("last_id") for row in since if row["type"] == "ledger-recovered"}
        if loss.newer and str(loss.known.entry) not in declared:
            summary, first_id = partition.summary, await asyncio.to_thread(_first_id, loss, known)
            # Includes events that an interrupted run entered.
            again = [row async for row in self._since(loss) if _enters(row, EntryId.parse(first_id), loss.known.entry)]
            payload = LedgerRecovered(
                first_id=first_id,
                last_id=str(loss.known.entry),
                after_id=str(loss.common.entry),
                events=loss.events,
                entered=len(again),
                entered_nanousd=sum(row["amount"] for row in again if row["type"] in _COSTS),
                lost_holds=len(summary.holds),
                lost_held_nanousd=summary.held_nanousd,
                author=signature.author,
                reason=signature.reason,
            )
            await self._declare(loss, payload_json(payload))

    async def _declare(self, loss: Loss, payload: str) -> None:
        """Append the event that ends a recovery."""
        execute, keys = self._handle.pipeline.execute, loss.keys
        for _ in range(_MAX_TRIES):
            last = str(await self._newest(keys))
            reply: Any = await execute(
                "FCALL", function("recovered"), 2, keys.meta, keys.ledger, self._handle.ledger_id, last, payload
            )
            if reply[0] == b"OK":
                return
        raise LedgerMoved(keys.partition)

    async def _replace_copies(self, report: Report, known: KnownEvents, losses: Sequence[Loss]) -> None:
        """Move aside copies with the lost history, and fold the current ledger into the file in use."""
        now = datetime.now(UTC)
        for loss in losses:
            disputed = [each for each in known.segments(loss.keys.partition) if not _is_common(each, loss)]
            if disputed:
                place = await asyncio.to_thread(_move, disputed, self._archive.storage, f".{now:%Y%m%dT%H%M%SZ}.lost")
                report.moved_aside.append(f"{place}/partition-{loss.keys.partition}")
        if self._projection == self._settings.projection_path and self._projection.exists():
            report.moved_aside.append(str(await asyncio.to_thread(set_aside, self._projection, now)))
            source = LedgerSource(known.ledger_id, self._handle.keys, self._archive, self._handle.redis)
            await asyncio.to_thread((await replay(source, self._projection)).close)

    async def _since(self, loss: Loss) -> AsyncGenerator[Row]:
        """Yield the events on the stream that are newer than the loss."""
        async for row in self._rows_after(loss.keys, loss.common.entry):
            yield row

    async def _is_held_again(self, keys: Keys, charge: UnbookedCharge) -> bool:
        """Whether the hold with an unbooked charge's number was made after the last event that its process had seen.

        Then another process, which did not know the lost hold, ran the call again, and both runs were paid (G3).
        """
        async for row in self._rows_after(keys, charge.seen):
            if row["type"] == "budget-reserved" and row["call_id"] == charge.call_id:
                payload = payload_object(row["payload"])
                if payload["hold"] == charge.hold and payload.get("kind", "hold") == "hold":
                    return True
        return False

    async def _rows_after(self, keys: Keys, after: EntryId) -> AsyncGenerator[Row]:
        reader = StreamReader(self._handle.redis, keys)
        try:
            while batch := await reader.read_after(after, count=_PAGE):
                for row in batch.to_table(is_upcast=False).to_pylist():
                    yield row
                after = batch.last_id
        finally:
            await reader.aclose()

    @asynccontextmanager
    async def _folded(self, limits: ReplayLimits, known: KnownEvents, losses: Sequence[Loss]) -> AsyncGenerator[Store]:
        """Fold the current ledger, without events that only the copies have, into a temporary file."""
        archive = _CommonArchive(self._archive.storage, losses)
        source = LedgerSource(known.ledger_id, self._handle.keys, archive, self._handle.redis)
        make_private_folder(self._settings.data_dir)
        with tempfile.TemporaryDirectory(prefix=".recover-", dir=self._settings.data_dir) as folder:
            store = await replay(source, Path(folder) / "ledger.duckdb", limits)
            try:
                yield store
            finally:
                await asyncio.to_thread(store.close)

    @asynccontextmanager
    async def _known(self) -> AsyncGenerator[KnownEvents]:
        opening = KnownEvents.open(self._handle.ledger_id, self._archive, self._projection)
        known = await asyncio.to_thread(opening.__enter__)
        try:
            yield known
        finally:
            await asyncio.to_thread(opening.__exit__, None, None, None)

    @asynccontextmanager
    async def _alone(self) -> AsyncGenerator[None]:
        """Take the projector's lease, and stop calls unless a projector has already stopped them.

        Errors: ProjectorRunning; LeaseLost, after which nothing more is written.
        """
        # The place differs from the projector's, so that a projector on the same file does not take this lease over.
        place = f"{socket.gethostname()}:{self._settings.projection_path.resolve()} (recover)"
        lease = Lease(
            self._handle.pipeline, namespace=self._settings.namespace, owner=f"recover {process_name()}", place=place
        )
        await lease.take()
        keeping = asyncio.create_task(lease.keep())
        try:
            async with _while_kept(keeping):
                switches = [self._switch(keys, lease) for keys in self._handle.keys]
                # If a projector has stopped calls, only a projector may resume them.
                own = [each for each in switches if await each.claim() in (None, _STOPPED)]
                for switch in own:
                    await switch.stop(_STOPPED, await self._newest(switch.keys))
                yield
                for switch in own:
                    await switch.resume(await self._newest(switch.keys))
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)
            await lease.release()

    def _switch(self, keys: Keys, lease: Lease) -> CallSwitch:
        return CallSwitch(self._handle.pipeline, keys, self._handle.ledger_id, lease.owner, lease.epoch, lease.place)

    async def _newest(self, keys: Keys) -> EntryId:
        found: Any = await self._handle.pipeline.execute("XREVRANGE", keys.ledger, "+", "-", "COUNT", 1)
        return EntryId.parse(found[0][0].decode()) if found else ZERO_ENTRY


@asynccontextmanager
async def _while_kept(keeping: "asyncio.Task[None]") -> AsyncGenerator[None]:
    """Cancel the body when the lease is lost. Errors: LeaseLost."""

    def end(_: object) -> None:
        limit.reschedule(asyncio.get_running_loop().time())

    try:
        async with asyncio.timeout(None) as limit:
            keeping.add_done_callback(end)
            try:
                yield
            finally:
                keeping.remove_done_callback(end)
    except TimeoutError:
        problem = keeping.exception() if keeping.done() and not keeping.cancelled() else None
        if not isinstance(problem, ProjectorRunning):
            raise
        raise LeaseLost(problem.owner, problem.place) from problem


class _CommonArchive(Archive):
    """The archive's segments that have only events that the ledger has too."""

    def __init__(self, storage: Storage, losses: Sequence[Loss]) -> None:
        super().__init__(storage)
        self._losses = {loss.keys.partition: loss for loss in losses}

    def segments(self, partition: int) -> list[Segment]:
        loss = self._losses.get(partition)
        found = super().segments(partition)
        return found if loss is None else list(takewhile(lambda each: _is_common(each, loss), found))


@asynccontextmanager
async def open_recovery(settings: Settings, projection: Path | None = None) -> AsyncGenerator[Recovery]:
    """Open the ledger of the settings. A stopped embedded server is started for this time.

    `projection`: as `Recovery`. Errors: LedgerUnavailable, also if there is no ledger; LedgerRefused.
    """
    async with AsyncExitStack() as stack:
        endpoint = None if settings.redis_url else read_endpoint(settings.data_dir)
        if not (settings.redis_url or endpoint or is_at_rest(settings.data_dir)):
            # Opening would create an embedded server, and a look must write nothing.
            raise LedgerUnavailable(
                f"{settings.data_dir} has no data of an embedded server, and REDIS_URL is not set: set "
                "TOLLBOOK_DATA_DIR to the directory that `tollbook up` uses, or restore its data first"
            )
        redis_url = endpoint.redis_url if endpoint else await stack.enter_async_context(open_redis_url(settings))
        handle = await stack.enter_async_context(open_ledger(settings, redis_url, may_create=False))
        yield Recovery(settings, handle, projection)


async def _needs_person(gate: Gate, charge: UnbookedCharge, loss: Loss) -> bool:
    """Whether the sweeper can never book a charge: its hold, or an event that its process had seen, is lost."""
    record = await gate.call_record(charge.call_id)
    if record is None or not record.has_hold(charge.hold):
        return True
    comes_back = not loss.newer and charge.seen <= loss.known.entry
    return not comes_back and not await gate.is_on_stream(charge.seen)


def _first_id(loss: Loss, known: KnownEvents) -> str:
    return next(iter(lost_rows(loss, known)))["id"]


def _enters(row: Row, first: EntryId, last: EntryId) -> bool:
    """Whether an event enters one of the lost events again."""
    lost_id = payload_object(row["payload"]).get("recovered_id")
    return bool(lost_id) and first <= EntryId.parse(lost_id) <= last


def _is_common(segment: Segment, loss: Loss) -> bool:
    return not loss.events or segment.manifest.last_seq <= loss.common.seq


def _move(segments: Sequence[Segment], storage: Storage, suffix: str) -> str:
    """Move segments to another place, the newest first, so that the archive never has a gap."""
    stems = [segment.stem for segment in reversed(segments)]
    names = [name for stem in stems for name in (manifest_name(stem), parquet_name(stem))]
    return storage.set_aside(names, suffix=suffix)
