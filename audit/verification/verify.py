"""Verification: walks the whole ledger and proves what is promised (G1, G2, G5, G7), or says where it is not so.

Of the archive, every byte is covered by the hash chain. The stream's unsealed part is not in
the chain yet: it is covered by its numbering, by the balances that the gate stamped, by the
rules of a call's life, by the gate's own balances and open holds, and by the projection. A
certificate keeps the head over that part too, so that the next verification can hold it against
what was sealed since.

Nothing is stopped and nothing is written but a temporary file. One who can rewrite archive,
stream and projection together, with all hashes, is found only by a head that was kept elsewhere:
give the last certificate.
"""

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import duckdb

from tollbook.audit.verification.books import Books
from tollbook.audit.verification.chain import ArchiveWalk, Chain, Events, Point, Trust
from tollbook.audit.verification.findings import Finding, Findings
from tollbook.audit.verification.projection import LiveProjection
from tollbook.audit.verification.stream import StreamWalk, check_gate, check_open, stream_end
from tollbook.ledger.archive.history import ROWS, LedgerSource
from tollbook.ledger.archive.segments import FORMAT, Archive
from tollbook.ledger.errors import LedgerError
from tollbook.ledger.keys import Keys

CERTIFICATE: Final = 1
MEMORY_LIMIT: Final = "1GB"


class NotTrusted(LedgerError):
    """What was given as a certificate or head is neither."""


@dataclass(frozen=True, slots=True)
class PartitionResult:
    """What was walked of a partition: the heads are over everything, and over what is sealed."""

    partition: int
    events: int
    first_id: str | None
    last_id: str
    head: str | None
    segments: int
    sealed_events: int
    sealed_head: str | None
    trusted_events: int
    compared_with_stream: int
    unsealed_events: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What was verified, and what was found. `is_sound` only where nothing was found."""

    ledger_id: str
    partitions: list[PartitionResult]
    highest: list[dict[str, Any]]
    open_holds: list[dict[str, Any]]
    findings: list[Finding]
    projection_rows: int | None
    gate_balances: int | None

    @property
    def is_sound(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    @property
    def events(self) -> int:
        """How many events were walked."""
        return sum(partition.events for partition in self.partitions)

    def certificate(self) -> dict[str, Any]:
        """Return the verdict as it is kept: the same ledger gives the same certificate."""
        own = ("events", "first_id", "last_id", "head", "segments", "sealed_events", "sealed_head")
        return {
            "certificate": CERTIFICATE,
            "verdict": "sound" if self.is_sound else "damaged",
            "ledger_id": self.ledger_id,
            "versions": {"tollbook": version("tollbook"), "duckdb": duckdb.__version__, "segments": FORMAT},
            "events": self.events,
            "partitions": [
                {"partition": each.partition, **{name: getattr(each, name) for name in own}} for each in self.partitions
            ],
            "open_holds": self.open_holds,
            "highest": self.highest,
            "findings": [asdict(finding) for finding in self.findings],
        }


@dataclass(frozen=True, slots=True)
class Options:
    """What to take as given. `since`: what lies before is not checked again. `against`: a head that must be met.

    Each is the path of a certificate, or a head in hexadecimal. `directory` is for the temporary file.
    """

    directory: Path
    since: str | None = None
    against: str | None = None
    memory_limit: str = MEMORY_LIMIT


async def verify(
    source: LedgerSource,
    options: Options,
    *,
    live: LiveProjection | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Verdict:
    """Verify a ledger; `live` is the projection to compare, looked up before.

    Errors: LedgerUnavailable; LedgerReplaced; NotTrusted; RedisError; OSError.
    """
    findings = Findings()
    trust = _trust(source, options)
    partitions = len(source.keys)
    with Books.open(
        options.directory, source.ledger_id, partitions, findings, memory_limit=options.memory_limit
    ) as books:
        walks = [_PartitionWalk(source, keys, books, trust, progress) for keys in source.keys]
        projection_rows = None
        try:
            if live is not None:
                for walk in walks:
                    await walk.advance(live.positions().get(walk.partition, 0))
                projection_rows = await _compare(live, source, books)
            for walk in walks:
                await walk.advance(None)
            await asyncio.to_thread(books.check, trust.skip_until)
            highest, open_holds = await asyncio.to_thread(lambda: (books.highest(), books.open_holds()))
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
            projection_rows=projection_rows,
            gate_balances=None if source.redis is None else sum(balances),
        )


async def _compare(live: LiveProjection, source: LedgerSource, books: Books) -> int | None:
    if live.ledger_id() != source.ledger_id:
        books.findings.add("projection", f"is of ledger {live.ledger_id()}, not of {source.ledger_id}")
        return None
    return await asyncio.to_thread(live.compare, books.store, books.findings)


class _PartitionWalk:
    """Goes over one partition, archive first and then the stream, and adds it to the books."""

    def __init__(
        self, source: LedgerSource, keys: Keys, books: Books, trust: Trust, progress: Callable[[int], None]
    ) -> None:
        self.partition = keys.partition
        self._source = source
        self._keys = keys
        self._books = books
        self._findings = books.findings
        self._progress = progress
        self._chain = Chain(source.ledger_id, keys.partition, books.findings, trust)
        archive = source.archive or Archive(Path("/nonexistent"))
        self._archive = ArchiveWalk(archive, source.ledger_id, self._chain)
        self._segments: Iterator[Events] = iter(())
        self._stream: StreamWalk | None = None
        self._sealed: tuple[int, str | None] = (0, None)
        self._waiting: Events | None = None
        self._gathered: list[Events] = []
        self._added_seq = 0
        self._is_open = True
        """Whether events can still be added up."""

    async def advance(self, until_seq: int | None) -> None:
        """Go on, and add what is found up to an event, or to the end."""
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
            self._is_open = await asyncio.to_thread(self._books.add, gathered, self.partition) and self._is_open

    async def finish(self, open_holds: list[dict[str, Any]]) -> int:
        """Check what is left when everything was walked; return how many of the gate's balances were compared."""
        self._chain.end()
        end = None if self._stream is None else self._stream.end
        if self._is_open:
            sealed_seq = None if end is None else end.sealed_seq
            await asyncio.to_thread(self._books.check_seals, self.partition, self._archive.manifests, sealed_seq)
        redis = self._source.redis
        if end is None or redis is None:
            return 0
        self._check_sealed(end.sealed_seq, end.sealed_chain)
        if self._chain.seq != end.seq:
            if not (self._archive.is_broken or self._stream is None or self._stream.is_broken):
                problem = f"the ledger has {end.seq} events by Redis, {self._chain.seq} are in archive and stream"
                self._findings.add("stream", problem, partition=self.partition, seq=min(end.seq, self._chain.seq) + 1)
            return 0
        if self._chain.last_id != end.generated_id:
            problem = f"the newest entries were removed: the last that Redis wrote was {end.generated_id}"
            self._findings.add("stream", problem, partition=self.partition, seq=end.seq + 1, event_id=end.generated_id)
        if not self._is_open:
            return 0
        check_open(open_holds, end, self.partition, self._findings)
        balances = await asyncio.to_thread(self._books.balances, self.partition, end.removed)
        return await check_gate(redis, self._keys, balances, end, self._findings)

    def result(self) -> PartitionResult:
        """Return what was walked."""
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
        """Return the next events of archive or stream, in which a segment may appear while we read."""
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

    def _check_sealed(self, sealed_seq: int, sealed_chain: str) -> None:
        last = {manifest.last_seq: manifest for manifest in self._archive.manifests.values()}
        if not sealed_seq:
            return
        if sealed_seq not in last:
            problem = f"the ledger was sealed up to event {sealed_seq}, no segment ends there"
            self._findings.add("archive", problem, partition=self.partition, seq=sealed_seq)
        elif last[sealed_seq].chain_after != sealed_chain:
            problem = f"the ledger was told the head {sealed_chain} of it, its manifest says another"
            segment = last[sealed_seq].segment
            self._findings.add("chain", problem, partition=self.partition, segment=segment, seq=sealed_seq)


