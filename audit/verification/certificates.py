"""Certificates of a verification: their content, and how an earlier one is used.

A certificate keeps the heads of the chain, so that the next verification can compare them with
what was sealed since. One who can rewrite archive, stream and projection together, with all
hashes, is found only by a head that was kept elsewhere: give the last certificate.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import duckdb

from tollbook.audit.verification.findings import Finding
from tollbook.ledger.archive.history import LedgerSource
from tollbook.ledger.archive.manifests import FORMAT
from tollbook.ledger.errors import LedgerError
from tollbook.schemas.json_text import parse_json

CERTIFICATE: Final = 1
"""The version of a certificate's format."""


class NotTrusted(LedgerError):
    """The given text is neither the path of a certificate of this ledger nor a head."""


@dataclass(frozen=True, slots=True)
class PartitionResult:
    """What was read of a partition. `head` covers all of its events, `sealed_head` those that are sealed."""

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
    """What was verified, and what was found."""

    ledger_id: str
    partitions: list[PartitionResult]
    highest: list[dict[str, Any]]
    open_holds: list[dict[str, Any]]
    findings: list[Finding]
    projection_rows: int | None
    gate_balances: int | None
    notes: list[str] = field(default_factory=list[str])

    @property
    def is_sound(self) -> bool:
        """Whether nothing wrong was found."""
        return not self.findings

    @property
    def events(self) -> int:
        """How many events were read."""
        return sum(partition.events for partition in self.partitions)

    def certificate(self) -> dict[str, Any]:
        """Return the verdict as it is kept. The same ledger gives the same certificate."""
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
class Point:
    """The head of a partition's chain after an event, in hexadecimal; `seq` 0 is the beginning.

    `is_sealed`: the event was in a segment when the head was noted, so an archive must have it.
    """

    seq: int
    head: str
    is_sealed: bool


@dataclass(slots=True)
class Trust:
    """What is known from earlier verifications, by partition.

    `points` must be on the chain. Events up to `skip_until` are not checked again. `heads` must be on some
    partition's chain; those that were met are taken out.
    """

    points: dict[int, list[Point]] = field(default_factory=dict[int, list[Point]])
    skip_until: dict[int, int] = field(default_factory=dict[int, int])
    heads: set[str] = field(default_factory=set[str])


def load_trust(source: LedgerSource, *, since: str | None, against: str | None) -> Trust:
    """Read what is given as trusted: each the path of a certificate, or a head in hexadecimal.

    Events before `since` are not checked again. Errors: NotTrusted.
    """
    trust = Trust()
    for given, is_skipped in ((since, True), (against, False)):
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
        document = parse_json(path.read_text(encoding="utf-8"))
        if document["certificate"] != CERTIFICATE or document["ledger_id"] != ledger_id:
            raise NotTrusted(f"{path} is the certificate of another ledger or format")
        for each in document["partitions"]:
            sealed = int(each["sealed_events"])
            for seq, head in ((sealed, each["sealed_head"]), (int(each["events"]), each["head"])):
                if head is not None:
                    yield each["partition"], Point(seq, str(head), is_sealed=seq <= sealed)
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise NotTrusted(f"{path} is neither a certificate nor a head of 64 hexadecimal digits ({exc})") from exc


def _ends_with(source: LedgerSource, head: str) -> dict[int, int]:
    """Return the partition whose segment ends with this head, and that segment's last event."""
    archive = source.archive
    if archive is None:
        return {}
    for keys in source.keys:
        names = archive.manifests(keys.partition)
        archive.storage.prefetch(names)
        for name in names:
            try:
                document = parse_json(archive.storage.read(name))
                if document["chain_after"] == head:
                    return {keys.partition: int(document["last_seq"])}
            except (OSError, ValueError, KeyError, TypeError):
                continue  # Reported when the archive is read.
    return {}
