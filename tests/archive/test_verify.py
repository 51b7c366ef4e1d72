"""`verify` on ledgers that the real gate wrote: a correct ledger has no finding; and what its report says."""

import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from docs.generate.event_docs import PAYLOADS
from tests.archive.gate_ledger import LEDGER, GateLedger, gate_ledger
from tests.archive_files import directory_of
from tests.quick import first_quick
from tollbook.audit.verification.certificates import NotTrusted, Verdict
from tollbook.audit.verification.chain import Events
from tollbook.audit.verification.live_projection import LiveProjection
from tollbook.audit.verification.stream import StreamWalk
from tollbook.audit.verification.verification import Options, verify
from tollbook.ledger.archive.history import LedgerSource
from tollbook.ledger.archive.segments import Archive
from tollbook.ledger.projection.store import Store


@pytest.fixture
async def books(redis_client: Redis, tmp_path: Path) -> AsyncIterator[GateLedger]:
    made = await gate_ledger(redis_client, tmp_path / "ledger", 1, 300)
    yield made
    await made.aclose()


async def verdict_of(books: GateLedger, tmp_path: Path, **options: Any) -> Verdict:
    directory = tmp_path / "verify"
    shutil.rmtree(directory, ignore_errors=True)
    return await verify(books.source, Options(directory, **options), live=LiveProjection.look(books.store))


@pytest.mark.slow
@pytest.mark.parametrize("partitions", [1, 3])
@pytest.mark.parametrize("seed", range(4))
async def test_nothing_is_found_on_what_the_gate_wrote(
    redis_client: Redis, tmp_path: Path, seed: int, partitions: int
) -> None:
    made = await gate_ledger(redis_client, tmp_path / "ledger", seed, 500, partitions=partitions)
    verdict = await verdict_of(made, tmp_path)
    assert verdict.findings == []
    types = {row["type"] for row in made.store.query("SELECT DISTINCT type FROM events")}
    assert types == PAYLOADS.keys() - {"ledger-recovered"}, "every other type of event was there to be verified"
    assert verdict.events == sum(made.store.position(keys.partition).seq for keys in made.keys)
    assert sum(part.compared_with_stream for part in verdict.partitions) > 0
    assert verdict.gate_balances
    rows = made.store.query("SELECT count(*) AS rows FROM events")[0]["rows"]
    assert verdict.projection_rows is not None
    assert verdict.projection_rows > rows
    await made.aclose()


@pytest.mark.slow
async def test_the_certificate_says_how_high_each_budget_was_committed(books: GateLedger, tmp_path: Path) -> None:
    """G1: at every hold, recomputed from the events in plain Python."""
    certificate = (await verdict_of(books, tmp_path)).certificate()
    assert certificate["verdict"] == "sound"
    assert certificate["ledger_id"] == LEDGER
    highest: dict[str, int] = {}
    for row in books.store.query("SELECT payload, nanousd(committed_usd) AS committed, * FROM events ORDER BY seq"):
        if row["type"] == "budget-reserved":
            stamps = {f"user:{row['user_id']}:{row['period']}": row["committed"]}
            stamps |= {
                each["budget"]: each["committed_nanousd"] for each in json.loads(row["payload"]).get("budgets", ())
            }
            for name, committed in stamps.items():
                highest[name] = max(highest.get(name, 0), committed)
    assert {row["budget"]: row["committed_nanousd"] for row in certificate["highest"]} == highest
    assert all(row["least_room_nanousd"] >= 0 for row in certificate["highest"])
    open_calls: Any = await books.redis.zrange(books.keys[0].holds, 0, -1)
    assert {hold["call_id"] for hold in certificate["open_holds"]} == {call.decode() for call in open_calls}
    assert open_calls


@pytest.mark.slow
async def test_the_same_ledger_gives_the_same_certificate(books: GateLedger, tmp_path: Path) -> None:
    first, second = [json.dumps((await verdict_of(books, tmp_path)).certificate()) for _ in range(2)]
    assert first == second


