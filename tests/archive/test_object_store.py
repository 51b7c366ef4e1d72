"""An archive in an object store that fails: nothing is lost or trimmed, and a line says what is wrong (G7, G8, G10)."""

import asyncio
import contextlib
import logging
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from redis.asyncio import Redis

from tests.archive.test_sealing import KEYS, LEDGER, NEVER, Archiving, seal_all
from tests.object_store import KEY, SECRET, Fault, ObjectStore, file_with
from tests.quick import first_quick
from tollbook.audit.reader import AuditReader, Selection
from tollbook.ledger.archive import chain
from tollbook.ledger.archive.history import LedgerSource
from tollbook.ledger.archive.manifests import ArchiveDamaged
from tollbook.ledger.archive.replay import rebuild
from tollbook.ledger.archive.sealing import SealingSettings
from tollbook.ledger.archive.segments import Archive, check_segment
from tollbook.ledger.archive.storage import open_storage
from tollbook.ledger.archive.storage_errors import ArchiveRefused, ArchiveUnavailable
from tollbook.ledger.projection.comparison import compare
from tollbook.schemas.identifiers import ZERO_ENTRY

FIRST = "partition-0/000000000001-000000000050"
SECOND = "partition-0/000000000051-000000000100"


@pytest.fixture
async def archiving(redis_client: Redis, tmp_path: Path, bucket: ObjectStore) -> AsyncIterator[Archiving]:
    made = Archiving(redis_client, tmp_path)
    made.archive = Archive(bucket.storage())
    await made.fill(120)
    yield made
    made.store.close()
    await made.pipeline.aclose()


def for_first(number: int, fault: str, *, method: str, ending: str = "") -> Fault:
    """Return a fault of the first requests of a kind."""
    left = [fault] * number

    def decide(asked: str, path: str) -> str | None:
        return left.pop() if left and asked == method and path.endswith(ending) else None

    return decide


def always(fault: str, *, method: str, ending: str = "") -> Fault:
    return lambda asked, path: fault if asked == method and path.endswith(ending) else None


async def test_a_ledger_is_sealed_trimmed_and_replayed_from_an_object_store(
    archiving: Archiving, tmp_path: Path, bucket: ObjectStore
) -> None:
    sealer = archiving.sealer()
    assert await seal_all(sealer) == 2
    await archiving.fold()
    assert await sealer.trim() == 100
    assert bucket.names() == sorted(f"{stem}.{ending}" for stem in (FIRST, SECOND) for ending in ("json", "parquet"))
    rebuilt = await rebuild(archiving.redis, [KEYS], LEDGER, tmp_path / "r.duckdb", archive=Archive(bucket.storage()))
    assert compare(archiving.store, rebuilt) == []
    rebuilt.close()


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["parquet", "json"])
@pytest.mark.parametrize("fault", first_quick(1, ["lost", "503 SlowDown", "500 InternalError"]))
async def test_a_request_that_fails_once_is_repeated(
    archiving: Archiving, bucket: ObjectStore, fault: str, ending: str
) -> None:
    """A write whose answer is lost is repeated, and finds its own object."""
    bucket.server.fault = for_first(1, fault, method="PUT", ending=ending)
    assert await seal_all(archiving.sealer()) == 2
    for segment in Archive(bucket.storage()).segments(0):
        check_segment(segment)


@pytest.mark.slow
@pytest.mark.parametrize("ending", first_quick(1, ["parquet", "json"]))
async def test_a_store_that_is_down_postpones_sealing_until_the_next_pass(
    archiving: Archiving, bucket: ObjectStore, ending: str
) -> None:
    sealer = archiving.sealer()
    bucket.server.fault = always("503 SlowDown", method="PUT", ending=ending)
    with pytest.raises(ArchiveUnavailable, match=r"127\.0\.0\.1 cannot serve now \(SlowDown, status 503\)"):
        await sealer.seal()
    length = await archiving.length()
    assert await sealer.trim() == 0
    assert await archiving.length() == length
    bucket.server.fault = lambda *_: None
    assert await seal_all(sealer) == 2
    assert await sealer.trim() == 100
    assert {name.rpartition(".")[0] for name in bucket.names()} == {FIRST, SECOND}


@pytest.mark.slow
@pytest.mark.parametrize("is_restarted", first_quick(1, [False, True]))
async def test_a_segment_that_was_begun_is_finished_as_it_was_begun(
    archiving: Archiving, bucket: ObjectStore, is_restarted: bool
) -> None:
    """More events have become due meanwhile: the same events must not be sealed under two names."""
    sealer = archiving.sealer()
    bucket.server.fault = always("503 SlowDown", method="PUT", ending="json")
    with pytest.raises(ArchiveUnavailable):
        await sealer.seal()
    assert bucket.names() == [f"{FIRST}.parquet"]
    bucket.server.fault = lambda *_: None
    if is_restarted:
        sealer = archiving.sealer(archive=Archive(bucket.storage()))
    sealer._settings = SealingSettings(segment_events=80, segment_age_s=NEVER, keep_s=0, keep_events=0)
    assert await sealer.seal()
    assert bucket.names() == [f"{FIRST}.json", f"{FIRST}.parquet"]


