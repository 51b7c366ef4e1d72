"""The endpoint file: whole, private, and believed only while its writer lives."""

import os
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tollbook.ledger.server.endpoint import Endpoint, EndpointError, clear_endpoint, read_endpoint, write_endpoint


def endpoint(*, pid: int | None = None, started_at: datetime | None = None) -> Endpoint:
    return Endpoint(
        redis_url="redis://:secret@127.0.0.1:6390/0",
        namespace="tollbook",
        provider_url="http://127.0.0.1:8787/api/v1",
        pid=pid or os.getpid(),
        started_at=started_at or datetime.now(UTC),
    )


def test_what_was_written_is_read(tmp_path: Path) -> None:
    written = endpoint()
    write_endpoint(tmp_path / "new", written)
    assert read_endpoint(tmp_path / "new") == written


def test_a_later_endpoint_replaces_an_earlier_one(tmp_path: Path) -> None:
    write_endpoint(tmp_path, endpoint())
    later = endpoint(started_at=datetime.now(UTC) + timedelta(seconds=1))
    write_endpoint(tmp_path, later)
    assert read_endpoint(tmp_path) == later


def test_only_the_owner_may_read_the_file_and_no_draft_stays(tmp_path: Path) -> None:
    write_endpoint(tmp_path, endpoint())
    (file,) = tmp_path.iterdir()
    assert file.name == "endpoint.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize("data_dir", ["empty", "missing", "a-file"])
def test_no_endpoint_where_there_is_no_file(tmp_path: Path, data_dir: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a-file").write_text("")
    assert read_endpoint(tmp_path / data_dir) is None


def test_no_endpoint_where_the_process_has_ended(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    write_endpoint(tmp_path, endpoint(pid=ended.pid))
    assert read_endpoint(tmp_path) is None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells when a process began")
def test_no_endpoint_where_the_pid_belongs_to_a_later_process(tmp_path: Path) -> None:
    write_endpoint(tmp_path, endpoint(started_at=datetime.now(UTC) - timedelta(days=1)))
    assert read_endpoint(tmp_path) is None


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"redis_url": "redis://:secret@h", "pid": "secret"}'])
def test_a_damaged_file_is_an_error_that_tells_no_secret(tmp_path: Path, content: str) -> None:
    (tmp_path / "endpoint.json").write_text(content)
    with pytest.raises(EndpointError, match=r"endpoint\.json is damaged .*remove it and start") as caught:
        read_endpoint(tmp_path)
    assert "secret" not in str(caught.value)


def test_a_field_of_a_later_version_is_ignored(tmp_path: Path) -> None:
    written = endpoint()
    document = written.model_dump_json().replace("{", '{"colour": "green", ', 1)
    (tmp_path / "endpoint.json").write_text(document)
    assert read_endpoint(tmp_path) == written


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a-file").write_text("")
    with pytest.raises(EndpointError, match="cannot be written"):
        write_endpoint(tmp_path / "a-file", endpoint())


def test_a_cleared_endpoint_is_absent(tmp_path: Path) -> None:
    write_endpoint(tmp_path, endpoint())
    clear_endpoint(tmp_path)
    assert read_endpoint(tmp_path) is None
    clear_endpoint(tmp_path)


def test_the_endpoint_of_another_process_is_not_cleared(tmp_path: Path) -> None:
    parent = endpoint(pid=os.getppid())
    write_endpoint(tmp_path, parent)
    clear_endpoint(tmp_path)
    assert read_endpoint(tmp_path) == parent


def test_the_password_in_the_url_is_not_shown() -> None:
    assert "secret" not in repr(endpoint())