@pytest.mark.slow
async def test_what_a_certificate_covers_need_not_be_checked_again(books: GateLedger, tmp_path: Path) -> None:
    kept = tmp_path / "certificate.json"
    kept.write_text(json.dumps((await verdict_of(books, tmp_path)).certificate()))
    await books.run(150)
    await books.seal()
    await books.run(10)
    await books.fold()
    complete = await verdict_of(books, tmp_path)
    since = await verdict_of(books, tmp_path, since=str(kept))
    assert since.findings == complete.findings == []
    assert since.certificate() == complete.certificate()
    covered = json.loads(kept.read_text())["events"]
    assert since.partitions[0].trusted_events == covered
    assert (await verdict_of(books, tmp_path, against=str(kept))).findings == [], (
        "its unsealed part was sealed unchanged"
    )
    head = books.archive.segments(0)[3].manifest
    alone = await verdict_of(books, tmp_path, since=head.chain_after)
    assert (alone.findings, alone.partitions[0].trusted_events) == ([], head.last_seq)


@pytest.mark.slow
async def test_an_archive_alone_need_not_have_events_that_a_certificate_found_on_the_stream(
    books: GateLedger, tmp_path: Path
) -> None:
    kept = tmp_path / "certificate.json"
    kept.write_text(json.dumps((await verdict_of(books, tmp_path)).certificate()))
    (part,) = json.loads(kept.read_text())["partitions"]
    assert 0 < part["sealed_events"] < part["events"]
    alone = LedgerSource.of_archive(books.archive)
    trusting = Options(tmp_path / "since", since=str(kept)), Options(tmp_path / "against", against=str(kept))
    for options in trusting:
        verdict = await verify(alone, options)
        assert verdict.findings == []
        (note,) = (note for note in verdict.notes if "certificate" in note)
        assert f"up to event {part['events']}, which was not sealed yet" in note
        assert f"the archive ends at event {part['sealed_events']}" in note
    newest = books.archive.segments(0)[-1].manifest.segment
    for ending in ("json", "parquet"):
        (directory_of(books.archive) / f"{newest}.{ending}").unlink()
    (finding,) = (await verify(alone, Options(tmp_path / "shorter", against=str(kept)))).findings
    assert (finding.kind, finding.seq) == ("trust", part["sealed_events"]), "what was sealed then must be there"


@pytest.mark.slow
async def test_a_certificate_also_covers_events_that_were_not_sealed(books: GateLedger, tmp_path: Path) -> None:
    kept = tmp_path / "certificate.json"
    kept.write_text(json.dumps((await verdict_of(books, tmp_path)).certificate()))
    entries: Any = await books.redis.xrange(books.keys[0].ledger)
    await books.redis.delete(books.keys[0].ledger)
    at = next(n for n in range(len(entries) - 1, 0, -1) if entries[n][1][b"type"] == b"budget-reserved")
    entries[at][1][b"payload"] = entries[at][1][b"payload"].replace(b"host:1", b"host:2")
    for entry_id, fields in entries:
        await books.redis.xadd(books.keys[0].ledger, fields, id=entry_id)
    options = Options(tmp_path / "v", against=str(kept))
    assert {finding.kind for finding in (await verify(books.source, options)).findings} == {"trust"}


@pytest.mark.slow
@pytest.mark.parametrize("segment_events", first_quick(1, [7, 40]))
async def test_events_sealed_during_the_verification_are_no_finding(
    redis_client: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, segment_events: int
) -> None:
    """A projector seals while the command runs: segments inside what was read of the stream, and across its end."""
    made = await gate_ledger(redis_client, tmp_path / "ledger", 1, 60)
    await made.run(60)
    read = StreamWalk.next_events

    async def read_and_seal(walk: StreamWalk) -> Events | None:
        events = await read(walk)
        await made.seal(segment_events=segment_events)
        return events

    monkeypatch.setattr("tollbook.audit.verification.stream._PAGE", 3)
    monkeypatch.setattr(StreamWalk, "next_events", read_and_seal)
    verdict = await verify(made.source, Options(tmp_path / "verify"))
    assert verdict.findings == []
    await made.aclose()


@pytest.mark.slow
async def test_a_malformed_certificate_is_refused(books: GateLedger, tmp_path: Path) -> None:
    (tmp_path / "damaged.json").write_text("{}")
    (tmp_path / "another.json").write_text(json.dumps({"certificate": 1, "ledger_id": "another", "partitions": []}))
    for given in ("nothing.json", "0" * 63, "damaged.json", "another.json"):
        with pytest.raises(NotTrusted, match=given):
            await verdict_of(books, tmp_path, since=str(tmp_path / given))


