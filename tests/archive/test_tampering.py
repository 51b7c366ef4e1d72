"""A forger changes, drops, adds or swaps one thing in a segment, a manifest or the stream: it is found where it is."""

import asyncio
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

from tests.archive.gate_ledger import GateLedger, gate_ledger
from tests.archive_files import directory_of, file_of
from tollbook.audit.verification.certificates import Verdict
from tollbook.audit.verification.findings import Finding
from tollbook.audit.verification.live_projection import LiveProjection
from tollbook.audit.verification.verification import Options, verify
from tollbook.ledger.archive import chain
from tollbook.ledger.archive.history import LedgerSource
from tollbook.ledger.archive.segments import Archive, Segment, file_sha256
from tollbook.ledger.server.connection import connect

pytestmark = pytest.mark.slow

Row = dict[str, Any]


@pytest.fixture(scope="module")
def sealed(server_url: str, tmp_path_factory: pytest.TempPathFactory) -> Archive:
    """The archive of a ledger; tests tamper with copies of it."""

    async def make() -> Archive:
        async with connect(server_url) as redis:
            await redis.flushall()
            made = await gate_ledger(redis, tmp_path_factory.mktemp("sealed"), 7, 400)
            await made.aclose()
            return made.archive

    return asyncio.run(make())


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
    tampering = drop(rows, draw)
    first = rows[0]["seq"]
    for at, row in enumerate(rows):
        row["seq"] = first + at
    return tampering


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


# --- Forging a segment: each level also adapts the data that would reveal it.


def write(segment: Segment, rows: list[Row]) -> None:
    schema = pq.read_schema(file_of(segment))
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), file_of(segment), compression="zstd")


def mend_nothing(segment: Segment) -> None:
    pass


def mend_file(segment: Segment) -> None:
    """The file's hash and size in the manifest."""
    _mend(segment, file_sha256=file_sha256(file_of(segment)), file_bytes=file_of(segment).stat().st_size)


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


def _mend(forged: Segment, /, **values: Any) -> None:
    path = file_of(forged).with_suffix(".json")
    path.write_text(json.dumps(json.loads(path.read_text()) | values, indent=2) + "\n")


def copy_of(archive: Archive, directory: Path) -> Archive:
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(directory_of(archive), directory)
    return Archive(directory)


async def verdict_on(archive: Archive, directory: Path, **options: Any) -> Verdict:
    shutil.rmtree(directory, ignore_errors=True)
    return await verify(LedgerSource.of_damaged_archive(archive), Options(directory, **options))


def is_located(finding: Finding, tampering: Tampering, segment: str | None) -> bool:
    return finding.segment == segment and (finding.seq == tampering.seq or finding.event_id in tampering.ids)


@pytest.mark.parametrize("mend", [mend_nothing, mend_file, mend_counts])
async def test_one_tampered_event_of_a_segment_is_found_where_it_is(
    sealed: Archive, tmp_path: Path, mend: Callable[[Segment], None]
) -> None:
    draw = random.Random(mend.__name__)
    for tamper in TAMPERINGS:
        archive = copy_of(sealed, tmp_path / "copy")
        segment = draw.choice(archive.segments(0))
        rows = segment.read().to_pylist()
        tampering = tamper(rows, draw)
        write(segment, rows)
        mend(segment)
        verdict = await verdict_on(archive, tmp_path / "v")
        assert any(is_located(finding, tampering, segment.manifest.segment) for finding in verdict.findings), (
            tampering, segment.manifest.segment, verdict.findings,
        )  # fmt: skip


async def test_a_segment_forged_with_its_whole_chain_is_found(books: GateLedger, tmp_path: Path) -> None:
    """The next segment, the `segment-sealed` event, or the ledger's own note of the last head does not fit."""
    draw = random.Random(11)
    segments = books.archive.segments(0)
    for tamper in TAMPERINGS:
        archive = copy_of(books.archive, tmp_path / "copy")
        segment = draw.choice(archive.segments(0))
        rows = segment.read().to_pylist()
        tampering = tamper(rows, draw)
        write(segment, rows)
        mend_chain(segment)
        source = LedgerSource(books.source.ledger_id, books.keys, archive, books.redis)
        shutil.rmtree(tmp_path / "v", ignore_errors=True)
        verdict = await verify(source, Options(tmp_path / "v"))
        name = segment.manifest.segment
        places = {finding.segment for finding in verdict.findings} | {
            name for finding in verdict.findings if name in finding.problem
        }
        assert name in places, (tampering, name, verdict.findings)
        assert len(segments) > 4


