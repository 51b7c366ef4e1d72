"""Claims on task entries: renewed while a task is worked on, taken over from workers whose heartbeat has stopped.

An entry stays pending in its consumer group from delivery to acknowledgement. Renewal resets the idle time of an entry
only if this worker still owns it, in one step on the server: a process that was paused must not take back entries that
other workers have claimed since.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, Final

import structlog
from redis.exceptions import ResponseError

from tollbook.consumers.messages import Delivery
from tollbook.ledger.errors import LedgerUnavailable
from tollbook.ledger.gate.functions import function
from tollbook.ledger.keys import GROUP, worker_key
from tollbook.ledger.server.connection import as_map
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.ledger.server.refusals import reason_of

_PAGE: Final = 100
# Fractions of `claim_after_s`, together less than 1: a worker counts as silent after the first, and a scan finds it
# within the second.
_SILENT_PART: Final = 0.8
_SCAN_PART: Final = 0.1
# Scans from one renewal to the next: four renewals must fail before a live worker is taken for dead.
_SCANS_PER_RENEWAL: Final = 2
# A multiple of `claim_after_s`: a consumer that has sent no command for this long is not reading.
_GONE_PART: Final = 4.0
_RENEWALS_PER_TIDYING: Final = 5
_log = structlog.get_logger(__name__)


def _ignore(_: Delivery) -> None:
    pass


class Claims:
    """The claims of one worker on the entries it works on. `taken` and `lost` count those that changed hands.

    `monotonic` is a clock in seconds, the event loop's unless given.
    """

    def __init__(
        self,
        pipeline: CommandPipeline,
        *,
        namespace: str,
        consumer: str,
        streams: Iterable[str],
        claim_after_s: float,
        monotonic: Callable[[], float] | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.taken = 0
        self.lost = 0
        self._pipeline = pipeline
        self._namespace = namespace
        self._consumer = consumer
        self.streams = tuple(streams)
        self._claim_after_s = claim_after_s
        self._monotonic = monotonic
        self._sleep = sleep
        self._silent_ms = round(1000 * _SILENT_PART * claim_after_s)
        self._gone_ms = round(1000 * _GONE_PART * claim_after_s)
        self._held: dict[tuple[str, str], Delivery] = {}

    def __len__(self) -> int:
        return len(self._held)

    def add(self, delivery: Delivery) -> bool:
        """Renew the claim on a delivery from now on; return False if this worker already works on it."""
        if delivery.key in self._held:
            return False
        self._held[delivery.key] = delivery
        return True

    def drop(self, delivery: Delivery) -> None:
        """Stop renewing a claim."""
        self._held.pop(delivery.key, None)

    def holds(self, delivery: Delivery) -> bool:
        """Whether the claim is still this worker's, as of the latest renewal."""
        return delivery.key in self._held

    async def ensure_groups(self) -> None:
        """Create the consumer groups at the streams' beginning, so that earlier tasks are read, too."""
        await self._ensure_groups(self.streams)

    async def add_streams(self, streams: Iterable[str]) -> None:
        """Add streams, and create their groups. Errors: LedgerUnavailable."""
        new = tuple(streams)
        await self._ensure_groups(new)
        self.streams += new

    async def _ensure_groups(self, streams: Iterable[str]) -> None:
        for stream in streams:
            try:
                await self._pipeline.execute("XGROUP", "CREATE", stream, GROUP, "0", "MKSTREAM")
            except ResponseError as exc:
                if "BUSYGROUP" not in str(exc):
                    raise LedgerUnavailable(f"the task stream {stream} cannot be read: {reason_of(exc)}") from exc

    async def acknowledge(self, delivery: Delivery) -> None:
        """Acknowledge a task whose result is stored."""
        await self._pipeline.execute("XACK", delivery.stream, GROUP, delivery.entry_id)
        self.drop(delivery)

    async def give_back(self, delivery: Delivery) -> None:
        """Leave a task pending without counting this delivery; it is delivered again when its claim has run out."""
        if not self.holds(delivery):
            return  # Another worker has taken it over and must not lose it.
        await self._pipeline.execute(
            "XCLAIM", delivery.stream, GROUP, self._consumer, 0, delivery.entry_id,
            "RETRYCOUNT", max(0, delivery.deliveries - 1), "JUSTID",
        )  # fmt: skip
        self.drop(delivery)

    async def is_alive(self, consumer: str) -> bool:
        """Whether a worker has a heartbeat."""
        return bool(await self._pipeline.execute("EXISTS", worker_key(self._namespace, consumer)))

    async def heartbeat(self) -> None:
        """Show the other workers that this one is alive."""
        key = worker_key(self._namespace, self._consumer)
        await self._pipeline.execute("SET", key, "1", "PX", self._silent_ms)

    async def resign(self) -> None:
        """Show the other workers that this one has stopped, so that they need not wait until its heartbeat runs out.

        Its consumers are removed unless they have pending entries: the worker that takes those over removes them.
        """
        for stream in self.streams:
            with contextlib.suppress(ResponseError):
                await self._remove(stream, self._consumer)
        await self._pipeline.execute("DEL", worker_key(self._namespace, self._consumer))

    async def run(self, accept: Callable[[Delivery], None], on_lost: Callable[[Delivery], None] = _ignore) -> None:
        """Renew claims and take over abandoned entries until cancelled.

        `accept` gets each entry taken over; `on_lost` gets each delivery that another worker has claimed.
        """
        clock = self._monotonic or asyncio.get_running_loop().time
        renewed_at, scans_to_skip, scans_to_renewal = clock(), 0, 0
        renewals_to_tidying = _RENEWALS_PER_TIDYING
        while True:
            try:
                is_late = clock() - renewed_at > self._claim_after_s / 2
                if is_late or scans_to_renewal == 0:
                    await self.heartbeat()
                    await self.renew(on_lost)
                    renewed_at, scans_to_renewal = clock(), _SCANS_PER_RENEWAL
                    renewals_to_tidying -= 1
                    if renewals_to_tidying <= 0 and not is_late:
                        renewals_to_tidying = _RENEWALS_PER_TIDYING
                        await self.remove_gone()
                if is_late:
                    # Redis was away, or the machine slept. The other workers need time for a heartbeat, too.
                    scans_to_skip = _SCANS_PER_RENEWAL + 1
                scans_to_renewal -= 1
                if scans_to_skip:
                    scans_to_skip -= 1
                else:
                    await self._scan(accept)
            except (LedgerUnavailable, ResponseError) as exc:
                # A group that vanished (DEL, FLUSHALL) gives an error reply; `serve_worker` creates it again.
                _log.warning("claims.renewal_missed", problem=str(exc))
            await self._sleep(_SCAN_PART * self._claim_after_s)

    async def remove_gone(self) -> None:
        """Remove the consumers of workers that are gone and have nothing pending any more."""
        for stream in self.streams:
            replies: list[Any] = await self._pipeline.execute("XINFO", "CONSUMERS", stream, GROUP)
            for consumer in map(as_map, replies):
                name: str = consumer[b"name"].decode()
                if name == self._consumer or consumer[b"pending"] or consumer[b"idle"] < self._gone_ms:
                    continue
                if not await self.is_alive(name):
                    await self._remove(stream, name)

    async def _remove(self, stream: str, name: str) -> None:
        # The function checks again that nothing is pending: removing a consumer forgets its pending entries.
        if await self._pipeline.execute("FCALL", function("remove_consumer"), 1, stream, GROUP, name):  # G3
            _log.info("consumer.removed", stream=stream, consumer=name)

    async def _scan(self, accept: Callable[[Delivery], None]) -> None:
        async def scan(stream: str) -> None:
            async for delivery in self.abandoned(stream):
                accept(delivery)

        # All streams at once: one round trip if there is nothing to take over.
        await asyncio.gather(*map(scan, self.streams))

    async def renew(self, on_lost: Callable[[Delivery], None] = _ignore) -> None:
        """Renew all claims; drop the deliveries that other workers have claimed, and call `on_lost` with each."""
        for stream in self.streams:
            mine = [entry_id for (name, entry_id) in self._held if name == stream]
            for start in range(0, len(mine), _PAGE):
                page = mine[start : start + _PAGE]
                lost: list[bytes] = await self._pipeline.execute(
                    "FCALL",
                    function("renew"),
                    1,
                    stream,
                    GROUP,
                    self._consumer,
                    *page,  # G4
                )
                for entry_id in lost:
                    # A delivery that was acknowledged during this command is no longer held: it was not lost.
                    delivery = self._held.pop((stream, entry_id.decode()), None)
                    if delivery is not None:
                        self.lost += 1
                        _log.warning("claim.lost", stream=stream, entry_id=entry_id.decode())
                        on_lost(delivery)

    async def abandoned(self, stream: str) -> AsyncIterator[Delivery]:
        """Claim the entries of silent workers, page by page, and yield them as deliveries."""
        start = b"-"
        while True:
            pending: list[Any] = await self._pipeline.execute(
                "XPENDING", stream, GROUP, "IDLE", self._silent_ms, start, "+", _PAGE
            )
            for delivery in await self._claim(stream, {entry_id: count for entry_id, _, _, count in pending}):
                yield delivery
            if len(pending) < _PAGE:
                return
            ms, _, number = pending[-1][0].partition(b"-")
            start = b"%s-%d" % (ms, int(number) + 1)

    async def _claim(self, stream: str, counts: dict[bytes, int]) -> list[Delivery]:
        wanted = [entry_id for entry_id in counts if (stream, entry_id.decode()) not in self._held]
        if not wanted:
            return []
        claimed: list[Any] = await self._pipeline.execute(
            "XCLAIM", stream, GROUP, self._consumer, self._silent_ms, *wanted
        )
        deliveries: list[Delivery] = []
        for entry_id, flat in claimed:
            if flat is None:
                continue  # The entry was deleted; the server forgets the claim.
            fields = {flat[i]: flat[i + 1] for i in range(0, len(flat), 2)}
            deliveries.append(Delivery(stream, entry_id.decode(), fields, counts[entry_id] + 1))
            self.taken += 1
            _log.warning("task.claimed", stream=stream, entry_id=entry_id.decode(), deliveries=counts[entry_id] + 1)
        return deliveries
