"""`verify` finds forged recoveries: a declared loss that did not happen (G7), a charge entered twice (G2)."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
from redis.asyncio import Redis

from tests.recovery.test_recover import Restored, charge, die_at, lost_calls, request
from tollbook.audit.verification.findings import Finding
from tollbook.audit.verification.verification import Options, verify
from tollbook.ledger.gate.requests import EMPTY_BASELINE
from tollbook.schemas.events import ENVELOPE_FIELDS

Payload = dict[str, Any]
Change = Callable[[Payload, list[str]], Payload]
"""Forges the payload of a declaration; the list has the ids of the ledger's events."""


def with_(**values: Any) -> Change:
    return lambda payload, _: payload | values


def without(*names: str) -> Change:
    return lambda payload, _: {name: value for name, value in payload.items() if name not in names}


def later(entry_id: str, n: int) -> str:
    ms, _, seq = entry_id.partition("-")
    return f"{ms}-{int(seq) + n}"


FORGED_BESIDE_NEWER: Final[dict[str, Change]] = {
    "what cannot be read": without("first_id"),
    "no ids": with_(first_id="a", last_id="b"),
    "the wrong way round": lambda payload, _: payload | {
        "first_id": payload["last_id"], "last_id": payload["first_id"],
    },
    "fewer than there are": with_(events=1),
    "more than there are": lambda payload, _: payload | {"last_id": later(payload["first_id"], 1), "events": 9},
    "after an event that is not there": with_(after_id="1-0"),
    "an event that stands": lambda payload, ids: payload | {
        "after_id": ids[0], "first_id": ids[1], "last_id": ids[1], "events": 1, "entered": 0, "entered_nanousd": 0,
    },
    "an event that stands, and where is not said": lambda payload, ids: {
        name: value for name, value in payload.items() if name != "after_id"
    } | {"first_id": ids[1], "last_id": ids[1], "events": 1, "entered": 0, "entered_nanousd": 0},
    "more entered": lambda payload, _: payload | {"entered": payload["entered"] + 1},
    "at another cost": lambda payload, _: payload | {"entered_nanousd": payload["entered_nanousd"] - 1},
    "restored": lambda payload, _: payload | {
        "restored": payload["events"], "entered": 0, "entered_nanousd": 0, "lost_holds": 0, "lost_held_nanousd": 0,
    },
    "held by no hold": with_(lost_holds=0),
}  # fmt: skip
FORGED_RESTORED: Final[dict[str, Change]] = {
    "some restored": with_(restored=1),
    "entered too": with_(entered=1, entered_nanousd=700),
    "one more": lambda payload, _: payload | {"events": payload["events"] + 1, "restored": payload["restored"] + 1},
    "from the one before on": lambda payload, ids: payload | {"first_id": ids[0]},
    "lost for good": with_(restored=0),
    "lost for good, and where is not said": lambda payload, _: {
        name: value for name, value in payload.items() if name not in ("after_id", "restored")
    },
}  # fmt: skip


async def findings_of(restored: Restored, directory: Path) -> list[Finding]:
    """What is found on the ledger alone, whatever DuckDB has."""
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        return (await verify(restored.made.source, Options(Path(folder)))).findings


async def entries_of(restored: Restored) -> list[tuple[str, dict[Any, Any]]]:
    entries: Any = await restored.redis.xrange(restored.made.keys[0].ledger)
    return [(entry_id.decode(), fields) for entry_id, fields in entries]


async def forge(restored: Restored, change: Change) -> str:
    """Change the declaration on the stream; return its id."""
    entries = await entries_of(restored)
    (at,) = [n for n, (_, fields) in enumerate(entries) if fields[b"type"] == b"ledger-recovered"]
    ids, payload = [entry_id for entry_id, _ in entries], json.loads(entries[at][1][b"payload"])
    entries[at][1][b"payload"] = json.dumps(change(payload, ids)).encode()
    await restored.redis.delete(restored.made.keys[0].ledger)
    for entry_id, fields in entries:
        await restored.redis.xadd(restored.made.keys[0].ledger, dict(fields), id=entry_id)
    return ids[at]