@pytest.mark.slow
async def test_a_file_of_the_same_events_in_other_bytes_is_taken_as_it_is(
    archiving: Archiving, bucket: ObjectStore, tmp_path: Path
) -> None:
    """A projector with another release of Arrow began the segment: its file may not be replaced under it."""
    sealer = archiving.sealer()
    bucket.server.fault = always("503 SlowDown", method="PUT", ending="json")
    with pytest.raises(ArchiveUnavailable):
        await sealer.seal()
    bucket.server.fault = lambda *_: None
    with bucket.storage().file(f"{FIRST}.parquet") as path:
        pq.write_table(pq.read_table(path, partitioning=None), tmp_path / "other", compression="snappy")
    bucket.put(f"{FIRST}.parquet", (tmp_path / "other").read_bytes())
    assert await sealer.seal()
    (segment,) = Archive(bucket.storage()).segments(0)
    check_segment(segment)
    assert bucket.get(f"{FIRST}.parquet") == (tmp_path / "other").read_bytes()


async def test_a_file_of_other_events_is_neither_replaced_nor_trimmed(
    archiving: Archiving, bucket: ObjectStore
) -> None:
    foreign = Archive(bucket.storage()).write(
        (await archiving.sealer()._read(ZERO_ENTRY, 50)), ledger_id="other", partition=0, head=chain.genesis("other", 0)
    )
    bucket.delete(f"{foreign.stem}.json")
    content = bucket.get(f"{FIRST}.parquet")
    sealer = archiving.sealer()
    with pytest.raises(ArchiveDamaged, match=f"{FIRST}.parquet: was written before and is not what the ledger has now"):
        await sealer.seal()
    assert await sealer.trim() == 0
    assert (bucket.names(), bucket.get(f"{FIRST}.parquet")) == ([f"{FIRST}.parquet"], content)


@pytest.mark.parametrize("table", [None, {"seq": []}, {"name": ["another program's"]}], ids=["no", "empty", "other"])
async def test_a_file_of_another_program_is_named_as_one_of_other_events(
    archiving: Archiving, bucket: ObjectStore, tmp_path: Path, table: dict[str, list[str]] | None
) -> None:
    path = file_with(tmp_path, b"hello")
    if table is not None:
        pq.write_table(pa.table(table), path)
    bucket.put(f"{FIRST}.parquet", path.read_bytes())
    with pytest.raises(ArchiveDamaged, match=f"{FIRST}.parquet: was written before and is not what the ledger has now"):
        await archiving.sealer().seal()
    assert (bucket.names(), bucket.get(f"{FIRST}.parquet")) == ([f"{FIRST}.parquet"], path.read_bytes())


