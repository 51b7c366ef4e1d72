"""Verification of what Redis holds beside the stream: accounts, keys, tails, holds, records, policy (G1, G2, G6, G11).

Everything is compared with what the events give, so that a value changed by hand is found, and named with both values.
Users, calls and budgets of events appended meanwhile are left for the next verification.
"""

import json
import re
from collections.abc import AsyncGenerator, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import pyarrow as pa
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from tollbook.audit.verification.api_keys import KeyValue, changed_keys
from tollbook.audit.verification.credit_lots import CreditChanged, changed_lots
from tollbook.audit.verification.findings import MAX_SHOWN_PER_RULE, Findings, Kind
from tollbook.audit.verification.refold import Refold
from tollbook.audit.verification.stream import StreamEnd
from tollbook.ledger.errors import LedgerUnavailable
from tollbook.ledger.gate.call_record import CallRecord, parse_call_record
from tollbook.ledger.gate.policies import POLICY_FIELDS, StoredPolicy, is_same_payload
from tollbook.ledger.keys import Keys
from tollbook.ledger.server.servers import primaries, read_together, server_of
from tollbook.ledger.stream import StreamReader
from tollbook.schemas.identifiers import EntryId, budget_name, describe_budget
from tollbook.schemas.money import format_usd

_PAGE: Final = 1_000
_STATES: Final = {"closed": "over", "settled": "over"}
_FIELDS: Final = {"plan": "the plan", "cap_nanousd": "the cap"}

_KEY_EVENTS: Final = ("key-created", "key-revoked")
_LOTS: Final = " lots"

Accounts = dict[tuple[str, str], str]
"""By user and field: what is assigned to the user."""


