"""Verification: reads the whole ledger and proves its guarantees (G1, G2, G5, G7), or reports where they fail.

Every byte of the archive is covered by the hash chain. The stream's unsealed part is not in the
chain yet: it is checked by its numbering, the balances that the gate stamped, the rules of a
call's life, the gate's own balances and open holds, and the projection.

Does not slow or stop the running system, and writes nothing but a temporary file.
"""

import asyncio
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tollbook.audit.verification.archive_walk import ArchiveWalk
from tollbook.audit.verification.certificates import PartitionResult, Trust, Verdict, load_trust
from tollbook.audit.verification.chain import Chain, Events
from tollbook.audit.verification.findings import Findings
from tollbook.audit.verification.gate_state import GateState
from tollbook.audit.verification.live_projection import LiveProjection
from tollbook.audit.verification.refold import Refold
from tollbook.audit.verification.stream import StreamEnd, StreamWalk, check_open, stream_end
from tollbook.ledger.archive.history import ROWS, LedgerSource
from tollbook.ledger.archive.segments import Archive
from tollbook.ledger.keys import Keys
from tollbook.schemas.identifiers import EntryId

MEMORY_LIMIT: Final = "1GB"


@dataclass(frozen=True, slots=True)
class Options:
    """What is trusted, and where the temporary file goes (`directory`).

    `since` and `against` are each the path of a certificate, or a head in hexadecimal. Both must be on the chain;
    what lies before `since` is not checked again. `known_caps` are the caps of the settings in nano-dollars, now and
    earlier: of "user:<id>", "plan:<name>", "day" and "campaign"; without them, caps on no event are taken as stamped.
    """

    directory: Path
    since: str | None = None
    against: str | None = None
    memory_limit: str = MEMORY_LIMIT
    known_caps: Mapping[str, Collection[int]] | None = None


