"""`verify` finds changes by hand in Redis beside the stream, and names both values (G1, G2, G6)."""

import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final, cast

import pytest
from redis.asyncio import Redis

from tests.archive.gate_ledger import CAP, GateLedger, gate_ledger
from tollbook.audit.verification.certificates import Verdict
from tollbook.audit.verification.verification import Options, verify
from tollbook.schemas.identifiers import budget_name

pytestmark = pytest.mark.slow

KNOWN: Final = {"plan:growth": {CAP}, "day": {CAP - 1_000}, "campaign": {CAP}}


@pytest.fixture
async def books(redis_client: Redis, tmp_path: Path) -> AsyncIterator[GateLedger]:
    made = await gate_ledger(redis_client, tmp_path / "ledger", 7, 150)
    yield made
    await made.aclose()


async def verdict_of(books: GateLedger, tmp_path: Path, known: Mapping[str, set[int]] = KNOWN) -> Verdict:
    return await verify(books.source, Options(tmp_path / "verify", known_caps=known))


def problems(verdict: Verdict) -> list[str]:
    return [f"{finding.kind}: {finding.problem}" for finding in verdict.findings]


async def first_open(books: GateLedger) -> str:
    (call_id,) = await cast("Awaitable[list[bytes]]", books.redis.zrange(books.keys[0].holds, 0, 0))
    return call_id.decode()


async def newest_tail(books: GateLedger) -> str:
    """Return the tail of a user's period."""
    period = books.period
    for user in ("u1", "u2", "u3", "u0"):
        key = books.keys[0].tail(budget_name("user", user, period))
        if await books.redis.exists(key):
            return key
    raise AssertionError("there is no tail")


async def raise_cap(books: GateLedger, command: Any) -> None:
    await command("HSET", books.keys[0].account("u1"), "cap_nanousd", 900_000_000_000)


async def name_plan(books: GateLedger, command: Any) -> None:
    await command("HSET", books.keys[0].account("u2"), "plan", "enterprise")


async def raise_cap_of_nobody(books: GateLedger, command: Any) -> None:
    await command("HSET", books.keys[0].account("stranger"), "cap_nanousd", 900_000_000_000)


async def give_credit(books: GateLedger, command: Any) -> None:
    await command("HSET", books.keys[0].account("u3"), f"credit:{books.period}", 7_000_000_000)


async def take_credits(books: GateLedger, command: Any) -> None:
    await command("DEL", books.keys[0].account("u1"))


async def raise_what_a_credit_has_left(books: GateLedger, command: Any) -> None:
    found: Any = await books.redis.hgetall(books.keys[0].credits)
    name, value = next((name, value.decode()) for name, value in found.items() if name.endswith(b" lots"))
    await command("HSET", books.keys[0].credits, name, f"{value}\nfound 5 5 0")


async def lower_balance(books: GateLedger, command: Any) -> None:
    key = await newest_tail(books)
    place = (await command("LINDEX", key, -1)).decode().rsplit(" ", 2)[0]
    await command("LSET", key, -1, f"{place} 1 2")


async def change_an_older_entry(books: GateLedger, command: Any) -> None:
    key = await newest_tail(books)
    entry = (await command("LINDEX", key, 0)).decode()
    await command("LSET", key, 0, f"{entry.split(' ')[0]} 5 0 5 0")


async def delete_tail(books: GateLedger, command: Any) -> None:
    await command("DEL", await newest_tail(books))


async def add_tail(books: GateLedger, command: Any) -> None:
    await command("RPUSH", books.keys[0].tail("user:stranger:2026-11"), "1-1 -5 0 -5 0")


async def postpone_hold(books: GateLedger, command: Any) -> None:
    await command("ZADD", books.keys[0].holds, 2**52, await first_open(books))


async def drop_hold(books: GateLedger, command: Any) -> None:
    await command("ZREM", books.keys[0].holds, await first_open(books))


async def drop_record(books: GateLedger, command: Any) -> None:
    await command("DEL", books.keys[0].call(await first_open(books)))


async def shrink_hold(books: GateLedger, command: Any) -> None:
    key = books.keys[0].call(await first_open(books))
    head, rest = (await command("GET", key)).decode().split("\n", 1)
    parts = head.split(" ")
    await command("SET", key, " ".join([*parts[:3], "1", *parts[4:]]) + "\n" + rest)


async def forget_costs(books: GateLedger, command: Any) -> None:
    for key in await command("KEYS", books.keys[0].call("charge-*")):
        value = (await command("GET", key)).decode()
        await command("SET", key, re.sub(r" 0=\d+,", " 0=999,", value))


async def spoil_record(books: GateLedger, command: Any) -> None:
    await command("SET", books.keys[0].call(await first_open(books)), "nothing")


async def replace_tail(books: GateLedger, command: Any) -> None:
    await command("SET", await newest_tail(books), "no list")


async def add_nonsense(books: GateLedger, command: Any) -> None:
    await command("RPUSH", await newest_tail(books), "nonsense")