async def test_a_rewritten_archive_is_found_by_a_head_that_was_kept(sealed: Archive, tmp_path: Path) -> None:
    """A forger who does not know the trusted head can make everything fit except that head."""
    certificate = tmp_path / "certificate.json"
    certificate.write_text(json.dumps((await verdict_on(sealed, tmp_path / "v")).certificate()))
    head = sealed.segments(0)[-1].manifest.chain_after
    archive = copy_of(sealed, tmp_path / "copy")
    first, *later = archive.segments(0)
    rows = first.read().to_pylist()
    row = next(row for row in rows if row["type"] == "model-called")
    row["payload"] = row["payload"].replace('"latency_ms":', '"latency_ms":1')
    write(first, rows)
    mend_chain(first)
    before = json.loads(file_of(first).with_suffix(".json").read_text())["chain_after"]
    for segment in later:
        _mend(segment, chain_before=before)
        forged = next(each for each in archive.segments(0) if each.manifest.segment == segment.manifest.segment)
        rows = forged.read().to_pylist()
        manifests = {each.manifest.segment: each.manifest for each in archive.segments(0)}
        for row in rows:
            if row["type"] == "segment-sealed":
                tampering = json.loads(row["payload"])
                heads = manifests[tampering["segment"]].model_dump(include={"chain_before", "chain_after"})
                row["payload"] = json.dumps(tampering | heads, separators=(",", ":"))
        write(forged, rows)
        mend_chain(forged)
        before = json.loads(file_of(forged).with_suffix(".json").read_text())["chain_after"]
    assert (await verdict_on(archive, tmp_path / "v")).findings == [], "without a trusted head, everything fits"
    for given in (head, str(certificate)):
        for option in ("against", "since"):
            findings = (await verdict_on(archive, tmp_path / "v", **{option: given})).findings
            assert {finding.kind for finding in findings} == {"trust"}, (option, given)


# --- Manifests and whole segments.


async def test_every_changed_member_of_a_manifest_is_found(sealed: Archive, tmp_path: Path) -> None:
    draw = random.Random(5)
    for name, value in sealed.segments(0)[0].manifest.model_dump().items():
        archive = copy_of(sealed, tmp_path / "copy")
        segment = draw.choice(archive.segments(0))
        other = {
            int: lambda value: value + 1,
            str: lambda value: ("0" if value[0] != "0" else "1") + value[1:],
            dict: lambda value: {**value, "ping": [1]},
        }[type(value)]
        _mend(segment, **{name: other(getattr(segment.manifest, name))})
        verdict = await verdict_on(archive, tmp_path / "v")
        assert segment.manifest.segment in {finding.segment for finding in verdict.findings}, (name, verdict.findings)


async def test_a_manifest_with_another_encoding_is_found(sealed: Archive, tmp_path: Path) -> None:
    for rewrite in (
        lambda text: text + " ",
        lambda text: text.replace("{", '{"extra": 1,', 1),
        lambda _: "",
        lambda _: "[]",
    ):
        archive = copy_of(sealed, tmp_path / "copy")
        segment = archive.segments(0)[2]
        path = file_of(segment).with_suffix(".json")
        path.write_text(rewrite(path.read_text()))
        verdict = await verdict_on(archive, tmp_path / "v")
        assert segment.manifest.segment in {finding.segment for finding in verdict.findings}


