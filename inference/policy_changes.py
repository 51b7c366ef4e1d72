"""Changing the ledger's policy, and comparing it with the file and settings of a process (G11).

The ledger is the only source of the policy; a file or a setting only brings a policy there. A policy is applied to one
partition after the other, under one version. A half-applied change is completed before the next one.
"""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

from tollbook.inference.budgets import name_problems, window_problems
from tollbook.inference.current_policy import PolicyInForce, policy_in_force
from tollbook.inference.errors import SettingsError
from tollbook.inference.opening_balances import OpeningTally, ReadSpent
from tollbook.inference.policy_diff import policy_changes
from tollbook.inference.prices.catalogue import PriceCatalogue
from tollbook.inference.routing import policy_warnings
from tollbook.inference.settings import Settings
from tollbook.inference.stated_policy import policy_of, policy_path, policy_sources, with_shorthand
from tollbook.ledger.errors import CallsStopped, LedgerError, LedgerRefused, LedgerUnavailable, PolicyChanged
from tollbook.ledger.gate.gate import Gate
from tollbook.ledger.gate.policies import EventsNotCounted, Opened, PolicyRequest, StoredPolicy
from tollbook.ledger.logs import LazyLogger
from tollbook.ledger.private_files import make_private_folder, read_private, write_private
from tollbook.ledger.signature import Signature
from tollbook.schemas.events import PolicyApplied, payload_json
from tollbook.schemas.policy import Policy

_APPLIED: Final = "applied-policy.json"
# How often a policy with opening balances is tried: the gate refuses it while there are events that are not counted.
_MAX_COUNTS: Final = 10_000
# The budgets that settings could define before there were policies.
_OF_SETTINGS: Final = ("day", "campaign")
_log = LazyLogger(__name__)


class PolicyDiffers(LedgerRefused):
    """The file or settings of this process differ from the ledger's policy; `changes` are the differences."""

    def __init__(self, sources: Sequence[str], in_force: PolicyInForce, changes: Sequence[str]) -> None:
        lines = "\n".join(f"  {change}" for change in changes)
        super().__init__(
            f"{' and '.join(sources)} and policy {in_force.version} of the ledger differ:\n{lines}\n"
            "Run `tollbook policy diff` to see it, and `tollbook policy apply --reason ...` to put yours in force; or "
            "remove what differs: without a file or setting, the ledger's policy counts"
        )
        self.changes = tuple(changes)