def _trust(source: LedgerSource, options: Options) -> Trust:
    trust = Trust()
    for given, is_skipped in ((options.since, True), (options.against, False)):
        if given is None:
            continue
        if len(given) == 64 and set(given) <= set("0123456789abcdef"):
            trust.heads.add(given)
            if is_skipped:
                trust.skip_until |= _ends_with(source, given)
            continue
        for partition, point in _points(Path(given), source.ledger_id):
            trust.points.setdefault(partition, []).append(point)
            if is_skipped:
                trust.skip_until[partition] = point.seq
    return trust


def _points(path: Path, ledger_id: str) -> Iterator[tuple[int, Point]]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["certificate"] != CERTIFICATE or document["ledger_id"] != ledger_id:
            raise NotTrusted(f"{path} is the certificate of another ledger or format")
        for each in document["partitions"]:
            for seq, head in ((each["sealed_events"], each["sealed_head"]), (each["events"], each["head"])):
                if head is not None:
                    yield each["partition"], Point(int(seq), str(head))
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise NotTrusted(f"{path} is neither a certificate nor a head of 64 hexadecimal digits ({exc})") from exc


def _ends_with(source: LedgerSource, head: str) -> dict[int, int]:
    """Return up to which event a head reaches, where a segment ends with it."""
    archive = source.archive
    if archive is None:
        return {}
    for keys in source.keys:
        for path in archive.directory.glob(f"partition-{keys.partition}/*.json"):
            try:
                document = json.loads(path.read_bytes())
                if document["chain_after"] == head:
                    return {keys.partition: int(document["last_seq"])}
            except (OSError, ValueError, KeyError, TypeError):
                continue  # Told by the walk.
    return {}
