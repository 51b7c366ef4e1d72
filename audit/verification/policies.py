"""Verifies the policies on the ledger (G11): their events, and the caps that they set at each position.

The cap at a hold comes from the policy in force there: for the user, the plan or the budget. SQL adds caps assigned to
the user, and credit. Events before the first policy are not checked, as there is no policy to compare them with.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import duckdb
from pydantic import ValidationError

from tollbook.audit.verification.findings import Findings
from tollbook.inference.opening_balances import EVENT_TYPES, OpeningTally, SpentRow
from tollbook.ledger.gate.policies import Opening
from tollbook.schemas.identifiers import EntryId, describe_budget
from tollbook.schemas.money import nanousd_from_usd
from tollbook.schemas.policy import Policy, digest_of
from tollbook.schemas.problems import as_text, problems_of

# What each budget was opened with, and the policy just before: both are of one step.
_OPENED: Final = """
    SELECT
        o.partition, p.seq, o.budget, nanousd(sum(o.amount_usd))::BIGINT, nanousd(sum(o.hold_usd))::BIGINT,
        list(o.holds), min(o.seq), arg_min(o.id, o.seq)
    FROM (
        SELECT partition, seq, id, amount_usd, coalesce(hold_usd, 0) AS hold_usd, payload->>'holds' AS holds,
            (payload->>'policy_version')::INTEGER AS version,
            unnest(from_json(payload->'budgets', '[{"budget": "VARCHAR"}]')).budget AS budget
        FROM events WHERE type = 'budget-opened'
    ) AS o
    ASOF LEFT JOIN policies AS p ON p.partition = o.partition AND p.version = o.version AND p.seq < o.seq
    GROUP BY ALL
"""
_LAST_OTHER: Final = "SELECT partition, max(seq) FROM events WHERE type <> 'budget-opened' GROUP BY partition"
_SPENT: Final = """
    SELECT epoch_ms(recorded_at), type, user_id, call_id, nanousd(amount_usd), payload::VARCHAR
    FROM events
    WHERE partition = ? AND seq < ? AND recorded_at >= make_timestamptz(?::BIGINT * 1000) AND type IN (SELECT unnest(?))
    ORDER BY seq
"""


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
    backfilled: tuple[str, ...] = ()
    takes_holds: bool = False
    is_recovered: bool = False


def read_policies(cursor: duckdb.DuckDBPyConnection) -> list[AppliedPolicy]:
    """Return the policies of a projection, in order within each partition. Errors: duckdb.Error."""
    rows = cursor.execute(
        "SELECT p.partition, p.seq, p.id, p.version, p.digest, p.definitions, p.content, "
        "coalesce(from_json(e.payload->'backfilled', '[\"VARCHAR\"]'), []), "
        "coalesce((e.payload->>'takes_holds')::BOOLEAN, false), e.payload->>'recovered_id' IS NOT NULL "
        "FROM policies AS p JOIN events AS e ON e.partition = p.partition AND e.seq = p.seq ORDER BY p.partition, p.seq"
    ).fetchall()
    return [_read(*row) for row in rows]


def _read(
    partition: int,
    seq: int,
    entry_id: str,
    version: int,
    digest: str,
    definitions: str,
    text: str,
    backfilled: list[str],
    takes_holds: bool,
    is_recovered: bool,
) -> AppliedPolicy:
    content: Any = json.loads(text)
    policy, problem = None, None
    try:
        policy = Policy.model_validate(content)
    except ValidationError as exc:
        problem = f"policy {version} cannot be read: {as_text(problems_of(exc, Policy))}"
    if digest_of(content) != digest:
        problem = f"policy {version} has another content than its digest says"
    return AppliedPolicy(
        partition,
        seq,
        entry_id,
        version,
        digest,
        json.loads(definitions),
        policy,
        problem,
        tuple(backfilled),
        takes_holds,
        is_recovered,
    )


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


def check_openings(
    cursor: duckdb.DuckDBPyConnection,
    policies: Sequence[AppliedPolicy],
    trusted: Mapping[int, int],
    findings: Findings,
) -> None:
    """Compute again the earlier spend that budgets opened with, and compare: nothing else may open one.

    What `tollbook recover` has entered again is what was lost, whatever was spent since. Errors: duckdb.Error.
    """
    rows = cursor.execute(_OPENED).fetchall()
    last_other = dict(cursor.execute(_LAST_OTHER).fetchall())
    for each in policies:
        found = {row[2]: row for row in rows if (row[0], row[1]) == (each.partition, each.seq)}
        if each.policy is None or each.is_recovered or each.seq <= trusted.get(each.partition, 0):
            continue
        if not found and not each.backfilled:
            continue
        at_ms = EntryId.parse(each.entry_id).ms
        tally = OpeningTally(each.policy, each.definitions, each.backfilled, at_ms, takes_holds=each.takes_holds)
        spent = cursor.execute(_SPENT, [each.partition, each.seq, tally.since_ms, list(EVENT_TYPES)]).fetchall()
        tally.add(SpentRow(*row) for row in spent)
        expected = {opening.budget: opening for opening in tally.openings()}
        # An archive by itself may end within the step that applied the policy: openings are then in what follows.
        is_whole = last_other[each.partition] > each.seq
        for budget in sorted(expected.keys() | found.keys() if is_whole else found.keys()):
            given = expected.get(budget, Opening(budget, 0, 0))
            opened = _opening_of(found[budget]) if budget in found else _Opened(0, 0, ())
            seq, entry_id = found[budget][6:] if budget in found else (each.seq, each.entry_id)
            if problem := _difference(opened, given):  # audits G1 G11
                findings.add(
                    "policy",
                    f"{describe_budget(budget)}: {problem.format(policy=each.version)}",
                    partition=each.partition,
                    seq=seq,
                    event_id=entry_id,
                )
    known = {(each.partition, each.seq) for each in policies}
    for partition, policy_seq, budget, _, _, _, seq, entry_id in rows:
        if (partition, policy_seq) not in known and seq > trusted.get(partition, 0):  # audits G11
            problem = f"{describe_budget(budget)}: is opened by no policy"
            findings.add("policy", problem, partition=partition, seq=seq, event_id=entry_id)


class _Opened(NamedTuple):
    """A budget's opening spend by its events, in nano-dollars; `holds` are (call id, number, amount)."""

    spent: int
    held: int
    holds: tuple[tuple[str, int, int], ...]


def _opening_of(row: tuple[Any, ...]) -> _Opened:
    holds = [hold for text in row[5] if text is not None for hold in json.loads(text)]
    return _Opened(row[3], row[4], tuple((hold["call_id"], hold["hold"], hold["amount_nanousd"]) for hold in holds))


def _difference(opened: _Opened, given: Opening) -> str:
    """Return how an opening differs from the one that the events before give; '' where it does not."""
    if opened.spent != given.spent_nanousd:
        begun, spent = opened.spent, given.spent_nanousd
        return f"begins with {begun} nano-dollars by policy {{policy}}, the events before give {spent}"
    holds = sorted((hold.call_id, hold.hold, hold.amount_nanousd) for hold in given.holds)
    if opened.held != (held := sum(amount for *_, amount in holds)):
        return f"begins with holds of {opened.held} nano-dollars by policy {{policy}}, the events before give {held}"
    if sorted(opened.holds) != holds:
        return f"begins with {len(opened.holds)} holds by policy {{policy}}, the events before give {len(holds)} others"
    return ""


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
