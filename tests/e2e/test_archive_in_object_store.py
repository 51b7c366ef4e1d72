"""A system whose archive is in an object store: sealed, trimmed, proved, read by commands, and taken over elsewhere."""

import importlib.resources
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import duckdb
import pytest
from redis.asyncio import Redis

from tests.object_store import KEY, SECRET, ObjectStore
from tests.quick import first_quick
from tests.system import REPLIES, STREAMS, BackgroundCommand, Finished, RunningSystem, run_cli, running_system
from tollbook.consumers.sealers import build_sealers

TASK = {"task": "score_post", "prompt": "a post", "reply_to": REPLIES}
FIRST = "partition-0/000000000001-000000000040"


async def make_calls(running: RunningSystem, name: str, number: int) -> None:
    tasks = [{**TASK, "task_id": f"{name}{each}", "user_id": f"u{each % 3}"} for each in range(number)]
    await running.publish(STREAMS[0], tasks)
    assert {result.status for result in await running.answers(task["task_id"] for task in tasks)} == {"done"}
    await running.fold_all()


async def seal(running: RunningSystem) -> int:
    """Seal and trim as the projector does every few seconds."""
    runtime = running.system.runtime
    (sealer,) = build_sealers(runtime.settings, runtime.handle, lambda: running.system.projection.store)
    while await sealer.seal():
        pass
    return await sealer.trim()


def settings_of(bucket: ObjectStore) -> dict[str, Any]:
    return {
        "archive_url": bucket.url,
        "segment_events": 40,
        "stream_keep_s": 0,
        "stream_keep_events": 0,
        "publish_url": f"s3://{bucket.bucket}/books/tollbook.duckdb",
        "publish_every_s": 3600,
    }


@pytest.mark.slow
async def test_the_demo_writes_nothing_into_the_users_own_system(tmp_path: Path, bucket: ObjectStore) -> None:
    """The demo runs with the shell's settings, which may be those of a real system."""
    variables = {
        "TOLLBOOK_ARCHIVE_URL": bucket.url,
        "TOLLBOOK_SEGMENT_EVENTS": "100",
        "TOLLBOOK_PUBLISH_URL": f"{bucket.url}/tollbook.duckdb",
        "TOLLBOOK_MIN_REPLICAS": "1",
    }
    finished = await run_cli("demo", "--tasks", "100", cwd=tmp_path, env=variables, timeout_s=60)
    assert finished.code == 0, finished
    assert bucket.names() == []