class PolicyRefused(LedgerError):
    """A policy that cannot be applied to this ledger; `problems` says why."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems), {"problems": list(problems)})
        self.problems = tuple(problems)


@dataclass(frozen=True, slots=True)
class Applied:
    """The policy in force after `apply_policy`, whether it is new, and whether a half-applied one was completed."""

    in_force: PolicyInForce
    is_new: bool
    completed: bool


def problems_on(policy: Policy, partitions: int) -> list[str]:
    """Return why a policy cannot be applied to a ledger with this number of partitions."""
    errors = list(name_problems(policy))
    if partitions == 1:
        return errors
    # The gate checks within one partition, but the users of such a budget are spread over all partitions.
    return errors + [
        f"budget {rule.name} is kept by {' and '.join(rule.by) or 'nothing'}, so its users are in several of the "
        f"ledger's {partitions} partitions, and its cap cannot be checked: keep it by user too, or use a ledger with "
        "TOLLBOOK_PARTITIONS=1"
        for rule in policy.budgets
        if "user" not in rule.by
    ]


def user_id_problems(before: Policy, policy: Policy, *, is_used: bool) -> list[str]:
    """Return why a policy cannot change the `user_ids` of a ledger that is in use."""
    old, new = before.user_ids, policy.user_ids
    if old == new or not is_used:
        return []
    return [
        f"user_ids = {new!r}: users' ids are {old} on this ledger, which cannot be changed later; keep user_ids = "
        f"{old!r}, or start another ledger (TOLLBOOK_NAMESPACE and TOLLBOOK_DATA_DIR)"
    ]


def backfill_problems(before: PolicyInForce, policy: Policy) -> list[str]:
    """Return why `--backfill` is refused for a policy that is already in force; [] if it is not refused.

    A budget that began without its earlier spend cannot get it later: calls were already decided by its balance.
    """
    is_unchanged = before.version and policy.content() == before.policy.content()
    if not is_unchanged or not policy.budgets or before.backfilled:
        return []
    return [
        f"policy {before.version} is already in force with these budgets. --backfill counts earlier spend only for "
        "budgets that are new or defined anew; the balance of a budget in force is not changed. Remove the budget from "
        "the policy, and add it under another name"
    ]


async def _has_events(gates: Sequence[Gate]) -> bool:
    return any(await asyncio.gather(*(gate.has_events() for gate in gates)))


def remarks_on(
    before: PolicyInForce, policy: Policy, at_ms: int, *, prices: PriceCatalogue, backfills: bool = False
) -> list[str]:
    """Return what a person should know about a policy before it is applied. A remark does not prevent that.

    `prices` are the prices that would be in force with the policy.
    """
    begin = "what was spent in its window before" if backfills else "zero"
    known = {rule.name for rule in before.policy.budgets}
    added = new_budgets(before, policy)
    remarks = policy_warnings(policy, prices, at_ms) + [
        f"budget {name} is kept by other attributes or another window: it begins at {begin}"
        if name in known
        else f"budget {name} is new: it begins at {begin}"
        for name in added
        if name in known or (backfills and before.version)
    ]
    if backfills and not added and policy.content() != before.policy.content():
        remarks.append("no budget is new or defined anew, so --backfill counts nothing")
    return remarks


async def apply_policy(
    gates: Sequence[Gate],
    policy: Policy,
    signature: Signature,
    *,
    based_on: int | None = None,
    read_spent: ReadSpent | None = None,
    backfills: bool = False,
) -> Applied:
    """Put a policy in force in every partition, unless it is already in force.

    With `based_on`, do so only if that version is in force, so that nobody undoes a change that they have not seen.
    With `backfills`, budgets that the policy adds or redefines begin with the earlier spend in their window.
    `read_spent` reads that spend; it is also needed to complete a half-applied change with `backfills`.
    Errors: PolicyRefused, also for `backfills` of budgets that are already in force; PolicyChanged if another policy
        was applied meanwhile; PolicyUnreadable; CallsStopped; LedgerUnavailable: a repeat completes the change; those
        of `read_spent`.
    """
    stored = await read_stored(gates)
    newest, completed = await _complete(gates, stored, read_spent)
    in_force = policy_in_force(newest)
    if based_on is not None and in_force.version != based_on:
        raise PolicyChanged(in_force.version)
    if backfills and (problems := backfill_problems(in_force, policy)):
        raise PolicyRefused(problems)
    if newest.version and policy.content() == in_force.policy.content():
        return Applied(in_force, is_new=False, completed=completed)
    is_used = bool(in_force.version) or await _has_events(gates)
    problems = problems_on(policy, len(gates)) + user_id_problems(in_force.policy, policy, is_used=is_used)
    if in_force.version:
        problems += window_problems(in_force.policy, policy, await gates[0].now_ms())
    if problems:
        raise PolicyRefused(problems)  # G11
    version = newest.version + 1
    definitions = next_definitions(in_force, policy, version)
    backfilled = new_budgets(in_force, policy) if backfills else ()
    applied = PolicyApplied(
        version=version,
        digest=policy.digest,
        content=policy.content(),
        definitions=definitions,
        backfilled=backfilled,
        takes_holds=bool(backfilled),
        author=signature.author,
        reason=signature.reason,
    )
    request = PolicyRequest(
        in_force=newest.version, version=version, digest=applied.digest, payload=payload_json(applied)
    )
    for gate in gates:
        await _put(gate, request, applied, policy, read_spent)
    _log.info("policy.applied", version=version, digest=applied.digest, author=signature.author)
    made = StoredPolicy(version, applied.digest, request.payload)
    return Applied(policy_in_force(made), is_new=True, completed=completed)


async def read_stored(gates: Sequence[Gate]) -> tuple[StoredPolicy, ...]:
    """Return the stored policy of each partition. Errors: LedgerUnavailable."""
    return tuple(await asyncio.gather(*(gate.policy() for gate in gates)))


async def _put(
    gate: Gate, request: PolicyRequest, applied: PolicyApplied, policy: Policy, read_spent: ReadSpent | None
) -> None:
    """Put a policy in force in one partition, with the opening balances of its budgets.

    Calls go on meanwhile. If an event was appended between counting and applying, the gate refuses; then the new events
    are counted, and the gate is asked again.
    """
    if not applied.backfilled:
        await gate.apply_policy(request)
        return
    if read_spent is None:
        raise PolicyRefused(
            [
                f"policy {applied.version} begins with what was spent before, but is applied in only some partitions: "
                "complete it with `tollbook policy apply`"
            ]
        )
    tally = _tally(policy, applied, await gate.now_ms())
    counted = await read_spent(gate.keys.partition, tally, None)
    for _ in range(_MAX_COUNTS):
        try:
            await gate.apply_policy(replace(request, opened=Opened(tally.openings(), counted.seq, tally.until_ms)))
        except EventsNotCounted:
            if (now_ms := await gate.now_ms()) >= tally.until_ms:
                tally, counted = _tally(policy, applied, now_ms), None
            counted = await read_spent(gate.keys.partition, tally, counted)
        else:
            return
    raise LedgerUnavailable(
        f"partition {gate.keys.partition}: new events came in each of {_MAX_COUNTS:,} tries, so the earlier spend "
        "could not be counted; apply the policy again when there are fewer calls"
    )


def _tally(policy: Policy, applied: PolicyApplied, now_ms: int) -> OpeningTally:
    return OpeningTally(policy, applied.definitions, applied.backfilled, now_ms, takes_holds=applied.takes_holds)


async def _complete(
    gates: Sequence[Gate], stored: Sequence[StoredPolicy], read_spent: ReadSpent | None
) -> tuple[StoredPolicy, bool]:
    """Bring every partition to the newest stored policy; return that policy, and whether a partition was behind."""
    newest = max(stored, key=lambda each: each.version)
    in_force = policy_in_force(newest)  # Refuses a policy that was changed by hand.
    behind = [(gate, each) for gate, each in zip(gates, stored, strict=True) if each.version < newest.version]
    for gate, each in behind:
        request = PolicyRequest(
            in_force=each.version, version=newest.version, digest=newest.digest, payload=newest.payload
        )
        applied = PolicyApplied.model_validate_json(newest.payload)
        await _put(gate, request, applied, in_force.policy, read_spent)
    if behind:
        _log.warning("policy.completed", version=newest.version, partitions=len(behind))
    return newest, bool(behind)


def new_budgets(before: PolicyInForce, policy: Policy) -> tuple[str, ...]:
    """Return the budgets of a policy that are new, or kept by other attributes or another window than before.

    Before the first policy, settings may have defined the budgets `day` and `campaign`: these keep their balances.
    """
    known = {rule.name: (rule.by, rule.window) for rule in before.policy.budgets}
    kept = () if before.version else _OF_SETTINGS
    return tuple(
        sorted(
            rule.name
            for rule in policy.budgets
            if rule.name not in kept and known.get(rule.name) != (rule.by, rule.window)
        )
    )


def next_definitions(before: PolicyInForce, policy: Policy, version: int) -> dict[str, int]:
    """Return, by budget, the version in which its current definition began; version 1 is left out.

    A budget that is new, or kept by other attributes or another window than before, begins at zero, under another name
    in its keys. A budget with only another cap keeps its balance.
    """
    known = {rule.name: (rule.by, rule.window) for rule in before.policy.budgets}
    since = {
        rule.name: before.definitions.get(rule.name, 1) if known.get(rule.name) == (rule.by, rule.window) else version
        for rule in policy.budgets
    }
    return {name: first for name, first in since.items() if first > 1}


def check_stated_policy(settings: Settings, in_force: PolicyInForce) -> None:
    """Refuse to start if the file or the settings of this process differ from the ledger's policy (G11).

    Errors: PolicyDiffers; SettingsError; LedgerUnavailable if the ledger has no policy yet to compare with.
    """
    sources = policy_sources(settings)
    changes = stated_changes(settings, in_force)
    if not changes:
        return
    if not in_force.version:
        raise LedgerUnavailable(
            f"the ledger has no policy yet, so {' and '.join(sources)} cannot be compared with it: `tollbook up`, "
            "`tollbook projector` or `tollbook policy apply` puts the first policy in force"
        )
    raise PolicyDiffers(sources, in_force, changes)  # G11


def stated_changes(settings: Settings, in_force: PolicyInForce) -> list[str]:
    """Return what the file and the settings of this process would change in the ledger's policy.

    A file is compared as a whole; settings without a file are compared only with the parts that they set.
    Errors: SettingsError.
    """
    if not policy_sources(settings):
        return []
    if policy_path(settings) is not None:
        return [change.text for change in policy_changes(in_force.policy, policy_of(settings))]
    try:
        stated = with_shorthand(settings, in_force.policy, f"policy {in_force.version} of the ledger")
    except SettingsError as exc:
        return list(exc.problems)
    return [change.text for change in policy_changes(in_force.policy, stated)]


def warn_of_difference(settings: Settings, stored: StoredPolicy) -> None:
    """Log a warning if the file or settings of this process differ from the ledger's policy, which is in force.

    For programs that only read.
    """
    if not policy_sources(settings):
        return
    try:
        in_force = policy_in_force(stored)
        changes = stated_changes(settings, in_force)
    except (LedgerRefused, SettingsError) as exc:
        _log.warning("policy.not_compared", problem=str(exc))
        return
    if changes:
        more = f", and {len(changes) - 1} more" * (len(changes) > 1)
        both = f"{' and '.join(policy_sources(settings))} and policy {in_force.version} of the ledger, which is used"
        _log.warning("policy.differs", problem=f"{both}, differ: {changes[0]}{more}; see `tollbook policy diff`")


async def start_policy(
    settings: Settings, gates: Sequence[Gate], author: str, *, read_spent: ReadSpent | None = None
) -> None:
    """Apply the file and settings of this process, when `up` or `projector` starts.

    A ledger without a policy gets its first policy. Later, a changed file is applied only if the ledger still has the
    policy that this data directory applied last. Otherwise somebody else has changed the policy, and a person must
    decide. While calls are stopped, nothing is applied until the next start. `read_spent` as for `apply_policy`.
    Errors: PolicyDiffers; PolicyRefused; SettingsError; PolicyUnreadable; LedgerUnavailable; LedgerRefused.
    """
    ledger_id = gates[0].ledger_id
    try:
        newest, _ = await _complete(gates, await read_stored(gates), read_spent)
        in_force = policy_in_force(newest)
        step = _first_step(settings, in_force, await asyncio.to_thread(_read_applied, settings.data_dir, ledger_id))
        if step == "apply":
            reason = ", ".join(policy_sources(settings)) or "the default policy"
            signature = Signature(author, f"start with {reason}")
            try:
                applied = await apply_policy(gates, policy_of(settings), signature, based_on=in_force.version)
            except PolicyChanged:
                # Another process has just applied a policy: compare with that one.
                in_force = policy_in_force(max(await read_stored(gates), key=lambda each: each.version))
                check_stated_policy(settings, in_force)
            else:
                in_force = applied.in_force
        if step != "follow":
            await asyncio.to_thread(remember_applied, settings.data_dir, ledger_id, in_force)
    except CallsStopped as exc:
        _log.warning("policy.not_applied", problem=str(exc))


def _first_step(
    settings: Settings, in_force: PolicyInForce, applied_digest: str | None
) -> Literal["apply", "agree", "follow"]:
    if not in_force.version:
        return "apply"
    if not policy_sources(settings):
        return "follow"
    if not stated_changes(settings, in_force):
        return "agree"
    if applied_digest == in_force.digest:
        return "apply"
    raise PolicyDiffers(policy_sources(settings), in_force, stated_changes(settings, in_force))  # G11


def remember_applied(data_dir: Path, ledger_id: str, in_force: PolicyInForce) -> None:
    """Note which policy this data directory applied last, so that `up` may replace it when the file changes."""
    document = {"ledger_id": ledger_id, "version": in_force.version, "digest": in_force.digest}
    try:
        make_private_folder(data_dir)
        write_private(data_dir / _APPLIED, json.dumps(document) + "\n")
    except OSError as exc:
        _log.warning("policy.not_noted", problem=f"{exc.filename}: {exc.strerror}")


def _read_applied(data_dir: Path, ledger_id: str) -> str | None:
    """Return the digest of the policy that this data directory applied last; None if unknown."""
    try:
        document = json.loads(read_private(data_dir / _APPLIED))
        return document["digest"] if document["ledger_id"] == ledger_id else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
