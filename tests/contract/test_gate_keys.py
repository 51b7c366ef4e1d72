"""Keys of the gateway: created and revoked in one step with their event, each once."""

import json
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
from redis.asyncio import Redis

from tests.gate_bench import GateBench, open_bench
from tollbook.ledger.errors import IdempotencyConflict, KeyAlreadyRevoked, KeyTaken, KeyUnknown

HASH = "a" * 64
DAY_MS = 86_400_000


@pytest.fixture
async def bench(every_redis_client: Redis) -> AsyncIterator[GateBench]:
    async with open_bench(every_redis_client) as bench:
        yield bench


async def kept(bench: GateBench) -> dict[str, Any]:
    """What Redis has of the keys; values that are JSON are decoded."""
    found = await bench.gate.api_keys()
    return {name: json.loads(value) if value.startswith("{") else value for name, value in found.items()}


async def test_a_key_is_kept_as_its_event_has_it(bench: GateBench) -> None:
    assert await bench.create_key() == "created"
    (event,) = await bench.events()
    names = ("type", "user_id", "period", "call_id", "attempt", "amount", "committed")
    assert [event[name] for name in names] == ["key-created", "", "", "k", "0", "0", ""]
    payload = json.loads(event["payload"])
    assert payload == {
        "content_hash": "content", "key_id": "key-1", "hash": HASH, "author": "ops", "reason": "shop"
    }  # fmt: skip
    created_ms = (await bench.head()).entry.ms
    assert await kept(bench) == {HASH: {"created_ms": created_ms} | payload, "key-1": HASH}


async def test_a_key_is_created_once_and_a_repeat_finds_it(bench: GateBench) -> None:
    await bench.create_key()
    assert await bench.create_key() == "before"  # As after a reply that was lost.
    assert await bench.create_key("key-2", digest="b" * 64) == "other"
    with pytest.raises(IdempotencyConflict):
        await bench.create_key(content="other")
    assert len(await bench.events()) == 1
    assert sorted(await kept(bench)) == [HASH, "key-1"]


@pytest.mark.parametrize(("key_id", "digest"), [("key-1", "b" * 64), ("key-2", HASH)])
async def test_an_id_or_a_key_that_exists_is_refused(bench: GateBench, key_id: str, digest: str) -> None:
    await bench.create_key()
    before = await bench.everything()
    with pytest.raises(KeyTaken, match=f"{key_id} or its key is on the ledger already"):
        await bench.create_key(key_id, digest=digest, command="other")
    assert await bench.everything() == before


async def test_a_key_ends_by_the_clock_of_redis(bench: GateBench) -> None:
    await bench.create_key()
    revoked = await bench.revoke_key()
    event = (await bench.events())[-1]
    now_ms = (await bench.head()).entry.ms
    assert event["type"] == "key-revoked"
    assert now_ms - 1 <= revoked.at_ms <= now_ms
    assert (await kept(bench))[f"{HASH} revoked"] == json.loads(event["payload"])
    assert json.loads(event["payload"]) == {
        "at_ms": revoked.at_ms, "content_hash": "content", "key_id": "key-1", "author": "ops", "reason": "lost"
    }  # fmt: skip


async def test_a_later_revocation_can_be_moved_to_now_but_not_postponed(bench: GateBench) -> None:
    await bench.create_key()
    later = await bench.revoke_key(after_ms=DAY_MS)
    assert later.is_new
    again = await bench.revoke_key(after_ms=DAY_MS)
    assert (again.is_new, again.at_ms) == (False, later.at_ms)
    with pytest.raises(KeyAlreadyRevoked) as refused:
        await bench.revoke_key(command="later", after_ms=2 * DAY_MS)
    assert refused.value.at_ms == later.at_ms
    now = await bench.revoke_key(command="now")
    assert now.is_new
    assert later.at_ms - DAY_MS <= now.at_ms < later.at_ms
    with pytest.raises(KeyAlreadyRevoked):
        await bench.revoke_key(command="twice")
    with pytest.raises(IdempotencyConflict):
        await bench.revoke_key(content="other")
    assert [event["type"] for event in await bench.events()] == ["key-created", "key-revoked", "key-revoked"]
    assert (await kept(bench))[f"{HASH} revoked"]["at_ms"] == now.at_ms


async def test_a_key_that_nobody_created_cannot_be_revoked(bench: GateBench) -> None:
    before = await bench.everything()
    with pytest.raises(KeyUnknown, match="there is no key key-9"):
        await bench.revoke_key("key-9")
    assert await bench.everything() == before


@pytest.mark.parametrize(
    ("key_id", "digest"), [("key", HASH), ("key-x", HASH), ("key-1", "a" * 63), ("key-1", "A" * 64)]
)
async def test_a_malformed_key_is_a_programming_error(bench: GateBench, key_id: str, digest: str) -> None:
    before = await bench.everything()
    with pytest.raises(Exception, match="TOLLBOOK not a key"):
        await bench.create_key(key_id, digest=digest)
    assert await bench.everything() == before


async def test_a_field_of_the_wrong_type_changes_nothing(bench: GateBench) -> None:
    await cast("Any", bench.redis.set(bench.keys.api_keys, "no hash"))
    before = await bench.everything()
    for command in (bench.create_key, bench.revoke_key):
        with pytest.raises(Exception, match="WRONGTYPE"):
            await command()
    assert await bench.everything() == before