async def check_forged(restored: Restored, directory: Path, forgeries: dict[str, Change]) -> None:
    (true,) = [fields for _, fields in await entries_of(restored) if fields[b"type"] == b"ledger-recovered"]
    payload = json.loads(true[b"payload"])
    assert await findings_of(restored, directory) == []
    for name, change in forgeries.items():
        entry_id = await forge(restored, change)
        found = await findings_of(restored, directory)
        assert [(finding.kind, finding.event_id) for finding in found] == [("recovery", entry_id)], (name, found)
        await forge(restored, with_only(payload))
    await forge(restored, without("after_id"))
    assert await findings_of(restored, directory) == [], "as an earlier program has written it"


def with_only(payload: Payload) -> Change:
    return lambda _, __: payload


@pytest.mark.slow
async def test_a_forged_declaration_beside_newer_events_is_found(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    async with lost_calls(redis_client, server_url, tmp_path) as restored:
        await restored.gate("u1").reserve(request("newer"), [EMPTY_BASELINE])
        await restored.recover()
        await check_forged(restored, tmp_path, FORGED_BESIDE_NEWER)


@pytest.mark.slow
async def test_a_forged_declaration_of_restored_events_is_found(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    async with lost_calls(redis_client, server_url, tmp_path) as restored:
        await restored.recover()
        await check_forged(restored, tmp_path, FORGED_RESTORED)


@pytest.mark.slow
async def test_a_declaration_without_a_loss_or_a_repeated_one_is_found(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    async with lost_calls(redis_client, server_url, tmp_path) as restored:
        await restored.gate("u1").reserve(request("newer"), [EMPTY_BASELINE])
        await restored.recover()
        again = dict((await entries_of(restored))[-1][1])
        assert again[b"type"] == b"ledger-recovered"
        again[b"seq"] = str(int(again[b"seq"]) + 1).encode()
        assert {name.decode() for name in again} == set(ENVELOPE_FIELDS)
        entry_id: Any = await redis_client.xadd(restored.made.keys[0].ledger, dict(again))
        (finding,) = await findings_of(restored, tmp_path)
        assert (finding.kind, finding.event_id) == ("recovery", entry_id.decode())
        assert "earlier event has declared" in finding.problem


async def test_a_charge_that_enters_an_event_again_that_was_not_lost_is_found(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    async with lost_calls(redis_client, server_url, tmp_path) as restored:
        await restored.recover()
        lost_id = (await entries_of(restored))[0][0]
        await charge(restored.gate("u1"), "again", 5)
        entries = await entries_of(restored)
        entry_id, fields = entries[-1]
        payload = json.loads(fields[b"payload"]) | {"recovered_id": lost_id}
        await redis_client.xdel(restored.made.keys[0].ledger, entry_id)
        changed = dict(fields) | {b"payload": json.dumps(payload).encode()}
        await redis_client.xadd(restored.made.keys[0].ledger, changed, id=later(entry_id, 1))
        found = await findings_of(restored, tmp_path)
        assert [finding.event_id for finding in found if finding.kind == "recovery"] == [later(entry_id, 1)]


@pytest.mark.slow
async def test_a_resumed_run_declares_all_charges_that_were_entered(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    async with lost_calls(redis_client, server_url, tmp_path) as restored:
        await restored.gate("u1").reserve(request("newer"), [EMPTY_BASELINE])
        writes = 0
        for writes in range(20):
            entered = [fields for _, fields in await entries_of(restored) if b'"recovered_id"' in fields[b"payload"]]
            if len(entered) == 1:
                break
            assert await die_at(restored, writes)
        assert 0 < writes < 19
        await restored.recover()
        declared = json.loads((await entries_of(restored))[-1][1][b"payload"])
        assert (declared["entered"], declared["entered_nanousd"]) == (2, 700 + 600)
        assert await findings_of(restored, tmp_path) == []
