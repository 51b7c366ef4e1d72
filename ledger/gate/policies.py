"""The policy in a partition's `meta`: what stands there, and putting the next one in force (G11).

The ledger keeps a policy as the payload of its `policy-applied` event, beside the stream, so that any process can read
the policy in force at once. What a policy says is none of the gate's business; it compares versions.
"""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tollbook.ledger.errors import LedgerRefused
from tollbook.ledger.keys import Keys
from tollbook.ledger.server.pipeline import CommandPipeline

POLICY_FIELDS: Final = ("policy_version", "policy_digest", "policy")
"""The fields of `meta` that have the policy."""


@dataclass(frozen=True, slots=True)
class StoredPolicy:
    """The policy of one partition. `payload` is its event's, as JSON; version 0 has neither digest nor payload."""

    version: int = 0
    digest: str = ""
    payload: str = ""

    @classmethod
    def of_fields(cls, found: Sequence[bytes | str | None]) -> "StoredPolicy":
        """Read the fields `policy_version`, `policy_digest` and `policy` of `meta`."""
        version, digest, payload = (
            value.decode(errors="replace") if isinstance(value, bytes) else value or "" for value in found
        )
        return cls(int(version) if version.isdecimal() else 0, digest, payload)


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyRequest:
    """Put `version` in force where `in_force` is now; `payload` is the JSON of its `policy-applied` event."""

    in_force: int
    version: int
    digest: str
    payload: str
    opened: "Opened | None" = None


@dataclass(frozen=True, slots=True)
class OpeningHold:
    """A hold that is open when a budget is opened, with what it holds. Nano-dollars."""

    call_id: str
    hold: int
    amount_nanousd: int


@dataclass(frozen=True, slots=True)
class Opening:
    """A budget that begins with what was spent before, and what is held. Nano-dollars.

    `holds` stand against it from then on.
    """

    budget: str
    spent_nanousd: int
    cap_nanousd: int
    holds: tuple[OpeningHold, ...] = ()


@dataclass(frozen=True, slots=True)
class Opened:
    """The budgets that a policy opens, counted up to event number `seq`; the first of their windows ends at `until_ms`.

    Without `seq` they are opened as they are, whatever came since. `is_recovery` enters a lost policy again, also while
    calls are stopped.
    """

    openings: tuple[Opening, ...] = ()
    seq: int | None = None
    until_ms: int = 0
    is_recovery: bool = False

    @property
    def counted(self) -> str:
        """Say to the gate how far was counted."""
        if self.is_recovery:
            return "recovered"
        return "" if self.seq is None else f"{self.seq} {self.until_ms}"


class EventsNotCounted(LedgerRefused):
    """There are newer events than those that openings were counted from, or a window is over: count, and ask again."""

    def __init__(self, seq: int) -> None:
        super().__init__(f"events up to number {seq} are on the ledger and not counted yet, or a window is over")
        self.seq = seq


async def read_policies(pipeline: CommandPipeline, keys: Sequence[Keys]) -> tuple[StoredPolicy, ...]:
    """Return the policy of each partition. Errors: LedgerUnavailable; redis.exceptions.ResponseError."""
    return tuple(await asyncio.gather(*(_read_policy(pipeline, key) for key in keys)))


async def _read_policy(pipeline: CommandPipeline, keys: Keys) -> StoredPolicy:
    found: list[bytes | None] = await pipeline.execute("HMGET", keys.meta, *POLICY_FIELDS)
    return StoredPolicy.of_fields(found)


def is_same_payload(one: str, other: str) -> bool:
    """Whether two texts are the same JSON: DuckDB may keep one in another form."""
    try:
        return one == other or json.loads(one) == json.loads(other)
    except ValueError:
        return False