async def verify(
    source: LedgerSource,
    options: Options,
    *,
    live: LiveProjection | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Verdict:
    """Verify a ledger; `live` is the projection to compare it with, read before.

    Errors: LedgerUnavailable; LedgerReplaced; NotTrusted; RedisError; OSError.
    """
    findings = Findings()
    trust = load_trust(source, since=options.since, against=options.against)
    partitions = len(source.keys)
    with Refold.open(
        options.directory, source.ledger_id, partitions, findings, memory_limit=options.memory_limit
    ) as refold:
        walks = [_PartitionWalk(source, keys, refold, trust, progress) for keys in source.keys]
        projection_rows = None
        try:
            if live is not None:
                for walk in walks:
                    await walk.advance(live.positions().get(walk.partition, 0))
                projection_rows = await _compare(live, source, refold)
            for walk in walks:
                await walk.advance(None)
            await asyncio.to_thread(refold.check, trust.skip_until, options.known_caps)
            highest, open_holds = await asyncio.to_thread(lambda: (refold.highest(), refold.open_holds()))
            balances = [await walk.finish(open_holds) for walk in walks]
        finally:
            for walk in walks:
                await walk.aclose()
        for head in sorted(trust.heads):
            findings.add("trust", f"the trusted head {head} is nowhere on the chain")
        return Verdict(
            ledger_id=source.ledger_id,
            partitions=[walk.result() for walk in walks],
            highest=highest,
            open_holds=open_holds,
            findings=findings.found,
            notes=findings.notes,
            projection_rows=projection_rows,
            gate_balances=None if source.redis is None else sum(balances),
        )


async def _compare(live: LiveProjection, source: LedgerSource, refold: Refold) -> int | None:
    if live.ledger_id() != source.ledger_id:
        refold.findings.add("projection", f"is of ledger {live.ledger_id()}, not of {source.ledger_id}")
        return None
    return await asyncio.to_thread(live.compare, refold.store, refold.findings)


class _PartitionWalk:
    """Reads one partition, archive first and then the stream, and folds it again."""

    def __init__(
        self, source: LedgerSource, keys: Keys, refold: Refold, trust: Trust, progress: Callable[[int], None]
    ) -> None:
        self.partition = keys.partition
        self._source = source
        self._keys = keys
        self._refold = refold
        self._findings = refold.findings
        self._progress = progress
        self._chain = Chain(source.ledger_id, keys.partition, refold.findings, trust)
        archive = source.archive or Archive(Path("/nonexistent"))
        self._archive = ArchiveWalk(archive, source.ledger_id, self._chain)
        self._segments: Iterator[Events] = iter(())
        self._stream: StreamWalk | None = None
        self._sealed: tuple[int, str | None] = (0, None)
        self._waiting: Events | None = None
        self._gathered: list[Events] = []
        self._added_seq = 0
        self._is_open = True
        """Whether events can still be folded."""

    async def advance(self, until_seq: int | None) -> None:
        """Read and fold the next events, up to an event or to the end."""
        while until_seq is None or self._added_seq < until_seq:
            events, self._waiting = self._waiting or await self._next(), None
            if events is None:
                break
            if until_seq is not None and events.last_seq > until_seq:
                cut = until_seq + 1 - events.first_seq
                self._waiting = Events(events.table.slice(cut), events.segment)
                events = Events(events.table.slice(0, cut), events.segment)
            if events.table.num_rows:
                await self._add(events)
        await self._add_gathered()

    async def _add(self, events: Events) -> None:
        self._added_seq = events.last_seq
        if self._is_open:
            self._gathered.append(events)
        if sum(each.table.num_rows for each in self._gathered) >= ROWS:
            await self._add_gathered()
        self._progress(events.table.num_rows)

    async def _add_gathered(self) -> None:
        gathered, self._gathered = self._gathered, []
        if gathered:
            self._is_open = await asyncio.to_thread(self._refold.add, gathered, self.partition) and self._is_open

    async def finish(self, open_holds: list[dict[str, Any]]) -> int:
        """Check the end of the partition; return how many of the gate's balances were compared."""
        self._chain.end(has_stream=self._source.redis is not None)
        end = None if self._stream is None else self._stream.end
        if self._is_open:
            sealed_seq = None if end is None else end.sealed_seq
            await asyncio.to_thread(self._refold.check_seals, self.partition, self._archive.manifests, sealed_seq)
        redis = self._source.redis
        if end is None or redis is None:
            return 0
        self._check_sealed(end.sealed_seq, end.sealed_chain)
        self._check_removed(end)
        if self._chain.seq != end.seq:  # audits G7
            if not (self._archive.is_broken or self._stream is None or self._stream.is_broken):
                problem = f"the ledger has {end.seq} events by Redis, {self._chain.seq} are in archive and stream"
                self._findings.add("stream", problem, partition=self.partition, seq=min(end.seq, self._chain.seq) + 1)
            return 0
        if self._chain.last_id != end.generated_id:  # audits G7
            problem = f"the newest entries were removed: the last that Redis wrote was {end.generated_id}"
            self._findings.add("stream", problem, partition=self.partition, seq=end.seq + 1, event_id=end.generated_id)
        if not self._is_open:
            return 0
        check_open(open_holds, end, self.partition, self._findings)
        state = await GateState.read(redis, self._keys, end)
        await asyncio.to_thread(state.check, self._refold, self._findings)
        return state.balances

    def result(self) -> PartitionResult:
        """Return what was read."""
        stream, head = self._stream, self._chain.head
        return PartitionResult(
            partition=self.partition,
            events=self._chain.seq,
            first_id=self._chain.first_id,
            last_id=self._chain.last_id,
            head=None if head is None else head.hex(),
            segments=self._archive.segments,
            sealed_events=self._sealed[0],
            sealed_head=self._sealed[1],
            trusted_events=min(self._chain.skip_until, self._chain.seq),
            compared_with_stream=stream.compared if stream else 0,
            unsealed_events=stream.unsealed if stream else 0,
        )

    async def aclose(self) -> None:
        """Give the connection back."""
        if self._stream is not None:
            await self._stream.aclose()

    async def _next(self) -> Events | None:
        """Return the next events of archive or stream. A new segment may appear in between."""
        redis = self._source.redis
        if self._stream is None and redis is not None:
            end = await stream_end(redis, self._keys, self._source.ledger_id)
            self._stream = StreamWalk(redis, self._keys, end, self._chain)
        while True:
            after = self._chain.last_id
            events = await asyncio.to_thread(next, self._segments, None)
            if events is None:
                self._segments = self._archive.events()
                events = await asyncio.to_thread(next, self._segments, None)
            if self._archive.is_broken:
                self._is_open = False
            if events is not None:
                head = self._chain.head
                self._sealed = (self._chain.seq, None if head is None else head.hex())
                if self._stream is not None:
                    await self._stream.compare(events, after)
                return events
            stream = self._stream
            if stream is None or redis is None or stream.is_broken:
                return None
            if self._chain.seq > stream.end.seq:
                stream.end = await stream_end(redis, self._keys, self._source.ledger_id)
            before = self._chain.seq
            events = await stream.next_events()
            if events is not None or stream.is_broken or self._chain.seq == before:
                return events

    def _check_removed(self, end: StreamEnd) -> None:
        """Check `removed_to`: the gate takes events up to there for archived, and would not notice missing ones."""
        removed_to = EntryId.parse(end.removed_to)
        first = EntryId.parse(end.first_id) if end.first_id else None
        if removed_to > EntryId.parse(end.generated_id) or (first is not None and removed_to >= first):  # audits G1
            problem = (
                f"events up to {removed_to} are archived and trimmed off the stream, as Redis has it; they are not"
            )
            self._findings.add("stream", problem, partition=self.partition)

    def _check_sealed(self, sealed_seq: int, sealed_chain: str) -> None:
        last = {manifest.last_seq: manifest for manifest in self._archive.manifests.values()}
        if not sealed_seq:
            return
        if sealed_seq not in last:
            problem = f"the ledger was sealed up to event {sealed_seq}, no segment ends there"
            self._findings.add("archive", problem, partition=self.partition, seq=sealed_seq)
        elif last[sealed_seq].chain_after != sealed_chain:
            problem = f"the ledger has the head {sealed_chain} for it, its manifest has another"
            segment = last[sealed_seq].segment
            self._findings.add("chain", problem, partition=self.partition, segment=segment, seq=sealed_seq)