async def test_a_changed_or_missing_object_is_named_and_nothing_is_trimmed(
    archiving: Archiving, bucket: ObjectStore
) -> None:
    sealer = archiving.sealer()
    await seal_all(sealer)
    content = bytearray(bucket.get(f"{FIRST}.parquet"))
    content[len(content) // 2] ^= 1
    bucket.put(f"{FIRST}.parquet", bytes(content))
    with pytest.raises(ArchiveDamaged, match=f"{bucket.url}/{FIRST}.parquet: is not the file that was sealed"):
        await sealer.trim()
    bucket.delete(f"{FIRST}.parquet")
    with pytest.raises(ArchiveDamaged, match=f"{bucket.url}/{FIRST}.parquet: cannot be read .there is no such object"):
        await sealer.trim()


@pytest.mark.parametrize("is_missing", [False, True])
async def test_an_audit_names_the_object_that_it_cannot_read(
    archiving: Archiving, bucket: ObjectStore, is_missing: bool
) -> None:
    """Not the copy on this machine, which is gone when the message is read."""
    await seal_all(archiving.sealer())
    half = bucket.get(f"{SECOND}.parquet")[:5_000]
    bucket.delete(f"{SECOND}.parquet")
    if not is_missing:
        bucket.put(f"{SECOND}.parquet", half)
    reader = AuditReader(LedgerSource.of_archive(Archive(bucket.storage())))
    named = f"^{bucket.url}/{SECOND}.parquet: cannot be read "
    with contextlib.closing(reader), pytest.raises(ArchiveDamaged, match=named) as refused:
        await reader.events(Selection())
    assert tempfile.gettempdir() not in str(refused.value)


@pytest.mark.slow
async def test_the_store_is_not_asked_while_the_oldest_segment_stays(archiving: Archiving, bucket: ObjectStore) -> None:
    sealer = archiving.sealer(SealingSettings(segment_events=50, segment_age_s=NEVER, keep_s=10**9, keep_events=10**9))
    await seal_all(sealer)
    assert await sealer.trim() == 0
    bucket.server.requests.clear()
    assert await sealer.trim() == 0
    assert bucket.server.requests == []


@pytest.mark.slow
async def test_a_body_that_breaks_off_is_read_again(archiving: Archiving, bucket: ObjectStore) -> None:
    await seal_all(archiving.sealer())
    bucket.server.fault = for_first(1, "broken", method="GET", ending="parquet")
    for segment in Archive(bucket.storage()).segments(0):
        check_segment(segment)
    bucket.server.fault = always("broken", method="GET", ending="parquet")
    with pytest.raises(ArchiveUnavailable, match="did not answer"):
        check_segment(Archive(bucket.storage()).segments(0)[0])


async def test_a_store_without_conditional_writes_is_refused_before_anything_is_trimmed(
    archiving: Archiving, bucket: ObjectStore
) -> None:
    storage = bucket.storage()
    put = storage._client.put_object
    storage._client.put_object = lambda **given: put(**{k: v for k, v in given.items() if k != "IfNoneMatch"})
    sealer = archiving.sealer(archive=Archive(storage))
    with pytest.raises(ArchiveRefused, match="replaces objects in spite of If-None-Match"):
        await sealer.seal()
    assert await sealer.trim() == 0


@pytest.mark.slow
async def test_the_sealer_waits_for_a_store_and_goes_on(archiving: Archiving, bucket: ObjectStore) -> None:
    settings = SealingSettings(segment_events=50, segment_age_s=NEVER, keep_s=0, keep_events=0, every_s=0.01)
    sealer = archiving.sealer(settings)
    denied = asyncio.Event()
    loop = asyncio.get_running_loop()

    def deny(method: str, path: str) -> str | None:
        if method == "PUT":
            loop.call_soon_threadsafe(denied.set)
            return "403 AccessDenied"
        return None

    bucket.server.fault = deny
    running = asyncio.create_task(sealer.run())
    try:
        async with asyncio.timeout(60):
            await denied.wait()
            assert not running.done()
            bucket.server.fault = lambda *_: None
            while not any(name.endswith("100.json") for name in await asyncio.to_thread(bucket.names)):
                assert not running.done()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("403 AccessDenied", "access is denied (AccessDenied): check the credentials"),
        ("403 AccessDenied", "that they may list, get and put there, for `recover` also delete"),
        ("403 InvalidAccessKeyId", "access is denied (InvalidAccessKeyId)"),
        ("400 ExpiredToken", "refuses the request (ExpiredToken, status 400)"),
        ("400 ExpiredToken", "the session has ended: get new credentials"),
        (
            "403 RequestTimeTooSkewed",
            "(RequestTimeTooSkewed): this machine's clock is not the store's",
        ),
        ("301 PermanentRedirect", "127.0.0.1 sends requests to another address (status 301): set AWS_ENDPOINT_URL to"),
        ("302 Found", "127.0.0.1 sends requests to another address (status 302)"),
        ("307 TemporaryRedirect", "127.0.0.1 sends requests to another address (status 307)"),
        ("308 Moved", "127.0.0.1 sends requests to another address (status 308)"),
        ("404 NoSuchBucket", "there is no bucket tests-"),
        ("400 IllegalLocationConstraintException", "is in another region: set AWS_REGION"),
        ("501 NotImplemented", "does not support the request (NotImplemented)"),
        ("503 SlowDown", "cannot serve now (SlowDown, status 503)"),
    ],
)
def test_errors_of_a_store_have_our_own_words(bucket: ObjectStore, fault: str, said: str) -> None:
    """G10: the store's own words may hold a key."""
    storage = bucket.storage()
    bucket.server.fault = lambda *_: fault
    with pytest.raises((ArchiveRefused, ArchiveUnavailable)) as refused:
        storage.names()
    assert said in str(refused.value)
    assert KEY not in str(refused.value)


def test_missing_credentials_are_reported_in_one_line(bucket: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(ArchiveRefused, match="no AWS credentials were found"):
        bucket.storage().names()


def test_a_server_that_is_not_there_is_named_without_the_password_in_its_address(
    bucket: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://user:word-of-the-tests@127.0.0.1:1")
    with pytest.raises(ArchiveUnavailable, match=r"127\.0\.0\.1 did not answer") as refused:
        bucket.storage().names()
    assert "word-of-the-tests" not in str(refused.value)


def test_no_log_has_a_key_or_a_signature(bucket: ObjectStore, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with bucket.storage().creating("partition-0/a.json") as draft:
        draft.write_text("{}")
    assert not [each for each in caplog.messages if KEY in each or SECRET in each or "Signature" in each]


def test_without_the_extra_a_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "botocore.session", None)
    monkeypatch.delitem(sys.modules, "tollbook.ledger.archive.s3", raising=False)
    with pytest.raises(ArchiveRefused, match=r"pip install 'tollbook\[s3\]'"):
        open_storage("s3://bucket/books")


@pytest.mark.parametrize(
    "address", ["s3://", "s3://B", "s3://key:secret@bucket/x", "s3://bucket/a b", "s3://bucket/x?y"]
)
def test_a_malformed_address_is_refused_without_being_shown(address: str) -> None:
    with pytest.raises(ArchiveRefused, match="must be an address such as s3://bucket/prefix") as refused:
        open_storage(address)
    assert "secret" not in str(refused.value)
