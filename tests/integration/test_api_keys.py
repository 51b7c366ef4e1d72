"""Keys of the gateway on a ledger: found, ended and replaced; the keys themselves are nowhere (G10)."""

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, Final

import pytest
import structlog
from redis.asyncio import Redis

from tests.calling import Calling, open_calling
from tests.proxy import FaultyProxy
from tollbook.inference.administration import Administration
from tollbook.inference.api_keys import SECRET_BYTES, ApiKey, ApiKeys, hash_of, secret_of
from tollbook.inference.key_changes import KeyBounds, KeyChanges
from tollbook.ledger.archive.replay import rebuild
from tollbook.ledger.errors import (
    IdempotencyConflict,
    KeyAlreadyRevoked,
    KeyExpired,
    KeyUnknown,
    LedgerUnavailable,
)
from tollbook.ledger.projection.comparison import compare
from tollbook.ledger.server.connection import connect
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.ledger.signature import Signature
from tollbook.schemas.identifiers import is_hashed_id

ME: Final = Signature("ann", "the shop")
DAY_MS: Final = 86_400_000
BOUNDS: Final = KeyBounds(
    name="shop", user_id="u42", plan="growth", campaign_id="spring", tags={"team": "red"}, models=("generate_draft",),
    streams=("generation",), allows=frozenset({"tags", "plan"}),
)  # fmt: skip


class Clock:
    """A clock in seconds that stands still until it is set forward."""

    now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
async def calling(redis_client: Redis, server_url: str, tmp_path: Path) -> AsyncGenerator[Calling]:
    async with open_calling(server_url, tmp_path) as calling:
        yield calling


@pytest.fixture
def changes(calling: Calling) -> KeyChanges:
    return changes_of(calling)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def keys(calling: Calling, clock: Clock) -> ApiKeys:
    handle = calling.runtime.handle
    return ApiKeys(handle.pipeline, handle.keys[0], monotonic=clock)


def changes_of(calling: Calling) -> KeyChanges:
    return Administration(calling.runtime.ledger, calling.runtime.policies, calling.runtime.user_ids).keys


async def created(changes: KeyChanges, **bounds: Any) -> tuple[str, str]:
    """Create a key; return it and its id."""
    values: dict[str, Any] = {"user_id": "u42"} | bounds
    done = await changes.create(KeyBounds(**values), ME)
    assert done.secret is not None
    return done.secret, done.key_id


async def test_a_key_is_found_with_what_it_is_bound_to(changes: KeyChanges, keys: ApiKeys) -> None:
    done = await changes.create(BOUNDS, ME)
    assert done.secret is not None
    assert await keys.find(done.secret) == ApiKey(
        key_id=done.key_id, name="shop", user_id="u42", plan="growth", campaign_id="spring", tags={"team": "red"},
        models=("generate_draft",), streams=("generation",), allows=frozenset({"tags", "plan"}), is_admin=False,
        expires_ms=None,
    )  # fmt: skip
    (issued,) = await keys.list()
    assert (issued.created_by, issued.reason, issued.state(await keys.now_ms())) == ("ann", "the shop", "active")


async def test_a_malformed_or_unknown_key_is_not_found(calling: Calling, changes: KeyChanges, keys: ApiKeys) -> None:
    secret, _ = await created(changes)
    before = calling.runtime.handle.pipeline.commands
    for text in ("", "tb-", secret[:-1], f"{secret}x", f" {secret}", hash_of(secret), "key-000000000000"):
        assert await keys.find(text) is None
    assert calling.runtime.handle.pipeline.commands == before, "what has not the form of a key is not asked for"
    other = secret[:-2] + ("A" if secret[-2] != "A" else "B") + secret[-1]
    assert await keys.find(other) is None


async def test_a_key_that_is_revoked_is_found_for_two_seconds_at_most(
    changes: KeyChanges, keys: ApiKeys, clock: Clock
) -> None:
    secret, key_id = await created(changes)
    assert await keys.find(secret)
    assert (await changes.revoke(key_id, ME)).is_new
    clock.now_s += 1.9
    assert await keys.find(secret)
    clock.now_s += 0.1
    assert await keys.find(secret) is None
    clock.now_s -= 2  # Nothing is kept of it.
    assert await keys.find(secret) is None


async def test_an_unknown_key_is_looked_up_again(calling: Calling, keys: ApiKeys) -> None:
    secret = secret_of(b"s" * SECRET_BYTES)
    assert await keys.find(secret) is None
    runtime = calling.runtime
    makes = KeyChanges(runtime.ledger, runtime.policies, runtime.user_ids, random=lambda size: b"s" * size)
    await makes.create(BOUNDS, ME)
    assert await keys.find(secret)


