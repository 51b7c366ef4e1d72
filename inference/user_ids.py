"""Users' ids as keyed hashes on the ledger: hashed at the edge, and resolved by a table beside the ledger.

A ledger cannot forget. So if ids are personal, the ledger gets a keyed hash instead of the id (`user_ids = "hashed"`).
One table in Redis, beside the ledger, maps each hash to its id; an entry can be removed at any time (G10). The key of
the hashes is made with the ledger and is in no event. With another key, a person would have another hash, and caps
would start again from zero. So a copy of the key is in the projector's data directory, and a ledger whose key is lost
is not opened.
"""

import asyncio
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from tollbook.inference.current_policy import CurrentPolicy
from tollbook.inference.provider_users import ledger_user_key, stored_user_key
from tollbook.inference.user_keys import KEY_FILE, derived_key, hash_of, read_key_copy
from tollbook.ledger.errors import LedgerRefused
from tollbook.ledger.keys import Keys
from tollbook.ledger.server.connection import as_map
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.schemas.identifiers import budget_value, check_id, is_hashed_id, normalise_id, read_values
from tollbook.schemas.policy import BudgetRule
from tollbook.schemas.tasks import Task

_MAX_REMEMBERED: Final = 10_000
_PAGE: Final = 1_000


class UserKeyLost(LedgerRefused):
    """The ledger has hashed ids, but the key of the hashes is missing or wrong."""

    def __init__(self, problem: str) -> None:
        super().__init__(
            f"{problem}: with another key, every user would have another id, and spend would start again at zero. "
            f"Restore the backup of Redis, or the file {KEY_FILE} of the projector's data directory, and start the "
            "projector"
        )


class UserIds:
    """Converts users' ids to their form on the ledger and back. On a ledger with plain ids, both are the same.

    Errors of every method that asks Redis: LedgerUnavailable.
    """

    def __init__(self, policies: CurrentPolicy, pipeline: CommandPipeline, keys: Keys, ledger_key: bytes) -> None:
        """`keys` are the first partition's; `ledger_key` is the ledger's own key."""
        self._policies = policies
        self._pipeline = pipeline
        self._keys = keys
        self._key = derived_key(ledger_key)
        self._remembered: dict[str, None] = {}

    @property
    def is_hashed(self) -> bool:
        """Whether the ledger's policy has hashed ids."""
        return self._policies.newest.policy.user_ids == "hashed"

    def on_ledger(self, user_id: str) -> str:
        """Return a user's id on the ledger, to look it up; a hash is returned unchanged."""
        user_id = normalise_id(user_id)
        return hash_of(user_id, self._key) if self.is_hashed else user_id

    async def keep(self, user_id: str) -> str:
        """Return a user's id on the ledger, and add it to the table that resolves it.

        Errors: ValueError for an invalid id.
        """
        user_id = check_id(user_id)
        kept = self.on_ledger(user_id)
        if kept != user_id and kept not in self._remembered:
            await self._pipeline.execute("HSET", self._keys.users, kept, user_id)
            if len(self._remembered) >= _MAX_REMEMBERED:
                del self._remembered[next(iter(self._remembered))]
            self._remembered[kept] = None
        return kept

    async def task(self, task: Task) -> Task:
        """Return a task with the user's id on the ledger; no later step sees the plain id."""
        if not self.is_hashed:
            return task
        return task.model_copy(update={"user_id": await self.keep(task.user_id)})  # G10

    async def value_of(self, rules: Iterable[BudgetRule], budget: str, value: str | None) -> str | None:
        """Return the value of a budget's balance, with the user's id in it as on the ledger."""
        rule = next((each for each in rules if each.name == budget), None)
        if rule is None or value is None or "user" not in rule.by or not self.is_hashed:
            return value
        try:
            parts = read_values(value, len(rule.by))
        except ValueError:
            return value  # Invalid: it is refused when the budget is looked up.
        place = rule.by.index("user")
        parts[place] = await self.keep(parts[place])
        return budget_value(parts)

    async def plain(self, kept: Iterable[str]) -> dict[str, str]:
        """Return the plain id of each hash that is in the table."""
        return await read_plain(self._pipeline, self._keys, kept)

    async def known(self) -> dict[str, str]:
        """Return the whole table: the plain id by hash."""
        found: Any = as_map(await self._pipeline.execute("HGETALL", self._keys.users))
        return {kept.decode(): plain.decode() for kept, plain in found.items()}

    async def forget(self, user_id: str) -> bool:
        """Remove a user from the table; return False if the user was not in it."""
        kept = self.on_ledger(user_id)
        self._remembered.pop(kept, None)
        return bool(await self._pipeline.execute("HDEL", self._keys.users, kept))


async def read_plain(pipeline: CommandPipeline, keys: Keys, kept: Iterable[str]) -> dict[str, str]:
    """Return the plain id of each hash that is in the table. Errors: LedgerUnavailable."""
    wanted = [each for each in dict.fromkeys(kept) if is_hashed_id(each)]
    known: dict[str, str] = {}
    for start in range(0, len(wanted), _PAGE):
        page = wanted[start : start + _PAGE]
        found: Sequence[bytes | None] = await pipeline.execute("HMGET", keys.users, *page)
        known |= {each: plain.decode() for each, plain in zip(page, found, strict=True) if plain is not None}
    return known


async def read_user_ids(pipeline: CommandPipeline, namespace: str) -> UserIds | None:
    """Return the user ids of a ledger without opening it for writing; None if the ids are plain.

    Errors: UserKeyLost; LedgerUnavailable; PolicyUnreadable.
    """
    keys = Keys(namespace)
    policies = await CurrentPolicy.of_ledger(pipeline, [keys])
    if policies.newest.policy.user_ids == "plain":
        return None
    key = await stored_user_key(pipeline, keys)
    if key is None:
        raise UserKeyLost("the key of the ledger's hashed user ids is lost")
    return UserIds(policies, pipeline, keys, key)


async def open_user_key(
    pipeline: CommandPipeline, keys: Keys, policies: CurrentPolicy, *, data_dir: Path, ledger_id: str
) -> bytes:
    """Return the ledger's key. If Redis has none, store its copy again, or a new key if the ledger has no hashes yet.

    Errors: UserKeyLost; LedgerUnavailable.
    """
    copy = await asyncio.to_thread(read_key_copy, data_dir, ledger_id)
    is_hashed = policies.newest.policy.user_ids == "hashed"
    if is_hashed and copy is None and await stored_user_key(pipeline, keys) is None:
        raise UserKeyLost("the key of the ledger's hashed user ids is lost")
    key = await ledger_user_key(pipeline, keys, copy)
    if is_hashed and copy not in (None, key):
        raise UserKeyLost("the key of the ledger's hashed user ids in Redis is not the one in the data directory")
    return key
