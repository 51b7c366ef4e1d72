"""The policy in a partition's `meta`: what stands there, and putting the next one in force (G11).

The ledger keeps a policy as the payload of its `policy-applied` event, beside the stream, so that any process can read
the policy in force at once. What a policy says is none of the gate's business; it compares versions.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from tollbook.ledger.keys import Keys
from tollbook.ledger.server.pipeline import CommandPipeline


@dataclass(frozen=True, slots=True)
class StoredPolicy:
    """The policy of one partition. `payload` is its event's, as JSON; version 0 has neither digest nor payload."""

    version: int = 0
    digest: str = ""
    payload: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyRequest:
    """Put `version` in force where `in_force` is now; `payload` is the JSON of its `policy-applied` event."""

    in_force: int
    version: int
    digest: str
    payload: str


async def read_policies(pipeline: CommandPipeline, keys: Sequence[Keys]) -> tuple[StoredPolicy, ...]:
    """Return the policy of each partition. Errors: LedgerUnavailable; redis.exceptions.ResponseError."""
    return tuple(await asyncio.gather(*(_read_policy(pipeline, key) for key in keys)))


async def _read_policy(pipeline: CommandPipeline, keys: Keys) -> StoredPolicy:
    found: list[bytes | None] = await pipeline.execute("HMGET", keys.meta, "policy_version", "policy_digest", "policy")
    version, digest, payload = ("" if value is None else value.decode(errors="replace") for value in found)
    return StoredPolicy(int(version) if version.isdecimal() else 0, digest, payload)