async def test_an_expired_key_is_refused_at_once_by_the_clock_of_redis(
    changes: KeyChanges, keys: ApiKeys, clock: Clock
) -> None:
    now_ms = await keys.now_ms()
    secret, _ = await created(changes, expires_ms=now_ms + 600_000)
    assert await keys.find(secret)
    clock.now_s += 1.0  # It is still cached; its end counts from when it was read.
    assert await keys.find(secret)
    clock.now_s += 599.5
    assert await keys.find(secret), "read anew, its end is ten minutes away again by the clock of Redis"
    late = await created(changes, expires_ms=await keys.now_ms() + 1_500)
    assert await keys.find(late[0])
    clock.now_s += 1.5
    assert await keys.find(late[0]) is None
    assert [each.state(now_ms + 602_000) for each in await keys.list()] == ["expired", "expired"]


async def test_a_key_is_replaced_by_one_with_the_same_bounds(changes: KeyChanges, keys: ApiKeys, clock: Clock) -> None:
    first = await changes.create(BOUNDS, ME)
    second = await changes.rotate(first.key_id, Signature("bob", "every quarter"), after_ms=DAY_MS)
    assert first.secret is not None
    assert second.secret not in (None, first.secret)
    found = [await keys.find(str(each.secret)) for each in (first, second)]
    assert found[0] is not None
    assert found[1] is not None
    assert [each.key_id for each in found if each] == [first.key_id, second.key_id], "for a day, both are accepted"
    old, new = await keys.list()
    assert (old.replaced_by, new.replaces, old.revoked_by) == (second.key_id, first.key_id, "bob")
    assert (old.key.tags, old.key.models, old.key.allows) == (new.key.tags, new.key.models, new.key.allows)
    assert old.revoked_ms is not None
    assert old.revoked_ms - await keys.now_ms() == pytest.approx(DAY_MS, abs=60_000)
    with pytest.raises(KeyAlreadyRevoked):
        await changes.rotate(first.key_id, ME)
    assert (await changes.revoke(first.key_id, Signature("bob", "leaked"))).is_new, "earlier than it was to end"
    clock.now_s += 2
    assert await keys.find(first.secret) is None
    third = await changes.rotate(second.key_id, ME)
    clock.now_s += 2
    assert await keys.find(str(second.secret)) is None
    assert await keys.find(str(third.secret))


async def test_what_cannot_be_changed_is_said(changes: KeyChanges, keys: ApiKeys) -> None:
    with pytest.raises(KeyUnknown, match="there is no key key-000000000000: `tollbook keys list` shows them"):
        await changes.revoke("key-000000000000", ME)
    with pytest.raises(KeyUnknown):
        await changes.rotate("key-000000000000", ME)
    unknown = secret_of(b"s" * SECRET_BYTES)
    with pytest.raises(KeyUnknown) as refused:
        await changes.find_secret(unknown)
    assert unknown not in f"{refused.value!r}"
    secret, key_id = await created(changes)
    assert (await changes.find_secret(secret)).key.key_id == key_id
    runtime_ms = await keys.now_ms()
    _, short = await created(changes, expires_ms=runtime_ms + 60_000)
    late = KeyChanges(changes._ledger, changes._policies, changes._user_ids, now_ms=lambda: runtime_ms + 60_000)
    with pytest.raises(KeyExpired):
        await late.rotate(short, ME)
    assert len(await keys.list()) == 2


async def test_a_command_with_a_key_of_its_own_creates_one_key(changes: KeyChanges, keys: ApiKeys) -> None:
    signed = Signature("ann", "the shop", key="k1")
    first = await changes.create(BOUNDS, signed)
    again = await changes.create(BOUNDS, signed)
    assert first.is_new
    assert (again.is_new, again.secret) == (False, None)
    with pytest.raises(IdempotencyConflict, match="key k1 was used before with other content"):
        await changes.create(KeyBounds(user_id="u43"), signed)
    assert len(await keys.list()) == 1


