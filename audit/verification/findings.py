"""The findings of a verification, with their places."""

from dataclasses import dataclass, field
from typing import Final, Literal

# One change early in a ledger makes many later numbers differ; the first ones show where to look.
MAX_SHOWN_PER_RULE: Final = 20

Kind = Literal[
    "archive",
    "manifest",
    "file",
    "chain",
    "trust",
    "stream",
    "event",
    "balance",
    "cap",
    "call",
    "seal",
    "hold",
    "account",
    "key",
    "policy",
    "recovery",
    "record",
    "projection",
]
"""What was being checked: that segments follow each other; a manifest; a segment's file; the hash chain; a trusted
head; the stream (its order, its copy of archived events); an event by itself; stamped and recomputed balances;
caps (G1); the life of a call (G2); `segment-sealed` events; the gate's own open holds and balances; its plans, caps and
credits; the keys of the HTTP gateway; the policies (G11); what `tollbook recover` declared; its
records of calls; the projection."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A problem, with its place as far as it is known."""

    kind: Kind
    problem: str
    partition: int | None = None
    segment: str | None = None
    seq: int | None = None
    event_id: str | None = None

    def place(self) -> str:
        """Return the place in words."""
        parts = [self.segment or (None if self.partition is None else f"partition-{self.partition}")]
        parts += [None if self.seq is None else f"event {self.seq}", self.event_id and f"id {self.event_id}"]
        return ", ".join(part for part in parts if part)


@dataclass(slots=True)
class Findings:
    """Findings, in the order in which they were found."""

    found: list[Finding] = field(default_factory=list[Finding])
    notes: list[str] = field(default_factory=list[str])
    """What is worth knowing and proves nothing wrong."""

    def add(
        self,
        kind: Kind,
        problem: str,
        *,
        partition: int | None = None,
        segment: str | None = None,
        seq: int | None = None,
        event_id: str | None = None,
    ) -> None:
        """Add a finding."""
        self.found.append(
            Finding(kind=kind, problem=problem, partition=partition, segment=segment, seq=seq, event_id=event_id)
        )