@dataclass(frozen=True, slots=True)
class GateState:
    """What Redis holds of a partition. Created by `GateState.read`."""

    partition: int
    accounts: Accounts
    lots: dict[str, str]
    """By budget, what its credits have left, in lines."""
    tails: pa.Table
    records: pa.Table
    holds: pa.Table
    unreadable: list[tuple[str, str]]
    """Names of keys that the gate did not write, with what is wrong."""
    later: pa.Table
    watermark: EntryId
    """Entries up to here may be gone from the tails."""
    policy: StoredPolicy
    keys: dict[str, str]
    """What there is of the gateway's keys, by field."""

    @classmethod
    async def read(cls, redis: Redis, keys: Keys, end: StreamEnd) -> "GateState":
        """Read everything, then what was appended after `end`. Errors: RedisError; LedgerUnavailable."""
        tails, records, unreadable = list[Any](), list[Any](), list[tuple[str, str]]()
        last = EntryId.parse(end.last_id)
        accounts = await read_accounts(redis, keys, unreadable)
        async for budget, entries in _values(redis, keys.tail(""), unreadable, "LRANGE", 0, -1):
            for entry in entries:
                entry_id, _, moved = _text(entry).partition(" ")
                try:
                    if EntryId.parse(entry_id) <= last:
                        tails.append((budget, entry_id, moved))
                except ValueError:
                    unreadable.append((keys.tail(budget), f"it has an entry {_text(entry)!r}"))
        async for call_id, value in _values(redis, keys.call(""), unreadable, "GET"):
            try:
                records.append(_row(call_id, parse_call_record(value)))
            except ValueError as exc:
                unreadable.append((keys.call(call_id), str(exc)))
        holds: Any = await cast("Any", redis).zrange(keys.holds, 0, -1, withscores=True)
        policy: Any = await cast("Any", redis).hmget(keys.meta, *POLICY_FIELDS)
        try:
            api_keys = dict(_pairs(await cast("Any", redis).hgetall(keys.api_keys)))
        except ResponseError as exc:
            api_keys = {}
            unreadable.append((keys.api_keys, str(exc)))
        # Read last: entries before it may have been dropped from the tails meanwhile.
        trimmed_to = _text(await cast("Any", redis).hget(keys.meta, "trimmed_to") or "0-0")
        return cls(
            keys.partition,
            accounts,
            await _read_lots(redis, keys),
            _table(tails, "budget", "id", "entry"),
            _table(
                records, "call_id", "user_id", "state", "hold", "held", "settled", "attempts", integers=("hold", "held")
            ),
            _table(
                [(_text(call_id), int(deadline_ms)) for call_id, deadline_ms in holds],
                "call_id",
                "deadline_ms",
                integers=("deadline_ms",),
            ),
            unreadable,
            _table(await read_later(redis, keys, last), "kind", "name"),
            EntryId.parse(trimmed_to),
            StoredPolicy.of_fields(policy),
            api_keys,
        )

    @property
    def balances(self) -> int:
        """How many balances the gate has by itself."""
        return len(self.tails["budget"].unique())

    def check(self, refold: Refold, findings: Findings) -> None:
        """Compare with the events that were folded again, after `Refold.check`. Blocks."""
        tables = {
            "tails": self.tails,
            "records": self.records,
            "holds": self.holds,
            "later": self.later,
        }
        with refold.registered({f"gate_{name}": table for name, table in tables.items()}):
            given = {"partition": self.partition}
            values = {
                (user_id, field): value
                for partition, user_id, field, value in refold.rows("account_values", {})
                if partition == self.partition
            }
            keys = [KeyValue(*row) for row in refold.rows("key_values", given)]
            credit_changes = [CreditChanged(*row) for row in refold.rows("credit_changes", given)]
            marks = given | {"ms": self.watermark.ms, "n": self.watermark.seq}
            tails = [
                f"{describe_budget(budget)}: the gate has {_balance(found)}, the events give {_balance(value)} "
                f"after event {entry_id}"
                for budget, entry_id, found, value in refold.rows("verify_tails", marks)
            ]
            records = [
                f"call {call_id} of user {user_id}: Redis holds {found or 'no record'}, "
                f"the events give {value or 'none'}"
                for call_id, user_id, found, value in refold.rows("verify_records", given)
            ]
            tails += [
                f"the hold of call {call_id} of user {user_id} ends at {found} ms in Redis, at {value} ms by its event"
                for call_id, user_id, found, value in refold.rows("verify_deadlines", given)
            ]
        accounts = changed_accounts(self.accounts, values, without=self._later("user"))
        if "" not in self._later("user"):
            accounts += changed_lots(self.lots, credit_changes)
        api_keys = changed_keys(self.keys, keys, without=self._later("key"))
        records += [f"{key} in Redis is not as the gate writes it ({why})" for key, why in self.unreadable]
        policies = self._policy_problems(refold.newest_policy(self.partition))
        for kind, problems in (
            ("account", accounts), ("key", api_keys), ("policy", policies), ("hold", tails), ("record", records),
        ):  # fmt: skip
            self._add(findings, cast("Kind", kind), problems)

    def _policy_problems(self, given: tuple[int, str, str] | None) -> list[str]:
        """Compare the policy in `meta` with that of the last event, unless a newer one was applied meanwhile."""
        version, digest, payload = given or (0, "", "")
        found = self.policy
        if self._later("policy"):
            return []
        if (found.version, found.digest) != (version, digest):  # audits G11
            return [f"policy {found.version} ({found.digest or 'none'}) is in force in Redis, {version} by the events"]
        if not is_same_payload(found.payload, payload):  # audits G11
            return [f"the content of policy {version} in Redis is not that of its event"]
        return []

    def _later(self, kind: str) -> set[str]:
        """Return the names of a kind that later events are about."""
        return {row["name"] for row in self.later.to_pylist() if row["kind"] == kind}

    def _add(self, findings: Findings, kind: Kind, problems: Sequence[str]) -> None:
        for problem in problems[:MAX_SHOWN_PER_RULE]:
            findings.add(kind, problem, partition=self.partition)
        if len(problems) > MAX_SHOWN_PER_RULE:
            findings.add(kind, f"and {len(problems) - MAX_SHOWN_PER_RULE} more of this rule", partition=self.partition)


async def read_accounts(redis: Redis, keys: Keys, unreadable: list[tuple[str, str]]) -> Accounts:
    """Return the accounts that Redis holds; keys of another type are added to `unreadable`. Errors: RedisError."""
    accounts: Accounts = {}
    async for user_id, fields in _values(redis, keys.account(""), unreadable, "HGETALL"):
        accounts |= {(user_id, name): value for name, value in _pairs(fields)}
    credits_ = _pairs(await cast("Any", redis).hgetall(keys.credits))
    # Of a budget, without a user.
    return accounts | {("", name): value for name, value in credits_ if not name.endswith(_LOTS)}


async def _read_lots(redis: Redis, keys: Keys) -> dict[str, str]:
    fields = _pairs(await cast("Any", redis).hgetall(keys.credits))
    return {name.removesuffix(_LOTS): value for name, value in fields if name.endswith(_LOTS)}


def changed_accounts(found: Accounts, given: Accounts, *, without: Collection[str]) -> list[str]:
    """Describe each difference between Redis and the events, except for the users in `without`."""
    return [
        f"{_subject(user_id, field)} is {_value(field, found.get((user_id, field)))} in Redis, "
        f"{_value(field, given.get((user_id, field)))} by the events"
        for user_id, field in sorted(found.keys() | given.keys())
        if user_id not in without and found.get((user_id, field)) != given.get((user_id, field))  # audits G1
    ]