async def test_a_key_whose_reply_was_lost_is_created_once_and_told(
    calling: Calling, changes: KeyChanges, keys: ApiKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, tries = calling.runtime.ledger.gates[0], list[Any]()
    create = gate.create_key

    async def lose_first(request: Any) -> Any:
        tries.append(await create(request))
        if len(tries) == 1:
            raise LedgerUnavailable("the connection broke after the step")
        return tries[-1]

    monkeypatch.setattr(gate, "create_key", lose_first)
    done = await changes.create(BOUNDS, ME)
    assert tries == ["created", "before"]
    assert done.secret is not None
    assert await keys.find(done.secret)
    assert len(await keys.list()) == 1


async def test_while_redis_is_away_a_key_is_neither_found_nor_unknown(
    calling: Calling, changes: KeyChanges, server_url: str
) -> None:
    secret, _ = await created(changes)
    proxy = FaultyProxy(server_url)
    await proxy.start()
    async with connect(proxy.url) as redis:
        pipeline = CommandPipeline(redis)
        keys = ApiKeys(pipeline, calling.runtime.handle.keys[0], monotonic=Clock())
        await proxy.stop()
        with pytest.raises(LedgerUnavailable):
            await keys.find(secret)
        await proxy.start()
        assert await keys.find(secret)
        await pipeline.aclose()
        await proxy.stop()


async def test_a_key_is_not_unknown_if_redis_refuses_the_lookup(
    changes: KeyChanges, keys: ApiKeys, calling: Calling, redis_client: Redis
) -> None:
    secret, _ = await created(changes)
    name = calling.runtime.handle.keys[0].api_keys
    await redis_client.delete(name)
    assert await keys.find(secret) is None
    await redis_client.set(name, "no hash")
    for ask in (lambda: keys.find(secret), keys.list):
        with pytest.raises(LedgerUnavailable, match="Redis refused a command"):
            await ask()


async def test_a_key_itself_is_in_no_log_event_or_redis_key(
    calling: Calling, changes: KeyChanges, keys: ApiKeys, redis_client: Redis, capfd: pytest.CaptureFixture[str]
) -> None:
    """G10."""
    with structlog.testing.capture_logs() as logged:
        secret, key_id = await created(changes, name="shop")
        new = await changes.rotate(key_id, ME)
        await changes.revoke(new.key_id, ME)
        found = await keys.find(secret)
    await calling.folded()
    whole: list[Any] = [logged, found, await keys.list(), keys._cached, await calling.events(), *capfd.readouterr()]
    async for name in redis_client.scan_iter():
        whole += [name, await redis_client.dump(name)]
    whole.append(await calling.query("SELECT payload::VARCHAR FROM events"))
    text = "".join(map(repr, whole))
    assert hash_of(secret) in text
    for each in (secret, new.secret):
        assert each is not None
        assert each[3:] not in text


async def test_on_a_ledger_with_hashed_ids_a_key_has_the_hash(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    """G10."""
    file = tmp_path / "hashed.toml"
    file.write_text('user_ids = "hashed"')
    async with open_calling(server_url, tmp_path, policy_file=file) as calling:
        secret, _ = await created(changes_of(calling), user_id="ann@example.com")
        handle = calling.runtime.handle
        found = await ApiKeys(handle.pipeline, handle.keys[0], monotonic=Clock()).find(secret)
        assert found is not None
        assert found.user_id is not None
        assert is_hashed_id(found.user_id)
        assert await calling.runtime.user_ids.keep(found.user_id) == found.user_id
        assert await calling.runtime.user_ids.plain([found.user_id]) == {found.user_id: "ann@example.com"}
        assert b"ann@" not in b"".join(
            fields[b"payload"] for _, fields in await calling.raw_events() if fields[b"type"] == b"key-created"
        )


async def test_the_projection_has_the_keys_and_so_has_one_that_is_built_again(
    calling: Calling, changes: KeyChanges, tmp_path: Path
) -> None:
    first = await changes.create(BOUNDS, ME)
    second = await changes.rotate(first.key_id, Signature("bob", "often"), after_ms=DAY_MS)
    await changes.revoke(first.key_id, Signature("cy", "leaked"))
    await created(changes, is_admin=True, user_id=None, expires_ms=4_102_444_800_000)
    await calling.folded()
    rows = await calling.query("SELECT * FROM api_keys ORDER BY created_at, last_seq DESC")
    old, new, admin = rows
    assert {name: old[name] for name in ("key_id", "name", "user_id", "plan", "campaign_id", "tags")} == {
        "key_id": first.key_id, "name": "shop", "user_id": "u42", "plan": "growth", "campaign_id": "spring",
        "tags": '{"team":"red"}',
    }  # fmt: skip
    assert (old["models"], old["streams"], old["allows"]) == (["generate_draft"], ["generation"], ["plan", "tags"])
    assert (old["created_by"], old["revoked_by"], old["replaced_by"]) == ("ann", "cy", second.key_id)
    assert old["created_at"] <= old["revoked_at"]
    assert (new["key_id"], new["revoked_at"], new["is_admin"]) == (second.key_id, None, False)
    assert (admin["is_admin"], admin["user_id"], admin["tags"], admin["models"]) == (True, None, "{}", [])
    assert f"{admin['expires_at']:%Y-%m-%d}" == "2100-01-01"
    handle = calling.runtime.handle
    rebuilt = await rebuild(handle.redis, handle.keys, handle.ledger_id, tmp_path / "again.duckdb")
    assert compare(calling.store, rebuilt) == []
    rebuilt.close()
    assert await calling.query("SELECT * FROM calls") == []
    assert await calling.query("SELECT * FROM spend") == []
