"""The copy for analysts: a fault of it never ends the projector, whose end would stop calls."""

import asyncio
import contextlib
from pathlib import Path
from typing import cast

import pytest

from tests.servers import wait_until
from tollbook.consumers import published_copy
from tollbook.consumers.published_copy import PublishedCopy
from tollbook.ledger.archive.storage import ObjectStore
from tollbook.ledger.archive.storage_errors import ArchiveUnavailable
from tollbook.ledger.gate.requests import Position
from tollbook.schemas.identifiers import EntryId


class Store:
    """An object store that fails as it is told, then takes the file."""

    def __init__(self, *faults: Exception) -> None:
        self.faults = list(faults)
        self.stored: list[bytes] = []

    def located(self, name: str) -> str:
        return f"s3://books/{name}"

    def replace(self, _name: str, file: Path) -> None:
        if self.faults:
            raise self.faults.pop(0)
        self.stored.append(file.read_bytes())


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "t.duckdb"
    file.write_bytes(b"books")
    monkeypatch.setattr(published_copy, "snapshot_file", contextlib.nullcontext)
    return file


def copy_to(store: Store, path: Path, positions: dict[int, Position]) -> PublishedCopy:
    return PublishedCopy(path, cast("ObjectStore", store), "t.duckdb", every_s=0.0, positions=lambda: dict(positions))


@pytest.mark.parametrize(
    "fault",
    [ArchiveUnavailable("no answer"), OSError("disk full"), RuntimeError("a fault nobody foresaw")],
    ids=lambda fault: type(fault).__name__,
)
async def test_after_a_fault_the_next_interval_publishes(path: Path, fault: Exception) -> None:
    store = Store(fault)
    running = asyncio.create_task(copy_to(store, path, {0: Position(EntryId(1, 0), 1)}).run())
    try:
        await wait_until(lambda: store.stored or running.done(), what="a copy, or an end")
    finally:
        running.cancel()
        (ended,) = await asyncio.gather(running, return_exceptions=True)
    assert isinstance(ended, asyncio.CancelledError)
    assert store.stored == [b"books"]


async def test_a_copy_is_published_again_only_where_something_was_folded(path: Path) -> None:
    store, positions = Store(), {0: Position(EntryId(1, 0), 1)}
    copy = copy_to(store, path, positions)
    assert [await copy.publish(), await copy.publish()] == [True, False]
    positions[0] = Position(EntryId(2, 0), 2)
    assert await copy.publish()
    assert len(store.stored) == 2