@pytest.mark.parametrize("mend", [mend_nothing, mend_file, mend_counts])
async def test_events_swapped_between_two_segments_are_found_in_both(
    sealed: Archive, tmp_path: Path, mend: Callable[[Segment], None]
) -> None:
    draw = random.Random(mend.__name__)
    stays = ("seq", "id", "ms", "n", "head")
    for are_whole in (False, True):
        archive = copy_of(sealed, tmp_path / "copy")
        pair = draw.sample(archive.segments(0), 2)
        rows = [segment.read().to_pylist() for segment in pair]
        at = [draw.randrange(1, len(each)) for each in rows]
        first, second = rows[0][at[0]], rows[1][at[1]]
        kept = () if are_whole else stays
        rows[0][at[0]] = {**second, **{name: first[name] for name in kept}}
        rows[1][at[1]] = {**first, **{name: second[name] for name in kept}}
        for segment, forged in zip(pair, rows, strict=True):
            write(segment, forged)
            mend(segment)
        findings = (await verdict_on(archive, tmp_path / "v")).findings
        for segment, seq in zip(pair, (first["seq"], second["seq"]), strict=True):
            # Events out of order end the check: of two events that are swapped whole, the earlier one is reported.
            is_walked = not are_whole or segment is min(pair, key=lambda each: each.manifest.first_seq)
            places = {(finding.segment, finding.seq) for finding in findings}
            assert not is_walked or (segment.manifest.segment, seq) in places, (are_whole, places)


async def test_a_segment_of_another_ledger_is_found(sealed: Archive, tmp_path: Path) -> None:
    """Whole and in order by itself: file, marks, manifest and chain are another ledger's."""
    archive = copy_of(sealed, tmp_path / "copy")
    segment = archive.segments(0)[2]
    other = Archive(tmp_path / "other")
    head = chain.genesis("another", 0)
    given = other.write(segment.read().drop_columns(["head"]), ledger_id="another", partition=0, head=head)
    for suffix in (".parquet", ".json"):
        shutil.copy(file_of(given).with_suffix(suffix), file_of(segment).with_suffix(suffix))
    findings = (await verdict_on(archive, tmp_path / "v")).findings
    name = segment.manifest.segment
    assert ("manifest", name) in {(finding.kind, finding.segment) for finding in findings}
    assert ("chain", name, segment.manifest.first_seq) in {
        (finding.kind, finding.segment, finding.seq) for finding in findings
    }


def lose_manifest(segments: list[Segment], at: int) -> None:
    file_of(segments[at]).with_suffix(".json").unlink()


def lose_file(segments: list[Segment], at: int) -> None:
    file_of(segments[at]).unlink()


def lose_both(segments: list[Segment], at: int) -> None:
    lose_manifest(segments, at)
    lose_file(segments, at)


def cut_file(segments: list[Segment], at: int) -> None:
    path = file_of(segments[at])
    path.write_bytes(path.read_bytes()[:-40])


def swap_files(segments: list[Segment], at: int) -> None:
    first, second = file_of(segments[at]), file_of(segments[at + 1])
    first.rename(first.with_name("x"))
    second.rename(first)
    first.with_name("x").rename(second)


def copy_segment(segments: list[Segment], at: int) -> None:
    path = file_of(segments[at])
    for suffix in (".parquet", ".json"):
        shutil.copy(path.with_suffix(suffix), path.with_name(f"000000099951-000000100000{suffix}"))


@pytest.mark.parametrize("harm", [lose_manifest, lose_file, lose_both, cut_file, swap_files, copy_segment])
async def test_a_lost_or_misplaced_segment_is_found(
    sealed: Archive, tmp_path: Path, harm: Callable[[list[Segment], int], None]
) -> None:
    archive = copy_of(sealed, tmp_path / "copy")
    segments = archive.segments(0)
    harm(segments, 2)
    verdict = await verdict_on(archive, tmp_path / "v")
    places = {finding.segment for finding in verdict.findings}
    others = {"lose_both": segments[3].manifest.segment, "copy_segment": "partition-0/000000099951-000000100000"}
    expected = others.get(harm.__name__, segments[2].manifest.segment)
    assert expected in places, verdict.findings


async def test_a_lost_last_segment_is_found_by_its_event_on_the_ledger(books: GateLedger, tmp_path: Path) -> None:
    archive = copy_of(books.archive, tmp_path / "copy")
    segments = archive.segments(0)
    head = segments[-1].manifest.chain_after
    lose_both(segments, -1)
    alone = await verdict_on(archive, tmp_path / "v", against=head)
    assert [finding.kind for finding in alone.findings] == ["trust"]
    source = LedgerSource(books.source.ledger_id, books.keys, archive, books.redis)
    shutil.rmtree(tmp_path / "v")
    verdict = await verify(source, Options(tmp_path / "v"))
    assert any(finding.seq == segments[-1].manifest.last_seq for finding in verdict.findings), verdict.findings


# --- The stream.


