"""The ledger's policies, one after the other, read from their events."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from tollbook.audit.reader import AuditReader, Selection
from tollbook.inference.current_policy import PolicyInForce, policy_in_force
from tollbook.ledger.gate.policies import StoredPolicy
from tollbook.schemas.events import Event, PolicyApplied, payload_json


@dataclass(slots=True)
class PolicyVersion:
    """One version: its event in the first partition that has it, and the partitions where it came into force."""

    event: Event
    applied: PolicyApplied
    partitions: list[int] = field(default_factory=list[int])

    @property
    def in_force(self) -> PolicyInForce:
        """The policy itself. Errors: PolicyUnreadable."""
        stored = StoredPolicy(self.applied.version, self.applied.digest, payload_json(self.applied))
        return policy_in_force(stored)


async def read_policy_versions(reader: AuditReader, only: int | None = None) -> list[PolicyVersion]:
    """Return every version, oldest first; [] for a ledger at version 0. With `only`, those of that partition.

    Errors: as `AuditReader.tables`.
    """
    found: dict[int, PolicyVersion] = {}
    for partition in reader.partitions(None) if only is None else (only,):
        for event in await reader.events(Selection(partition=partition, types=("policy-applied",))):
            if isinstance(event.payload, PolicyApplied):
                version = found.setdefault(event.payload.version, PolicyVersion(event, event.payload))
                version.partitions.append(partition)
    return [version for _, version in sorted(found.items())]


def policy_at(versions: Iterable[PolicyVersion], event: Event) -> PolicyVersion | None:
    """Return the policy in force at an event, of the events of one partition; None before the first."""
    before = [each for each in versions if each.event.seq < event.seq]
    return before[-1] if before else None
