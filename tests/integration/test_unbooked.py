"""Charges that the ledger cannot take are noted where they survive it."""

import json
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from redis.asyncio import Redis

from tollbook.ledger.gate.requests import AttemptEvent
from tollbook.ledger.gate.unbooked import FOLDER, UnbookedCharge, forget_unbooked, note_unbooked, read_unbooked
from tollbook.ledger.keys import Keys
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.schemas.identifiers import EntryId

KEYS = Keys("bench", 0)
CHARGE = UnbookedCharge(
    ledger_id="ledger-1",
    partition=0,
    call_id="usage of an evening",
    hold=1,
    user_id="u",
    period="2026-11",
    budgets=("user:u:2026-11", "day:u:2026-11-24"),
    cost_nanousd=7,
    assumed_nanousd=2,
    attempt=3,
    payload='{"basis":"reported","outcome":"done","reason":"ü"}',
    events=(
        AttemptEvent(
            "model-called",
            3,
            '{"hold":1,"model":"m","outcome":"ok","latency_ms":1,"charge_nanousd":7,"charge_basis":"reported"}',
        ),
    ),
    seen=EntryId(1_732_412_345_678, 9),
    process="host-1-abc",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / FOLDER


@pytest.fixture
def file_in_the_way(folder: Path) -> Path:
    folder.write_text("a file where the folder should be")
    return folder


@pytest.fixture
def pipeline(redis_client: Redis) -> CommandPipeline:
    return CommandPipeline(redis_client)


async def read(pipeline: CommandPipeline | None, folder: Path | None) -> list[UnbookedCharge]:
    return await read_unbooked(pipeline, KEYS, ledger_id="ledger-1", folder=folder)


def modes_of(folder: Path) -> list[int]:
    """The permissions of a folder and of the files in it."""
    return [stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.iterdir())]


async def test_a_note_stands_in_redis_and_in_a_private_file_and_is_read_once(
    pipeline: CommandPipeline, folder: Path
) -> None:
    for _ in range(2):
        await note_unbooked(pipeline, KEYS, CHARGE, folder=folder)

    assert await read(pipeline, folder) == [CHARGE]
    assert await read(pipeline, None) == [CHARGE]
    assert await read(None, folder) == [CHARGE]
    assert modes_of(folder) == [0o700, 0o600]


async def test_the_file_survives_a_redis_that_was_restored(
    redis_client: Redis, pipeline: CommandPipeline, folder: Path
) -> None:
    await note_unbooked(pipeline, KEYS, CHARGE, folder=folder)
    await redis_client.flushall()

    assert await read(pipeline, folder) == [CHARGE]


async def test_a_forgotten_note_is_gone_from_both(pipeline: CommandPipeline, folder: Path) -> None:
    other = replace(CHARGE, hold=2)
    for charge in (CHARGE, other):
        await note_unbooked(pipeline, KEYS, charge, folder=folder)
    for _ in range(2):
        await forget_unbooked(pipeline, KEYS, CHARGE, folder=folder)

    assert await read(pipeline, folder) == [other]
    assert await read(None, folder) == [other]


async def test_a_program_without_a_data_directory_notes_in_redis_alone(
    pipeline: CommandPipeline, tmp_path: Path
) -> None:
    folder = tmp_path / "none" / FOLDER
    await note_unbooked(pipeline, KEYS, CHARGE, folder=folder)

    assert await read(pipeline, folder) == [CHARGE]
    assert not folder.parent.exists()


async def test_a_file_that_cannot_be_written_does_not_keep_the_note_out_of_redis(
    pipeline: CommandPipeline, file_in_the_way: Path
) -> None:
    await note_unbooked(pipeline, KEYS, CHARGE, folder=file_in_the_way)

    assert await read(pipeline, None) == [CHARGE]


async def test_notes_of_another_ledger_or_partition_and_what_is_no_note_are_left_out(
    redis_client: Redis, pipeline: CommandPipeline, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await note_unbooked(pipeline, KEYS, CHARGE, folder=folder)
    await note_unbooked(pipeline, KEYS, replace(CHARGE, ledger_id="ledger-2", hold=2), folder=folder)
    await note_unbooked(pipeline, Keys("bench", 1), replace(CHARGE, partition=1, hold=3), folder=folder)
    note = json.loads(await redis_client.hget(KEYS.unbooked, f"{CHARGE.call_id} 1") or b"")
    for field, value in {
        "text": "no note",
        "torn": json.dumps(note)[:-9],
        "list": "[]",
        "negative": json.dumps(note | {"cost_nanousd": -1, "hold": 4}),
        "missing": json.dumps({name: note[name] for name in note if name != "seen"}),
        b"\xff": b"\xfe",
        "too large": json.dumps(note | {"cost_nanousd": 10**19, "hold": 5}),
        "no cost's payload": json.dumps(note | {"payload": {"basis": "reported"}, "hold": 6}),
        "no attempt's payload": json.dumps(note | {"events": [["model-called", 1, {}]], "hold": 7}),
        "no attempt": json.dumps(note | {"events": [["credit-granted", 1, {}]], "hold": 8}),
        "another's budget": json.dumps(note | {"budgets": ["user:other:2026-11"], "hold": 9}),
        "no id": json.dumps(note | {"user_id": "u\n", "budgets": ["user:u\n:2026-11"], "hold": 10}),
    }.items():
        await redis_client.hset(KEYS.unbooked, field, value)

    assert await read(pipeline, folder) == [CHARGE]