async def newest_key(books: GateLedger) -> tuple[str, str, str]:
    """Return id, hash and value of a key that is not revoked."""
    found: Any = await books.redis.hgetall(books.keys[0].api_keys)
    fields = {name.decode(): value.decode() for name, value in found.items()}
    for name, value in reversed(fields.items()):
        if name.startswith("key-") and f"{value} revoked" not in fields:
            return name, value, fields[value]
    raise AssertionError("there is no key")


async def add_key(books: GateLedger, command: Any) -> None:
    value = json.dumps({"key_id": "key-ffffffffffff", "hash": "f" * 64, "is_admin": True, "created_ms": 1})
    await command("HSET", books.keys[0].api_keys, "f" * 64, value)


async def widen_key(books: GateLedger, command: Any) -> None:
    _, digest, value = await newest_key(books)
    await command("HSET", books.keys[0].api_keys, digest, json.dumps(json.loads(value) | {"user_id": "u2"}))


async def remove_key(books: GateLedger, command: Any) -> None:
    await command("HDEL", books.keys[0].api_keys, (await newest_key(books))[1])


async def turn_key_around(books: GateLedger, command: Any) -> None:
    await command("HSET", books.keys[0].api_keys, (await newest_key(books))[0], "f" * 64)


async def revoke_by_hand(books: GateLedger, command: Any) -> None:
    key_id, digest, _ = await newest_key(books)
    value = json.dumps({"key_id": key_id, "at_ms": 1, "author": "x", "reason": "x"})
    await command("HSET", books.keys[0].api_keys, f"{digest} revoked", value)


async def forget_revocations(books: GateLedger, command: Any) -> None:
    for field in await command("HKEYS", books.keys[0].api_keys):
        if field.endswith(b" revoked"):
            await command("HDEL", books.keys[0].api_keys, field)


async def claim_to_have_trimmed(books: GateLedger, command: Any) -> None:
    await command("HSET", books.keys[0].meta, "removed_to", f"{2**43}-0")


async def replace_keys(books: GateLedger, command: Any) -> None:
    await command("SET", books.keys[0].api_keys, "none")


CHANGES: Final[dict[Callable[[GateLedger, Any], Awaitable[None]], str]] = {
    raise_cap: r"account: user u1: the cap is \$900\.00 in Redis, (\$0\.\d+|none) by the events",
    name_plan: r"account: user u2: the plan is enterprise in Redis, \w+ by the events",
    raise_cap_of_nobody: r"account: user stranger: the cap is \$900\.00 in Redis, none by the events",
    give_credit: r"account: user u3: the credit of .* is \$7\.00 in Redis, (none|\$[\d.]+) by the events",
    take_credits: r"account: user u1: the cap is none in Redis, \$0\.\d+ by the events",
    raise_what_a_credit_has_left: r"account: budget .*: what its credits have left is '.*found 5 5 0' in Redis, '.*'",
    lower_balance: r"hold: user u\d, .*: the gate has \$0\.000000001 settled and \$0\.000000002 held .*, the events",
    change_an_older_entry: r"hold: user u\d, period .* the gate has .*, the events give .* after event",
    delete_tail: r"hold: user u\d, period .*: the gate has nothing, the events give",
    add_tail: r"hold: user stranger, period 2026-11: the gate has -\$0\.000000005 settled .* the events give nothing",
    postpone_hold: rf"hold: the hold of call \S+ of user u\d ends at {2**52} ms in Redis, at \d+ ms by its event",
    drop_hold: "hold: hold .* is open, and the gate does not know it",
    drop_record: "record: call .* of user .*: Redis holds no record, the events give state open",
    shrink_hold: r"record: call .* of user u\d: Redis holds state open, hold \d of 1, .* the events .* of \d\d",
    forget_costs: r'record: call charge-\d+ of user u\d: Redis holds .*"0=999,0", the events give .*"0=\d+,0"',
    spoil_record: r"record: \S+:call:call-\d+ in Redis is not as the gate writes it",
    replace_tail: r"record: \S+:tail:user:u\d:\S+ in Redis is not as the gate writes it \(WRONGTYPE",
    add_key: "key: key key-ffffffffffff: stands in Redis, and no event gives it",
    widen_key: "key: key key-[0-9a-f]{12}: stands otherwise in Redis than by the events",
    remove_key: "key: key key-[0-9a-f]{12}: stands by the events, and is missing in Redis",
    turn_key_around: "key: key key-[0-9a-f]{12}: has its hash otherwise in Redis than by the events",
    revoke_by_hand: "key: key key-[0-9a-f]{12}: is revoked in Redis, and no event gives it",
    forget_revocations: "key: key key-[0-9a-f]{12}: is revoked by the events, and is missing in Redis",
    claim_to_have_trimmed: rf"stream: events up to {2**43}-0 are archived and trimmed off the stream, as Redis has it",
    replace_keys: r"record: \S+:keys in Redis is not as the gate writes it \(WRONGTYPE",
    add_nonsense: r"record: \S+:tail:user:u\d:\S+ in Redis is not .* an entry 'nonsense'",
}  # fmt: skip