@pytest.mark.slow
async def test_an_archive_alone_verifies_elsewhere(books: GateLedger, tmp_path: Path) -> None:
    shutil.copytree(directory_of(books.archive), tmp_path / "elsewhere")
    source = LedgerSource.of_archive(Archive(tmp_path / "elsewhere"))
    verdict = await verify(source, Options(tmp_path / "v"))
    assert verdict.findings == []
    last = books.archive.segments(0)[-1].manifest
    assert (verdict.events, verdict.partitions[0].head) == (last.last_seq, last.chain_after)


# --- What is wrong beside archive and stream.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("statement", "problem"),
    [
        ("UPDATE events SET latency_ms = latency_ms + 1 WHERE seq = 77", "events differs from the ledger in"),
        ("UPDATE events SET worker = 'x' WHERE seq = 78", "events differs from the ledger in"),
        ("DELETE FROM events WHERE seq = 77", "events lacks this one"),
        ("INSERT INTO events FROM events WHERE seq = 77", "events has a row that the ledger does not give"),
        ("UPDATE budgets SET settled_usd = settled_usd + 0.000000001 WHERE name = 'day'", "budgets has a row"),
        ("UPDATE counters SET denied = denied + 1", "counters has a row"),
        ("DELETE FROM counters WHERE user_id = 'u1'", "counters lacks a row"),
        ("CREATE OR REPLACE VIEW spend AS SELECT 1 AS user_id", "its views"),
    ],
)
async def test_a_projection_that_differs_is_found(
    books: GateLedger, tmp_path: Path, statement: str, problem: str
) -> None:
    """G5."""
    row = books.store.query("SELECT seq FROM events WHERE type = 'model-called' ORDER BY seq LIMIT 1")[0]["seq"]
    reserved = books.store.query("SELECT seq FROM events WHERE type = 'budget-reserved' ORDER BY seq LIMIT 1")[0]["seq"]
    text = statement.replace("77", str(row)).replace("78", str(reserved))
    books.store.connection.execute(text)
    findings = (await verdict_of(books, tmp_path)).findings
    assert findings
    assert {finding.kind for finding in findings} == {"projection"}
    assert any(problem in finding.problem for finding in findings), findings
    if "seq =" in statement:
        assert findings[0].seq in (row, reserved)


@pytest.mark.slow
async def test_a_reopened_projection_is_not_taken_for_another(books: GateLedger, tmp_path: Path) -> None:
    path = books.store.path
    books.store.close()
    books.store = Store.open(path, LEDGER)
    assert (await verdict_of(books, tmp_path)).findings == []


@pytest.mark.slow
async def test_a_projection_behind_is_compared_where_it_stands(books: GateLedger, tmp_path: Path) -> None:
    live = LiveProjection.look(books.store)
    at = books.store.position().seq
    await books.run(40)
    verdict = await verify(books.source, Options(tmp_path / "v"), live=live)
    assert verdict.findings == []
    assert verdict.events > at


async def test_a_difference_between_redis_and_the_events_is_found(books: GateLedger, tmp_path: Path) -> None:
    """G2: open holds; and the gate's own balances."""
    keys = books.keys[0]
    held_calls: Any = await books.redis.zrange(keys.holds, 0, 0)
    call = held_calls[0].decode()
    await books.redis.zrem(keys.holds, call)
    await books.redis.zadd(keys.holds, {"call-nobody": 1})
    tail = keys.tail(books.store.query("SELECT budget FROM budgets ORDER BY last_seq DESC LIMIT 1")[0]["budget"])
    newest: Any = await books.redis.lindex(tail, -1)
    entry_id, ds, dh, settled, held = newest.decode().split(" ")
    await books.redis.lset(tail, -1, f"{entry_id} {ds} {dh} {int(settled) + 1} {held}")
    findings = (await verdict_of(books, tmp_path)).findings
    assert {finding.kind for finding in findings} == {"hold"}
    problems = " ".join(finding.problem for finding in findings)
    assert call in problems
    assert "call-nobody" in problems
    assert f"{int(settled) + 1} settled" in problems
