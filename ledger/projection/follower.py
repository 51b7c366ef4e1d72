"""Following one partition of the ledger: read, fold, then move its watermark.

While Redis is down, the follower waits; what cannot be folded is raised, never skipped.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, cast

import pyarrow as pa
import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from tollbook.ledger.errors import LedgerAhead, LedgerError, LedgerRefused, LedgerReplaced, LedgerUnavailable
from tollbook.ledger.gate.policies import POLICY_FIELDS, StoredPolicy, is_same_payload
from tollbook.ledger.gate.requests import Position
from tollbook.ledger.keys import Keys
from tollbook.ledger.projection.confirmation import Confirmation
from tollbook.ledger.projection.fold import Folded
from tollbook.ledger.projection.store import Store
from tollbook.ledger.projection.traces import Doubted, ForgedEvent, Traces, WatermarkMoved
from tollbook.ledger.projection.watermark import Trim, Watermark
from tollbook.ledger.server.connection import ANSWER_TIMEOUT_S
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.ledger.server.servers import all_good, clock_ms, read_together
from tollbook.ledger.stream import StreamReader
from tollbook.schemas.identifiers import ZERO_ENTRY, EntryId
from tollbook.schemas.upcasters import UnreadableEvent

# After a small fold: so many times as long as it took, so that others have the processor; but no longer than that.
_PAUSE_FOLDS: Final = 5
_MAX_PAUSE_S: Final = 0.5
_log = structlog.get_logger(__name__)


class LedgerRewritten(LedgerRefused):
    """The last event that was folded is not on the ledger: the ledger has another history."""

    def __init__(self, *, partition: int, position: Position) -> None:
        super().__init__(
            f"partition {partition}: event {position.seq} ({position.entry}), the last one folded, is not on the "
            "ledger: Redis was restored from an older backup, or a failover lost its last writes, and others have "
            "written since. Restore the newer data of Redis, or run `tollbook recover`, which shows what is lost"
        )
        self.partition = partition
        self.position = position


class PolicyForged(LedgerRefused):
    """What Redis holds as the policy of a partition is not what its last `policy-applied` event says."""

    def __init__(self, *, partition: int, problem: str) -> None:
        super().__init__(
            f"partition {partition}: {problem}: the policy was changed in Redis, and not by the gate. Run `tollbook "
            "verify`, and restore Redis"
        )
        self.partition = partition


@dataclass(frozen=True, slots=True)
class ProjectorSettings:
    """How the projector reads, and how far behind it keeps the watermark.

    `batch_events` are read at once; while catching up, up to `max_batches` of them are folded at once.
    `pause_ms` is the shortest pause after a small fold, since a fold costs nearly as much for one event as for
    a hundred; 0 for none. `checkpoint_events` are folded between two checkpoints.
    """

    batch_events: int = 10_000
    max_batches: int = 13
    block_ms: int = 1_000
    pause_ms: int = 100
    tail_keep_ms: int = 10_000
    checkpoint_events: int = 500_000
    first_backoff_s: float = 0.05
    max_backoff_s: float = 2.0


@dataclass(frozen=True, slots=True)
class _Page:
    """Events to fold in one transaction; `is_full` if more may be on the stream already."""

    table: pa.Table
    last_id: EntryId
    is_full: bool


@dataclass(frozen=True, slots=True)
class Lag:
    """How far the fold is behind the ledger: the events not yet folded, and the age of the oldest one."""

    events: int
    seconds: float


class Follower:
    """Follows one partition. `Projector` runs one for each."""

    def __init__(
        self,
        store: Store,
        redis: Redis,
        keys: Keys,
        *,
        trim: Trim,
        pipeline: CommandPipeline | None,
        settings: ProjectorSettings,
        sleep: Callable[[float], Awaitable[None]],
        running: asyncio.Event,
    ) -> None:
        self.has_folded = False
        self._store = store
        self._redis = redis
        self._keys = keys
        self._pipeline = pipeline
        self._settings = settings
        self._sleep = sleep
        self._running = running
        self._reader = StreamReader(redis, keys)
        self._watermark = Watermark(redis, keys, trim=trim, keep_ms=settings.tail_keep_ms, now_ms=self._reader.now_ms)
        self._traces = Traces(redis, keys)
        self._position = Position()
        self._trimmed_to = ZERO_ENTRY
        self._policy = StoredPolicy()
        self._confirmed_policy = ""
        self._since_checkpoint = 0
        self._waiting: dict[asyncio.Future[None], EntryId] = {}
        self._is_awaited = asyncio.Event()

    async def run(self) -> None:
        """Follow until cancelled. Errors: LedgerRefused; UnreadableEvent."""
        await self._load()
        backoff_s = self._settings.first_backoff_s
        try:
            while True:
                try:
                    await self._follow()
                except LedgerRefused:
                    raise
                except WatermarkMoved as exc:
                    # A standby folds beside the projector at work, which trims.
                    _log.debug("projection.read_again", partition=self._keys.partition, problem=str(exc))
                    await self._sleep(self._settings.first_backoff_s)
                except (LedgerError, RedisError, OSError) as exc:
                    _log.warning("projection.redis_unavailable", partition=self._keys.partition, problem=str(exc))
                    await self._sleep(backoff_s)
                    backoff_s = min(2 * backoff_s, self._settings.max_backoff_s)
                else:
                    backoff_s = self._settings.first_backoff_s
        finally:
            await self._reader.aclose()

    async def _follow(self) -> None:
        """Read, fold and trim once; while a full batch is folded, read the next."""
        settings = self._settings
        await self._running.wait()
        await self._check_identity()
        page = await self._read(self._position.entry, block_ms=settings.block_ms)
        while page.is_full:
            is_folded = asyncio.Event()
            ahead = asyncio.create_task(self._read_until(is_folded, page.last_id))
            try:
                await self._fold(page)
                is_folded.set()
                page = await ahead
            finally:
                await _cancel(ahead)
            await self._watermark.move(self._position)
            if not self._running.is_set():
                return
        await self._running.wait()
        clock = asyncio.get_running_loop().time
        began = clock()
        if page.table.num_rows:
            await self._fold(page)
        took_s = clock() - began
        await self._watermark.move(self._position)
        if page.table.num_rows:
            await self._pause(took_s)
        elif self._since_checkpoint:
            await self._checkpoint()

    async def _pause(self, fold_s: float) -> None:
        """Let events gather after a small fold that took so long, unless somebody waits for them."""
        shortest_s = self._settings.pause_ms / 1000
        if not shortest_s or self._waiting:
            return
        self._is_awaited.clear()
        pausing = asyncio.ensure_future(self._sleep(max(shortest_s, min(_PAUSE_FOLDS * fold_s, _MAX_PAUSE_S))))
        awaited = asyncio.create_task(self._is_awaited.wait())
        try:
            await asyncio.wait((pausing, awaited), return_when=asyncio.FIRST_COMPLETED)
        finally:
            await _cancel(pausing)
            await _cancel(awaited)

    async def _read(self, after: EntryId, *, block_ms: int | None = None) -> _Page:
        batch = await self._reader.read_after(after, count=self._settings.batch_events, block_ms=block_ms)
        # In a thread, while the page before is folded: DuckDB releases Python's lock while it works.
        table = await asyncio.to_thread(batch.to_table)
        return _Page(table, batch.last_id if batch else after, is_full=len(batch) == self._settings.batch_events)

    async def _read_until(self, is_folded: asyncio.Event, after: EntryId) -> _Page:
        """Read on while the page before is being folded: the larger a fold, the less it costs per event."""
        page = await self._read(after)
        tables = [page.table]
        while page.is_full and len(tables) < self._settings.max_batches and not is_folded.is_set():
            try:
                page = await self._read(page.last_id)
            except UnreadableEvent:
                break  # It is read again once everything before it is folded.
            tables.append(page.table)
        return _Page(pa.concat_tables(tables), page.last_id, page.is_full)

    async def check(self) -> None:
        """Check that the projection belongs to the ledger as it is now, before anybody reads it.

        Errors: LedgerUnavailable; LedgerReplaced; LedgerAhead; LedgerRewritten; PolicyForged.
        """
        await self._load()
        try:
            await self._check_identity()
        except (RedisError, OSError) as exc:
            raise LedgerUnavailable(f"the ledger cannot be read ({exc})") from exc

    async def _load(self) -> None:
        """Read from the projection how far it is, and which policy is the last one there."""
        self._position = await asyncio.to_thread(self._store.position, self._keys.partition)
        self._policy = await asyncio.to_thread(self._store.newest_policy, self._keys.partition)
        self._wake()

    async def _check_identity(self) -> None:
        """Refuse a ledger other than the one folded so far, or one that has lost or replaced events."""
        partition, position = self._keys.partition, self._position
        entry, meta, ledger = str(position.entry), self._keys.meta, self._keys.ledger
        commands = (
            ("HMGET", meta, "ledger_id", "removed", "trimmed_to", *POLICY_FIELDS),
            ("XLEN", ledger),
            ("XRANGE", ledger, entry, entry, "COUNT", 1),
        )
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            replies = await read_together(self._redis, meta, commands, is_one_moment=False)
        (stored_id, removed, trimmed_to, *policy), length, last_folded = all_good(replies)
        if _text(stored_id or "") != self._store.ledger_id:  # G8
            raise LedgerReplaced(expected=self._store.ledger_id, found=_text(stored_id or ""))
        seq = length + int(removed or 0)
        if seq < position.seq:  # G8
            raise LedgerAhead(folded_seq=position.seq, ledger_seq=seq)
        if not last_folded and position.seq > int(removed or 0):  # G8
            raise LedgerRewritten(partition=partition, position=position)
        self._trimmed_to = EntryId.parse(_text(trimmed_to or str(ZERO_ENTRY)))
        self._check_policy(StoredPolicy.of_fields(policy), is_all_folded=seq == position.seq)

    def _check_policy(self, stored: StoredPolicy, *, is_all_folded: bool) -> None:
        """Refuse a policy in Redis that no event put there. One that is newer than the fold has its event to come."""
        folded, partition = self._policy, self._keys.partition
        if stored.version < folded.version or (stored.version > folded.version and is_all_folded):  # G11
            problem = f"policy {stored.version} is in force in Redis, {folded.version} by the events"
            raise PolicyForged(partition=partition, problem=problem)
        if stored.version != folded.version or stored.payload == self._confirmed_policy:
            return
        if stored.digest != folded.digest or not is_same_payload(stored.payload, folded.payload):  # G11
            problem = f"policy {stored.version} has another content in Redis than in its event"
            raise PolicyForged(partition=partition, problem=problem)
        self._confirmed_policy = stored.payload

    async def _fold(self, page: _Page) -> None:
        try:
            await self._fold_confirmed(page.table)
        except ForgedEvent as exc:
            first_seq = cast("int", page.table["seq"][0].as_py())
            if exc.seq > first_seq:
                # What stands before it is true. If that has a forged event too, it is the one that is named.
                before = page.table.slice(0, exc.seq - first_seq)
                await self._fold(_Page(before, EntryId.parse(before["id"][-1].as_py()), is_full=False))
            raise

    async def _fold_confirmed(self, table: pa.Table) -> None:
        """Fold a table once it agrees with what the gate left beside its events. Errors: ForgedEvent; TailChanged."""
        await self._check_replicated(EntryId.parse(table["id"][-1].as_py()))
        confirmation = Confirmation(self._traces, max(self._position.entry, self._trimmed_to))
        folding = asyncio.create_task(
            asyncio.to_thread(self._store.fold_table, table, partition=self._keys.partition, confirm=confirmation)
        )
        try:
            folded = await asyncio.shield(folding)
        except asyncio.CancelledError:
            # Its thread asks this event loop, so it must be over before the loop is.
            confirmation.end()
            await asyncio.wait([folding])
            raise
        except Doubted as exc:
            # Of gate, events and DuckDB, one is not what it was. DuckDB can be checked by itself, and is rebuilt.
            await asyncio.to_thread(self._store.check)
            raise exc.refusal from exc
        if folded is None:
            return
        self._position, self.has_folded = folded.position, True
        if "policy-applied" in table["type"].unique().to_pylist():
            self._policy = await asyncio.to_thread(self._store.newest_policy, self._keys.partition)
        self._watermark.note(folded)
        self._since_checkpoint += folded.events
        self._wake()
        self._report(folded)
        if self._since_checkpoint >= self._settings.checkpoint_events:
            await self._checkpoint()

    async def _check_replicated(self, entry: EntryId) -> None:
        """See that replicas have an event: what is folded must not be lost in a failover. Errors: LedgerUnavailable."""
        if self._pipeline is None or self._pipeline.replication is None:
            return
        await self._pipeline.replicate(self._keys.mark)
        # Between the reading and this, the primary may have been replaced by a replica that did not have it.
        if not await self._pipeline.execute("XRANGE", self._keys.ledger, str(entry), str(entry), "COUNT", 1):  # G5 G8
            raise LedgerUnavailable(f"event {entry} was read, and is no longer on the ledger: it is read again")

    def _report(self, folded: Folded) -> None:
        partition, seq = self._keys.partition, folded.position.seq
        _log.debug("projection.advanced", partition=partition, events=folded.events, seq=seq)
        if folded.discrepancies:
            _log.error("projection.diverged", partition=partition, discrepancies=folded.discrepancies, seq=seq)

    async def _checkpoint(self) -> None:
        self._since_checkpoint = 0
        await asyncio.to_thread(self._store.checkpoint)

    async def wait_for(self, entry: EntryId) -> None:
        """Return once the entry is folded. Errors: what `fail` was given."""
        if entry <= self._position.entry:
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[future] = entry
        self._is_awaited.set()
        try:
            await future
        finally:
            self._waiting.pop(future, None)

    def _wake(self) -> None:
        for future, entry in list(self._waiting.items()):
            if entry <= self._position.entry and not future.done():
                future.set_result(None)

    def fail(self, problem: Exception) -> None:
        """Fail every `wait_for` that still waits."""
        for future in list(self._waiting):
            if not future.done():
                future.set_exception(problem)

    async def newest(self) -> EntryId:
        """Return the newest entry on the ledger. Errors: LedgerUnavailable."""
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                entries: Any = await self._redis.xrevrange(self._keys.ledger, count=1)
        except (RedisError, OSError) as exc:
            raise LedgerUnavailable(f"the ledger cannot be read ({exc})") from exc
        return EntryId.parse(_text(entries[0][0])) if entries else self._position.entry

    async def lag(self) -> Lag:
        """Measure the lag of this partition. Errors: LedgerUnavailable."""
        redis, keys = self._redis, self._keys
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                removed = await cast("Awaitable[Any]", redis.hget(keys.meta, "removed"))
                behind = max(0, int(removed or 0) + await redis.xlen(keys.ledger) - self._position.seq)
                oldest: Any = await redis.xrange(keys.ledger, min=f"({self._position.entry}", count=1)
                now_ms = await clock_ms(redis, keys.meta)
        except (RedisError, OSError) as exc:
            raise LedgerUnavailable(f"the ledger cannot be read ({exc})") from exc
        if not oldest:
            return Lag(behind, 0.0)
        return Lag(behind, max(0, now_ms - EntryId.parse(_text(oldest[0][0])).ms) / 1000)


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


async def _cancel(task: asyncio.Future[Any]) -> None:
    """Cancel a task whose result is not needed, and wait for its end."""
    if not task.done():
        task.cancel()
        await asyncio.wait([task])
