"""A forger changes, drops, adds or swaps one thing, in a segment, a manifest or the stream: verify finds it, and where."""

import json
import random
import shutil
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from redis.asyncio import Redis

from ledger import chain
from ledger.findings import Finding
from ledger.segments import Archive, Segment, file_sha256
from ledger.source import LedgerSource
from ledger.verify import Options, Verdict, verify
from ledger.verify_projection import LiveProjection
from tests.archive.gate_ledger import GateLedger, gate_ledger

Row = dict[str, Any]


@pytest.fixture
async def books(redis_client: Redis, tmp_path: Path) -> AsyncIterator[GateLedger]:
    made = await gate_ledger(redis_client, tmp_path / "ledger", 7, 400)
    yield made
    await made.aclose()


@dataclass(frozen=True)
class Tampering:
    """What was done, and where it must be found."""

    what: str
    seq: int
    ids: tuple[str, ...]


def change(rows: list[Row], draw: random.Random) -> Tampering:
    at = draw.randrange(len(rows))
    row, before = rows[at], rows[at]["id"]
    name = draw.choice(
        ["id", "ms", "type", "user_id", "period", "call_id", "attempt", "amount", "committed", "payload"]
    )
    match row[name]:
        case int() as number:
            row[name] = number + draw.choice([-1, 1])
        case None:
            row[name] = 1
        case str() as text if name == "payload":
            row[name] = text.replace("1", "2", 1) if "1" in text else text[:-1] + ',"reason":"x"}'
        case str() as text if name == "id":
            row["n"] += 1_000_000
            row["id"] = f"{row['ms']}-{row['n']}"
        case text:
            row[name] = text + "x"
    return Tampering(f"changed {name}", row["seq"], (before, row["id"]))


def drop(rows: list[Row], draw: random.Random) -> Tampering:
    at = draw.randrange(len(rows) - 1)
    gone = rows.pop(at)
    return Tampering("dropped an event", gone["seq"], (gone["id"], rows[at]["id"]))


def drop_and_renumber(rows: list[Row], draw: random.Random) -> Tampering:
    told = drop(rows, draw)
    first = rows[0]["seq"]
    for at, row in enumerate(rows):
        row["seq"] = first + at
    return told


def add(rows: list[Row], draw: random.Random) -> Tampering:
    at = draw.randrange(1, len(rows))
    row = dict(draw.choice(rows), seq=rows[at]["seq"], ms=rows[at - 1]["ms"], n=rows[at - 1]["n"] + 1)
    row["id"] = f"{row['ms']}-{row['n']}"
    if row["id"] == rows[at]["id"]:
        return add(rows, draw)
    rows.insert(at, row)
    for later in rows[at + 1 :]:
        later["seq"] += 1
    return Tampering("added an event", row["seq"], (row["id"],))


def swap(rows: list[Row], draw: random.Random) -> Tampering:
    at = draw.randrange(len(rows) - 1)
    first, second = rows[at], rows[at + 1]
    stays = ("seq", "id", "ms", "n", "head")
    rows[at] = {**second, **{name: first[name] for name in stays if name in first}}
    rows[at + 1] = {**first, **{name: second[name] for name in stays if name in second}}
    return Tampering("swapped two events", first["seq"], (first["id"],))


def swap_places(rows: list[Row], draw: random.Random) -> Tampering:
    at = draw.randrange(len(rows) - 1)
    rows[at], rows[at + 1] = rows[at + 1], rows[at]
    return Tampering("swapped two events whole", rows[at + 1]["seq"], (rows[at]["id"], rows[at + 1]["id"]))


TAMPERINGS = (change, change, change, drop, drop_and_renumber, add, swap, swap_places)


# --- Forging a segment: each level mends more of what would betray it.


def write(segment: Segment, rows: list[Row]) -> None:
    schema = pq.read_schema(segment.path)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), segment.path, compression="zstd")


def mend_nothing(segment: Segment) -> None:
    pass


def mend_file(segment: Segment) -> None:
    """The file's hash and size in the manifest."""
    _mend(segment, file_sha256=file_sha256(segment.path), file_bytes=segment.path.stat().st_size)


def mend_counts(segment: Segment) -> None:
    """What the manifest says of the events, too."""
    mend_file(segment)
    events = segment.read()
    _mend(segment, events=events.num_rows, first_id=events["id"][0].as_py(), last_id=events["id"][-1].as_py())


def mend_chain(segment: Segment) -> None:
    """The marks of the chain and the head after the segment, too."""
    events = segment.read()
    heads = chain.heads(bytes.fromhex(segment.manifest.chain_before), chain.digests(events))[1:]
    rows = [dict(row, head=head[: chain.MARK_BYTES]) for row, head in zip(events.to_pylist(), heads, strict=True)]
    write(segment, rows)
    mend_counts(segment)
    _mend(segment, chain_after=heads[-1].hex())


def _mend(segment: Segment, **values: Any) -> None:
    path = segment.path.with_suffix(".json")
    path.write_text(json.dumps(json.loads(path.read_text()) | values, indent=2) + "\n")


def copy_of(books: GateLedger, directory: Path) -> Archive:
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(books.archive.directory, directory)
    return Archive(directory)


async def verdict_on(archive: Archive, directory: Path, **options: Any) -> Verdict:
    shutil.rmtree(directory, ignore_errors=True)
    return await verify(LedgerSource.of_damaged_archive(archive), Options(directory, **options))


def is_located(finding: Finding, told: Tampering, segment: str | None) -> bool:
    return finding.segment == segment and (finding.seq == told.seq or finding.event_id in told.ids)


@pytest.mark.parametrize("mend", [mend_nothing, mend_file, mend_counts])
@pytest.mark.parametrize("seed", range(3))
async def test_one_tampered_event_of_a_segment_is_found_where_it_is(
    books: GateLedger, tmp_path: Path, mend: Callable[[Segment], None], seed: int
) -> None:
    draw = random.Random(seed)
    for tamper in TAMPERINGS:
        archive = copy_of(books, tmp_path / "copy")
        segment = draw.choice(archive.segments(0))
        rows = segment.read().to_pylist()
        told = tamper(rows, draw)
        write(segment, rows)
        mend(segment)
        verdict = await verdict_on(archive, tmp_path / "v")
        assert any(is_located(finding, told, segment.manifest.segment) for finding in verdict.findings), (
            told, segment.manifest.segment, verdict.findings,
        )  # fmt: skip
