"""Verification of a partition's hash chain and of the order of its events.

The chain is computed again, event by event, and compared with what manifests, marks and earlier
certificates say.
"""

from dataclasses import dataclass
from typing import cast

import pyarrow as pa

from tollbook.audit.verification.certificates import Trust
from tollbook.audit.verification.findings import Findings
from tollbook.ledger.archive import chain
from tollbook.ledger.packaged import packaged_text
from tollbook.ledger.projection.database import connect
from tollbook.schemas.identifiers import EntryId


@dataclass(frozen=True, slots=True)
class Events:
    """A table of consecutive events; `segment` is None for those read from the stream."""

    table: pa.Table
    segment: str | None

    @property
    def first_seq(self) -> int:
        """The number of the first event."""
        return cast("int", self.table["seq"][0].as_py())

    @property
    def last_seq(self) -> int:
        """The number of the last event."""
        return cast("int", self.table["seq"][-1].as_py())

    @property
    def last_id(self) -> str:
        """The id of the last event."""
        return cast("str", self.table["id"][-1].as_py())


class Chain:
    """The chain of a partition, computed again event by event.

    `head` is None while it is unknown: after a break, until the next manifest states one.
    """

    def __init__(self, ledger_id: str, partition: int, findings: Findings, trust: Trust) -> None:
        self.partition = partition
        self.findings = findings
        self.seq = 0
        self.last_id = "0-0"
        self.first_id: str | None = None
        self.head: bytes | None = chain.genesis(ledger_id, partition)
        self.stated_head: bytes | None = None
        """The head that a manifest states, where that is not the computed one."""
        self.skip_until = trust.skip_until.get(partition, 0)
        self._points = trust.points.get(partition, [])
        self._wanted = trust.heads
        self._compare_trusted(0, [self.head], None)

    def take(self, events: pa.Table, *, segment: str | None, marks: list[bytes] | None = None) -> None:
        """Add the next events, and compare them with the sealed marks."""
        before, head = self.seq, self.head
        self.skip(events)
        if head is None:
            return
        digests = chain.digests(events)
        heads = chain.heads(head, digests)[1:]
        at = None if marks is None else _first_difference(heads, marks)
        if at == 0 and self.stated_head is not None and marks is not None:
            # Either the events before were rewritten or this manifest was: the marks show which.
            heads = chain.heads(self.stated_head, digests)[1:]
            at = _first_difference(heads, marks)
        self.stated_head = None
        self._compare_trusted(before + 1, heads[:at], segment)
        if at is None:
            self.head = heads[-1]
            return
        self.findings.add(  # audits G7
            "chain",
            "the chain breaks here: this event is not what was sealed, or one was dropped or added before it",
            partition=self.partition,
            segment=segment,
            seq=before + 1 + at,
            event_id=cast("str", events["id"][at].as_py()),
        )

    def skip(self, events: pa.Table) -> None:
        """Add the next events without checking them."""
        self.first_id = self.first_id or cast("str", events["id"][0].as_py())
        self.seq, self.last_id = self.seq + events.num_rows, cast("str", events["id"][-1].as_py())
        self.head = None

    def resume(self, head: bytes, *, segment: str | None = None) -> None:
        """Continue from a stated head."""
        self.head = head
        self._compare_trusted(self.seq, [head], segment)

    def end(self, *, has_stream: bool) -> None:
        """Report the trusted heads that were not reached.

        Without the stream, the head of an event that was only on the stream is a note: it may not be archived yet.
        """
        not_reached = {point.seq: point for point in self._points if point.seq > self.seq}
        for seq, point in sorted(not_reached.items()):
            if has_stream or point.is_sealed:
                problem = f"the ledger ends at event {self.seq}, before the trusted head"
                self.findings.add("trust", problem, partition=self.partition, seq=seq)
            else:
                self.findings.notes.append(
                    f"partition-{self.partition}: the certificate goes up to event {seq}, which was not sealed yet; "
                    f"the archive ends at event {self.seq}"
                )

    def _compare_trusted(self, first_seq: int, heads: list[bytes], segment: str | None) -> None:
        if self._wanted:
            self._wanted.difference_update(head.hex() for head in heads)
        for seq, head in {point.seq: point.head for point in self._points}.items():
            if first_seq <= seq < first_seq + len(heads) and heads[seq - first_seq].hex() != head:
                problem = "the head of the chain here is not the trusted one: what is before it was rewritten"
                self.findings.add("trust", problem, partition=self.partition, segment=segment, seq=seq)


def check_order(events: pa.Table, chain_: Chain, *, segment: str | None) -> bool:
    """Check that the events continue the partition, by number and by id; report the first that does not."""
    last = EntryId.parse(chain_.last_id)
    with connect(config={"threads": 1}) as connection:
        connection.register("incoming", select_columns(events, "seq", "id", "ms", "n", "partition"))
        given = {"seq": chain_.seq, "ms": last.ms, "n": last.seq, "partition": chain_.partition}
        statement = packaged_text("tollbook.audit", "sql/verify_order.sql")
        row = connection.execute(statement, given).fetchone()
    if row is None:
        return True
    expected, entry_id, problem = row
    chain_.findings.add(  # audits G7
        "stream" if segment is None else "archive",
        problem,
        partition=chain_.partition,
        segment=segment,
        seq=expected,
        event_id=entry_id,
    )
    return False


def select_columns(events: pa.Table, *names: str) -> pa.Table:
    """Return a table of these columns alone."""
    return pa.table({name: events[name] for name in names})  # pyright: ignore[reportUnknownMemberType]


def _first_difference(heads: list[bytes], marks: list[bytes]) -> int | None:
    if [head[: chain.MARK_BYTES] for head in heads] == marks:
        return None
    pairs = zip(heads, marks, strict=True)
    return next(at for at, (head, mark) in enumerate(pairs) if head[: chain.MARK_BYTES] != mark)
