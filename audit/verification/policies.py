"""Verification of the policies on the ledger (G11): their events, and the caps that they give at each position.

A cap at a hold is what the policy in force there says of the user, the plan or the budget; what the ledger assigned to
the user, and credit, are added by SQL. A ledger without policies, and the part before the first, has none to judge by.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb
from pydantic import ValidationError

from tollbook.audit.verification.findings import Findings
from tollbook.schemas.money import nanousd_from_usd
from tollbook.schemas.policy import Policy, digest_of
from tollbook.schemas.problems import as_text, problems_of


@dataclass(frozen=True, slots=True)
class AppliedPolicy:
    """A `policy-applied` event. `policy` is None where this program cannot read its content."""

    partition: int
    seq: int
    entry_id: str
    version: int
    digest: str
    definitions: dict[str, int]
    policy: Policy | None
    problem: str | None


def read_policies(cursor: duckdb.DuckDBPyConnection) -> list[AppliedPolicy]:
    """Return the policies of a projection, in order within each partition. Errors: duckdb.Error."""
    rows = cursor.execute(
        "SELECT partition, seq, id, version, digest, definitions, content FROM policies ORDER BY partition, seq"
    ).fetchall()
    return [_read(*row) for row in rows]


def _read(
    partition: int, seq: int, entry_id: str, version: int, digest: str, definitions: str, text: str
) -> AppliedPolicy:
    content: Any = json.loads(text)
    policy, problem = None, None
    try:
        policy = Policy.model_validate(content)
    except ValidationError as exc:
        problem = f"policy {version} cannot be read: {as_text(problems_of(exc, Policy))}"
    if digest_of(content) != digest:
        problem = f"policy {version} has another content than its digest says"
    return AppliedPolicy(partition, seq, entry_id, version, digest, json.loads(definitions), policy, problem)


def check_policies(policies: Sequence[AppliedPolicy], partitions: int, findings: Findings) -> None:
    """Check that versions grow, that contents are those of their digests, and that partitions agree.

    Partitions may differ in their newest version: a change was applied to some of them, and is completed by the next.
    """
    by_version: dict[int, AppliedPolicy] = {}
    versions: defaultdict[int, set[int]] = defaultdict(set)
    newest: dict[int, int] = {}
    for each in policies:
        problem = each.problem
        if each.version <= newest.get(each.partition, 0):
            problem = f"policy {each.version} comes after policy {newest[each.partition]}"
        first = by_version.setdefault(each.version, each)
        if (first.digest, first.definitions) != (each.digest, each.definitions):
            problem = f"policy {each.version} differs from that of partition {first.partition}"
        newest[each.partition] = max(each.version, newest.get(each.partition, 0))
        versions[each.partition].add(each.version)
        if problem:  # audits G11
            findings.add("policy", problem, partition=each.partition, seq=each.seq, event_id=each.entry_id)
    for partition in range(partitions):
        missing = sorted(by_version.keys() - versions[partition] - {max(by_version, default=0)})
        if missing:  # audits G11
            names = ", ".join(map(str, missing))
            findings.add("policy", f"policy {names} of other partitions is missing", partition=partition)


def policy_caps(policies: Sequence[AppliedPolicy]) -> Iterator[tuple[int, int, int, str, int]]:
    """Yield (partition, seq, version, subject, cap in nano-dollars) of every policy.

    Subjects: `user:<id>`, `plan:<name>`; of a further budget its name in keys, `day` or `team-week~3`, for all values,
    and that with a value, `day:<value>`.
    """
    for each in policies:
        place, policy = (each.partition, each.seq, each.version), each.policy
        if policy is None:
            continue
        yield from ((*place, f"plan:{plan}", cap) for plan, cap in policy.plan_caps_nanousd.items())
        yield from ((*place, f"user:{user}", nanousd_from_usd(cap)) for user, cap in policy.users.items())
        for rule in policy.budgets:
            since = each.definitions.get(rule.name, 1)
            name = rule.name if since == 1 else f"{rule.name}~{since}"
            yield (*place, name, nanousd_from_usd(rule.cap_usd))
            yield from ((*place, f"{name}:{value}", nanousd_from_usd(cap)) for value, cap in rule.caps.items())