async def _values(
    redis: Redis, prefix: str, unreadable: list[tuple[str, str]], *command: str | int
) -> AsyncGenerator[tuple[str, Any]]:
    """Yield the values of all keys that begin with `prefix`, by the rest of their name; note those of another type."""
    pattern = _escaped(prefix) + "*"
    name, *arguments = command
    page, seen = list[str](), set[str]()
    server: Any = await server_of(redis, prefix)
    async for key in server.scan_iter(match=pattern, count=_PAGE):
        text = _text(key)
        if text not in seen:
            seen.add(text)
            page.append(text)
        if len(page) == _PAGE:
            async for pair in _page(redis, page, len(prefix), unreadable, str(name), arguments):
                yield pair
            page = []
    async for pair in _page(redis, page, len(prefix), unreadable, str(name), arguments):
        yield pair
    await primaries(redis)  # Ask again where they are.
    if await server_of(redis, prefix) is not server:
        raise LedgerUnavailable("a partition moved to another node while it was read: run this again")


async def _page(
    redis: Redis,
    keys: Sequence[str],
    cut: int,
    unreadable: list[tuple[str, str]],
    name: str,
    arguments: Sequence[Any],
) -> AsyncGenerator[tuple[str, Any]]:
    commands = [(name, key, *arguments) for key in keys]
    values = await read_together(redis, keys[0], commands, is_one_moment=False) if keys else []
    for key, value in zip(keys, values, strict=True):
        if isinstance(value, ResponseError):
            unreadable.append((key, str(value)))
        elif isinstance(value, Exception):
            raise value
        elif value:  # It may have expired meanwhile.
            yield key[cut:], value


async def read_later(redis: Redis, keys: Keys, after: EntryId) -> list[tuple[str, str]]:
    """Return users, calls and budgets of events after an entry, each with its kind. Errors: RedisError."""
    found, reader = set[tuple[str, str]](), StreamReader(redis, keys)
    try:
        while batch := await reader.read_after(after, count=10 * _PAGE):
            for row in batch.to_table().to_pylist():
                found |= {("user", row["user_id"]), ("call", row["call_id"])}
                found |= {("budget", name) for name in _budgets(row)}
                found |= {("policy", "")} if row["type"] == "policy-applied" else set()
                found |= {("key", json.loads(row["payload"])["key_id"])} if row["type"] in _KEY_EVENTS else set()
            after = batch.last_id
    finally:
        await reader.aclose()
    return sorted(found)


def _budgets(row: dict[str, str]) -> Iterable[str]:
    if row["user_id"]:
        yield budget_name("user", row["user_id"], row["period"])
    yield from (stamp["budget"] for stamp in json.loads(row["payload"]).get("budgets", ()))


def _row(call_id: str, record: CallRecord) -> tuple[Any, ...]:
    settled = " ".join(
        f"{number}={hold.cost_nanousd},{hold.assumed_nanousd}" for number, hold in sorted(record.settled.items())
    )
    is_open = record.state == "open"
    held = record.hold.amount_nanousd if is_open else 0
    state, attempts = _STATES.get(record.state, record.state), " ".join(sorted(record.attempts))
    return call_id, record.user_id, state, record.hold.hold, held, settled, attempts


def _pairs(fields: Any) -> Iterable[tuple[str, str]]:
    if isinstance(fields, dict):
        return [(_text(name), _text(value)) for name, value in cast("dict[Any, Any]", fields).items()]
    texts = [_text(part) for part in fields]
    return zip(texts[0::2], texts[1::2], strict=True)


def _table(rows: Sequence[Sequence[Any]], *names: str, integers: Sequence[str] = ()) -> pa.Table:
    schema = pa.schema([(name, pa.int64() if name in integers else pa.string()) for name in names])
    return pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows], schema=schema)


def _subject(user_id: str, field: str) -> str:
    return f"user {user_id}: {_field(field)}" if user_id else f"{describe_budget(field)}: its credit"


def _field(name: str) -> str:
    return _FIELDS.get(name) or f"the credit of {name.partition(':')[2]}"


def _value(field: str, value: str | None) -> str:
    if value is None:
        return "none"
    return value if field == "plan" or not value.lstrip("-").isdigit() else _usd(value)


def _balance(entry: str | None) -> str:
    """Describe "dS dH S H", or "S H" alone."""
    if entry is None:
        return "nothing"
    parts = entry.split(" ")
    if not all(part.lstrip("-").isdigit() for part in parts):
        return repr(entry)
    settled, held = parts[-2:]
    moved = f" (moved by {_usd(parts[0])} and {_usd(parts[1])})" if len(parts) == 4 else ""
    return f"{_usd(settled)} settled and {_usd(held)} held{moved}"


def _usd(nanousd: str) -> str:
    return format_usd(int(nanousd), places=None)


def _escaped(prefix: str) -> str:
    return re.sub(r"([\\*?\[\]])", r"\\\1", prefix)


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
