"""A DuckLake of copies: every sealed event once, and the archive unchanged whatever the lake does (G7)."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pytest

from tests.object_store import ObjectStore
from tests.report_data import load, make_archive
from tests.system import run_cli
from tollbook.ledger.archive import lake
from tollbook.ledger.archive.lake import CopiedCounts, LakeRefused, copy_segments, open_lake
from tollbook.ledger.archive.manifests import ArchiveDamaged, parquet_name
from tollbook.ledger.archive.segments import Archive, check_segment

CALLS = load(100, users=5)


def nobody(_segment: object) -> None: ...


def take(
    archive: Path, catalog: Path, files: str | None = None, report: Callable[[Any], None] = nobody
) -> CopiedCounts:
    with open_lake(catalog, files) as connection:
        return copy_segments(Archive(archive), connection, report)


def rows(catalog: Path, sql: str) -> list[Any]:
    with open_lake(catalog, None) as connection:
        return connection.execute(sql).fetchall()


def test_every_sealed_event_is_in_the_lake_once(tmp_path: Path) -> None:
    catalog = tmp_path / "books.ducklake"
    half = make_archive(tmp_path / "half", CALLS[:150], segment=50)
    assert take(half, catalog) == CopiedCounts(segments=3, events=150)
    assert take(half, catalog) == CopiedCounts()
    whole = make_archive(tmp_path / "whole", CALLS[:300], segment=50)
    seen: list[str] = []
    assert take(whole, catalog, report=lambda segment: seen.append(segment.stem)) == CopiedCounts(
        segments=3, events=150
    )
    assert [stem[-12:] for stem in seen] == [f"{last:012}" for last in (200, 250, 300)]
    sql = "SELECT count(*), count(DISTINCT seq), min(seq), max(seq) FROM lake.events"
    assert rows(catalog, sql) == [(300, 300, 1, 300)]
    sealed = duckdb.read_parquet(f"{whole}/*/*.parquet").order("seq").project("seq, id, payload").fetchall()
    assert rows(catalog, "SELECT seq, id, payload FROM lake.events ORDER BY seq") == sealed


def test_a_lake_never_changes_the_archives_files(tmp_path: Path) -> None:
    """Files that are registered are the lake's own, and these functions remove them."""
    archive, catalog = make_archive(tmp_path / "archive", CALLS[:300], segment=20), tmp_path / "books.ducklake"
    take(archive, catalog)
    with open_lake(catalog, None) as connection:
        connection.execute("CALL ducklake_merge_adjacent_files('lake')")
        connection.execute("CALL ducklake_expire_snapshots('lake', older_than => now()::TIMESTAMP + INTERVAL 1 DAY)")
        connection.execute("CALL ducklake_cleanup_old_files('lake', cleanup_all => true)")
        assert connection.execute("SELECT count(*) FROM lake.events").fetchone() == (300,)
    segments = Archive(archive).segments(0)
    assert len(segments) == 15
    for segment in segments:
        check_segment(segment)


@pytest.mark.slow
def test_a_run_that_ended_in_between_is_repeated_without_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive, catalog = make_archive(tmp_path / "archive", CALLS[:150], segment=50), tmp_path / "books.ducklake"

    def end(_segment: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        take(archive, catalog, report=end)
    assert take(archive, catalog) == CopiedCounts(segments=2, events=100)
    assert rows(catalog, "SELECT count(*), count(DISTINCT seq) FROM lake.events") == [(150, 150)]


@pytest.mark.slow
def test_another_history_of_the_ledger_is_refused(tmp_path: Path) -> None:
    catalog = tmp_path / "books.ducklake"
    take(make_archive(tmp_path / "archive", CALLS[:100], segment=50), catalog)
    # The same ledger, restored to before its second segment, and gone on otherwise.
    other = make_archive(tmp_path / "other", [*CALLS[:50], *load(100, users=6)[50:150]], segment=50)
    with pytest.raises(LakeRefused, match="another history"):
        take(other, catalog)
    assert rows(catalog, "SELECT count(*) FROM lake.events") == [(100,)]


def test_another_ledger_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = tmp_path / "books.ducklake"
    take(make_archive(tmp_path / "archive", CALLS[:50], segment=50), catalog)
    monkeypatch.setattr("tests.report_data.LEDGER", "another")
    other = make_archive(tmp_path / "other", CALLS[:50], segment=50)
    with pytest.raises(LakeRefused, match="name another catalogue"):
        take(other, catalog)


@pytest.mark.slow
def test_a_changed_segment_is_not_copied(tmp_path: Path) -> None:
    archive, catalog = make_archive(tmp_path / "archive", CALLS[:100], segment=50), tmp_path / "books.ducklake"
    file = archive / parquet_name(Archive(archive).segments(0)[1].stem)
    file.chmod(0o600)
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(ArchiveDamaged, match="is not the file that was sealed"):
        take(archive, catalog)
    assert rows(catalog, "SELECT max(seq) FROM lake.events") == [(50,)]


@pytest.mark.slow
async def test_the_command_copies_and_repeats(tmp_path: Path) -> None:
    archive = make_archive(tmp_path / "archive", CALLS[:100], segment=50)
    first = await run_cli("lake", "it's.ducklake", "--archive", str(archive), cwd=tmp_path)
    assert (first.code, first.stdout.splitlines()[-1]) == (0, "copied into it's.ducklake: segments 2, events 100")
    again = await run_cli("lake", "it's.ducklake", "--archive", str(archive), "--json", cwd=tmp_path)
    assert (again.code, json.loads(again.stdout)) == (0, {"segments": 0, "events": 0})


async def test_a_file_that_is_not_a_lake_is_refused_in_one_line(tmp_path: Path) -> None:
    archive = make_archive(tmp_path / "archive", CALLS[:50], segment=50)
    (tmp_path / "text.ducklake").write_text("no database", encoding="utf-8")
    refused = await run_cli("lake", "text.ducklake", "--archive", str(archive), cwd=tmp_path)
    assert (refused.code, refused.stdout) == (1, "")
    assert "the lake text.ducklake cannot be opened: " in refused.stderr
    assert (tmp_path / "text.ducklake").read_text(encoding="utf-8") == "no database"


def test_an_extension_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_name: str) -> Path:
        raise ModuleNotFoundError

    monkeypatch.setattr(lake.importlib.resources, "files", missing)
    with pytest.raises(LakeRefused, match=r"pip install 'tollbook\[lake\]'"), open_lake(tmp_path / "x", None):
        pass


@pytest.mark.slow
async def test_the_files_may_be_in_an_object_store(tmp_path: Path, bucket: ObjectStore) -> None:
    """In a process of its own: DuckDB keeps this one's store from answering."""
    archive = make_archive(tmp_path / "archive", CALLS[:100], segment=50)
    options = ("--archive", str(archive), "--files", f"s3://{bucket.bucket}/lake")
    first = await run_cli("lake", "books.ducklake", *options, cwd=tmp_path, env=bucket.variables)
    assert first.code == 0, first.stderr
    assert [name for name in bucket.names() if name.startswith("lake/")]
    shutil.rmtree(archive)
    make_archive(archive, CALLS[:150], segment=50)
    second = await run_cli("lake", "books.ducklake", *options[:2], cwd=tmp_path, env=bucket.variables)
    assert "segments 1, events 50" in second.stdout, second.stderr