@pytest.mark.slow
async def test_a_system_lives_with_its_archive_in_an_object_store(
    redis_client: Redis, server_url: str, tmp_path: Path, bucket: ObjectStore
) -> None:
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    for folder in (here, elsewhere):
        folder.mkdir()
    variables = {"REDIS_URL": server_url, "TOLLBOOK_ARCHIVE_URL": bucket.url}

    async def command(*arguments: str, cwd: Path = here, env: Mapping[str, str] = variables) -> Finished:
        finished = await run_cli(*arguments, cwd=cwd, env=env)
        assert SECRET not in finished.stdout + finished.stderr
        assert KEY not in finished.stdout + finished.stderr
        return finished

    async with running_system(here / "data", server_url, **settings_of(bucket)) as running:
        await make_calls(running, "a", 30)
        trimmed = await seal(running)
        assert trimmed >= 40
        await running.fold_all()
        assert running.system.projection._copy is not None
        await running.system.projection._copy.publish()

        for arguments in (("verify",), ("verify", "--archive", bucket.url)):
            proved = await command(*arguments)
            assert (proved.code, "nothing was found" in proved.stdout) == (0, True), proved
        compared = await command("replay", "--compare")
        assert compared.code == 0, compared
        audited = await command("audit", "user", "u1", "--json")
        assert (audited.code, "a1" in audited.stdout) == (0, True), audited
        found = {each["check"]: each for each in json.loads((await command("doctor", "--json")).stdout)}
        assert found["archive"]["state"] == "ok", found["archive"]
        lost = await command("recover")
        assert (lost.code, "every event that DuckDB and the archive have" in lost.stdout) == (0, True), lost
        partly = await command("recover", cwd=elsewhere)
        assert (partly.code, "only what is sealed in the archive was compared" in partly.stdout) == (0, True), partly
        assert "every event that the archive has" in partly.stdout, partly
    report = await command("report", "--archive", bucket.url, "--html", "report.html", cwd=elsewhere)
    assert report.code == 0, report
    assert f"Archive {bucket.url}/ alone: sealed events only" in report.stdout

    # A projector on another machine, with nothing but the store and the stream, takes over.
    async with running_system(elsewhere / "data", server_url, **settings_of(bucket)) as running:
        await running.fold_all()
        with duckdb.connect(str(here / "data" / "tollbook.duckdb"), read_only=True) as old_file:
            before = old_file.execute("SELECT count(*), sum(amount_usd) FROM events WHERE type = 'cost-recorded'")
            (row,) = await running.query(
                "SELECT count(*) AS n, sum(amount_usd) AS usd FROM events WHERE type = 'cost-recorded'"
            )
            assert tuple(row.values()) == before.fetchone()
        await make_calls(running, "b", 20)
        assert await seal(running) > trimmed
    assert not (here / "data" / "archive").exists()
    assert not (elsewhere / "data" / "archive").exists()

    # Analysts read what was published, and the segments, with DuckDB alone.
    with analyst(bucket) as connection:
        connection.execute(f"ATTACH 's3://{bucket.bucket}/books/tollbook.duckdb' AS books (READ_ONLY)")
        assert connection.execute("SELECT count(DISTINCT call_id) >= 30 FROM books.calls").fetchone() == (True,)
        # With `execute`: Python's `read_parquet` would block the store's thread in this process.
        sql = "SELECT min(seq), count(*) >= 40 FROM read_parquet(?)"
        assert connection.execute(sql, [f"{bucket.url}/partition-*/*.parquet"]).fetchone() == (1, True)

    content = bytearray(bucket.get(f"{FIRST}.parquet"))
    content[len(content) // 2] ^= 1
    bucket.put(f"{FIRST}.parquet", bytes(content))
    changed = await command("verify", "--archive", bucket.url)
    assert (changed.code, f"file: {FIRST}" in changed.stdout) == (1, True), changed
    replayed = await command("replay", "--archive", bucket.url, "--into", "new.duckdb")
    assert replayed.code != 0
    assert f"{bucket.url}/{FIRST}.parquet: is not the file that was sealed" in replayed.stderr
    bucket.delete(f"{FIRST}.parquet")
    replayed = await command("replay", "--archive", bucket.url, "--into", "new2.duckdb")
    assert f"{bucket.url}/{FIRST}.parquet: cannot be read (there is no such object)" in replayed.stderr
    assert (await command("verify", "--archive", bucket.url)).code == 1


def analyst(bucket: ObjectStore) -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect(config={"allow_unsigned_extensions": "true"})
    wheel = importlib.resources.files("duckdb_extension_httpfs")
    connection.execute(f"LOAD '{wheel.joinpath('extensions', f'v{duckdb.__version__}', 'httpfs.duckdb_extension')}'")
    host = bucket.server.url.removeprefix("http://")
    connection.execute(
        f"CREATE SECRET (TYPE s3, KEY_ID '{KEY}', SECRET '{SECRET}', REGION 'us-east-1', ENDPOINT '{host}', "
        "URL_STYLE 'path', USE_SSL false)"
    )
    return connection


@pytest.mark.slow
async def test_an_outage_of_the_store_stops_no_call(
    redis_client: Redis, server_url: str, tmp_path: Path, bucket: ObjectStore
) -> None:
    """G8 is about stores that decide: the archive does not, while everything is on the stream."""
    settings: dict[str, Any] = {**settings_of(bucket), "publish_url": None}
    async with running_system(tmp_path / "data", server_url, **settings) as running:
        bucket.server.fault = lambda *_: "503 SlowDown"
        await make_calls(running, "a", 8)
    # Started again, it finds the store still down.
    async with running_system(tmp_path / "data", server_url, **settings) as running:
        await make_calls(running, "b", 8)
        bucket.server.fault = lambda *_: None
        assert await seal(running) >= 40
    assert f"{FIRST}.json" in bucket.names()


@pytest.mark.parametrize(
    ("fault", "said"),
    first_quick(
        1, [("403 AccessDenied", "access is denied (AccessDenied)"), ("404 NoSuchBucket", "there is no bucket")]
    ),
)
async def test_a_projector_without_access_says_so_and_ends(
    redis_client: Redis, server_url: str, tmp_path: Path, bucket: ObjectStore, fault: str, said: str
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    bucket.server.fault = lambda *_: fault
    variables = {"REDIS_URL": server_url, "TOLLBOOK_ARCHIVE_URL": bucket.url}
    projector = await BackgroundCommand.start("projector", cwd=here, env=variables)
    try:
        assert await projector.wait() != 0
        assert said in projector.stderr
        assert "Traceback" not in projector.stderr
        assert SECRET not in projector.stderr + projector.stdout
    finally:
        await projector.end()