FORGED: Final[dict[str, tuple[dict[str, Any], dict[str, str], str]]] = {
    "an attempt of a call that has ended": (
        {"model": "m", "outcome": "ok", "latency_ms": 5, "charge_nanousd": 7, "charge_basis": "reported", "hold": 1},
        {"type": "model-called", "attempt": "9"},
        r'record: call .* attempts "[^"]*".*, the events give .* attempts "[^"]*m9',
    ),
    "an attempt of nobody": (
        {"model": "m", "outcome": "ok", "latency_ms": 5, "charge_nanousd": 7, "charge_basis": "reported", "hold": 1},
        {"type": "model-called", "call_id": "nobody"},
        "call: call nobody has no hold 1",
    ),
    "a fallback": (
        {"from_model": "m", "to_model": "n", "reason": "http_503", "hold": 1},
        {"type": "fallback-used", "attempt": "9"},
        r'record: call .*, the events give .* attempts "[^"]*f9',
    ),
    "a refusal of a call that has ended": (
        {"task_type": "score_post", "plan": "trial", "worker": "w", "cap_nanousd": 5, "budget": "user:u1:2026-11",
         "reason": "cap", "settled_nanousd": 0, "held_nanousd": 0},
        {"type": "budget-denied", "amount": "9"},
        "call: call .* (was over before|has holds)",
    ),
    "a seal": (
        {"segment": "p0-000000000001-000000000002", "first_id": "1-1", "last_id": "1-2", "events": 2,
         "chain_before": "00", "chain_after": "11"},
        {"type": "segment-sealed", "user_id": "", "period": "", "call_id": ""},
        "seal: names segment .*, which is not in the archive",
    ),
}  # fmt: skip


@pytest.mark.parametrize("forgery", FORGED.values(), ids=FORGED.keys())
async def test_a_forged_event_that_moves_no_money_is_found(
    books: GateLedger, tmp_path: Path, forgery: tuple[dict[str, Any], dict[str, str], str]
) -> None:
    """The projector folds such an event, since it leaves no trace on the gate's tails."""
    payload, changes, problem = forgery
    ledger = books.keys[0].ledger
    events: Any = await books.redis.xrevrange(ledger)
    settled = next(
        fields for _, fields in events if fields[b"type"] == b"cost-recorded" and b'"hold":1' in fields[b"payload"]
    )
    values = {
        "type": "", "v": "2", "seq": str(int(events[0][1][b"seq"]) + 1), "user_id": settled[b"user_id"].decode(),
        "period": settled[b"period"].decode(), "call_id": settled[b"call_id"].decode(), "attempt": "1", "amount": "0",
        "committed": "", "payload": json.dumps(payload), **changes,
    }  # fmt: skip
    await books.redis.xadd(ledger, values)  # pyright: ignore[reportArgumentType]
    found = problems(await verdict_of(books, tmp_path))
    assert any(re.search(problem, each) for each in found), found


async def test_the_state_that_the_gate_wrote_is_sound(books: GateLedger, tmp_path: Path) -> None:
    assert problems(await verdict_of(books, tmp_path)) == []


@pytest.mark.parametrize(("change", "problem"), CHANGES.items(), ids=lambda value: getattr(value, "__name__", ""))
async def test_a_change_by_hand_is_found(
    books: GateLedger, tmp_path: Path, change: Callable[[GateLedger, Any], Awaitable[None]], problem: str
) -> None:
    await change(books, books.redis.execute_command)
    found = problems(await verdict_of(books, tmp_path))
    assert any(re.search(problem, each) for each in found), found


@pytest.mark.parametrize(
    ("subject", "problem"),
    [
        ("plan:growth", rf"cap: user u\d, period .*: the cap is stamped {CAP} nano-dollars, .* plan growth has 1"),
        ("day", rf"cap: user u\d, day .*: the cap is stamped {CAP - 1_000} nano-dollars, .* day has 1"),
        ("campaign", rf"cap: campaign .*: the cap is stamped {CAP} nano-dollars, .* campaign has 1"),
        ("user:u3", rf"cap: user u3, period .*: the cap is stamped {CAP} nano-dollars, .* user u3 has 1"),
    ],
)
async def test_a_stamp_that_neither_settings_nor_events_explain_is_named(
    books: GateLedger, tmp_path: Path, subject: str, problem: str
) -> None:
    found = problems(await verdict_of(books, tmp_path, KNOWN | {subject: {1}}))
    assert any(re.search(problem, each) for each in found), found
    earlier = KNOWN | {subject: {1, *KNOWN.get(subject, {CAP})}}
    assert problems(await verdict_of(books, tmp_path / "again", earlier)) == []


async def test_a_stamp_below_the_known_caps_is_only_a_note(books: GateLedger, tmp_path: Path) -> None:
    """The caps of the settings were lower then, so nobody could overspend."""
    verdict = await verdict_of(books, tmp_path, KNOWN | {"day": {CAP}})
    assert problems(verdict) == []
    assert any(f"the cap is stamped {CAP - 1_000} nano-dollars" in note for note in verdict.notes)