async def rewrite_stream(books: GateLedger, entries: list[Any]) -> None:
    ledger = books.keys[0].ledger
    await books.redis.delete(ledger)
    for entry_id, fields in entries:
        await books.redis.xadd(ledger, fields, id=entry_id)


def as_rows(entries: list[Any]) -> list[Row]:
    rows: list[Row] = []
    for entry_id, fields in entries:
        row: Row = {name.decode(): value.decode() for name, value in fields.items()}
        ms, n = entry_id.decode().split("-")
        row |= {"id": entry_id.decode(), "ms": int(ms), "n": int(n)}
        row |= {name: int(row[name]) for name in ("seq", "attempt", "amount")}
        row["committed"] = int(row["committed"]) if row["committed"] else None
        rows.append(row)
    return rows


def as_entries(rows: list[Row]) -> list[Any]:
    names = ("type", "v", "seq", "user_id", "period", "call_id", "attempt", "amount", "committed", "payload")
    return [
        (f"{row['ms']}-{row['n']}", {name: "" if row[name] is None else row[name] for name in names}) for row in rows
    ]


async def test_one_tampered_event_of_the_stream_is_found_where_it_is(books: GateLedger, tmp_path: Path) -> None:
    draw = random.Random(3)
    original: Any = await books.redis.xrange(books.keys[0].ledger)
    for tamper in (*TAMPERINGS[:-1], *TAMPERINGS[:-1], *TAMPERINGS[:-1]):
        rows = as_rows(original)
        tampering = tamper(rows, draw)
        if tampering.what == "changed ms":
            continue  # A stream has no time beside the id, and no two entries of one id.
        rows.sort(key=lambda row: (row["ms"], row["n"]))
        await rewrite_stream(books, as_entries(rows))
        shutil.rmtree(tmp_path / "v", ignore_errors=True)
        live = LiveProjection.look(books.store)
        findings = (await verify(books.source, Options(tmp_path / "v"), live=live)).findings
        assert any(finding.seq == tampering.seq or finding.event_id in tampering.ids for finding in findings), (
            tampering,
            findings,
        )
    await rewrite_stream(books, original)
    shutil.rmtree(tmp_path / "v")
    assert (await verify(books.source, Options(tmp_path / "v"))).findings == [], "the original is sound"


async def test_a_segment_sealed_event_with_other_numbers_is_found(books: GateLedger, tmp_path: Path) -> None:
    original: Any = await books.redis.xrange(books.keys[0].ledger)
    at = next(n for n in range(len(original) - 1, 0, -1) if original[n][1][b"type"] == b"segment-sealed")
    tampering = json.loads(original[at][1][b"payload"])
    for name, value in tampering.items():
        other = value + 1 if isinstance(value, int) else value[:-1] + ("0" if value[-1] != "0" else "1")
        entries = list(original)
        entries[at] = (original[at][0], {**original[at][1], b"payload": json.dumps(tampering | {name: other})})
        await rewrite_stream(books, entries)
        shutil.rmtree(tmp_path / "v", ignore_errors=True)
        findings = (await verify(books.source, Options(tmp_path / "v"))).findings
        places = {(finding.kind, finding.event_id) for finding in findings}
        assert ("seal", original[at][0].decode()) in places, (name, findings)


async def test_newest_events_lost_from_the_stream_are_found(books: GateLedger, tmp_path: Path) -> None:
    ledger = books.keys[0].ledger
    entries: Any = await books.redis.xrevrange(ledger, count=1)
    newest = entries[0]
    await books.redis.xdel(ledger, newest[0])
    findings = (await verify(books.source, Options(tmp_path / "v"))).findings
    assert newest[0].decode() in {finding.event_id for finding in findings}


async def test_a_number_in_another_spelling_is_found(books: GateLedger, tmp_path: Path) -> None:
    """The same number in another spelling has another digest, and would not verify once it is sealed."""
    entries: Any = await books.redis.xrange(books.keys[0].ledger)
    entries[-3][1][b"attempt"] = b"0" + entries[-3][1][b"attempt"]
    await rewrite_stream(books, entries)
    findings = (await verify(books.source, Options(tmp_path / "v"))).findings
    assert [(finding.kind, finding.event_id) for finding in findings] == [("stream", entries[-3][0].decode())]
