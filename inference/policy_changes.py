"""How the ledger's policy changes, and what a process does whose own policy is another one (G11).

The ledger is the only source of the policy; a file or a setting is how it gets there. It is applied to one partition
after the other, under one version. A change that ended half way is completed by the next one, before anything else.
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
# How often what was booked meanwhile is counted: a moment without a new event is enough.
_COUNTS: Final = 10_000
# Budgets that settings could define before there were policies.
_OF_SETTINGS: Final = ("day", "campaign")
_log = LazyLogger(__name__)


class PolicyDiffers(LedgerRefused):
    """This process is told another policy than the ledger's; `changes` says what its own would change."""

    def __init__(self, sources: Sequence[str], in_force: PolicyInForce, changes: Sequence[str]) -> None:
        lines = "\n".join(f"  {change}" for change in changes)
        super().__init__(
            f"{' and '.join(sources)} and policy {in_force.version} of the ledger differ:\n{lines}\n"
            "Run `tollbook policy diff` to see it, and `tollbook policy apply --reason ...` to put yours in force; or "
            "remove what differs: without a file or setting, the ledger's policy counts"
        )
        self.changes = tuple(changes)


class PolicyRefused(LedgerError):
    """A policy that cannot be in force on this ledger; `problems` says why."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems), {"problems": list(problems)})
        self.problems = tuple(problems)


@dataclass(frozen=True, slots=True)
class Applied:
    """The policy in force after `apply_policy`, and whether it is new; `completed` if a half-applied one was."""

    in_force: PolicyInForce
    is_new: bool
    completed: bool


def problems_on(policy: Policy, partitions: int) -> list[str]:
    """Return why a policy cannot be in force on a ledger of so many partitions."""
    errors = list(name_problems(policy))
    if partitions == 1:
        return errors
    # One step touches one partition only, and the users of such a budget are spread over all of them.
    return errors + [
        f"budget {rule.name} is kept by {' and '.join(rule.by) or 'nothing'}, so its users are in several of the "
        f"ledger's {partitions} partitions, and no step can compare it with its cap: keep it by user too, or use a "
        "ledger with TOLLBOOK_PARTITIONS=1"
        for rule in policy.budgets
        if "user" not in rule.by
    ]


def user_id_problems(before: Policy, policy: Policy, *, is_used: bool) -> list[str]:
    """Return why users' ids cannot be kept as a policy says, on a ledger that is in use with another one."""
    was, wanted = before.user_ids, policy.user_ids
    if was == wanted or not is_used:
        return []
    return [
        f"user_ids = {wanted!r}: users' ids are {was} on this ledger, and that is fixed since nothing on it can be "
        f"changed; keep user_ids = {was!r}, or begin another ledger (TOLLBOOK_NAMESPACE and TOLLBOOK_DATA_DIR)"
    ]


def backfill_problems(before: PolicyInForce, policy: Policy) -> list[str]:
    """Return why nothing can be counted for the budgets of a policy that is in force already; [] where it was.

    A balance is on the ledger: where a budget began without what was spent before, calls were decided by that.
    """
    is_unchanged = before.version and policy.content() == before.policy.content()
    if not is_unchanged or not policy.budgets or before.backfilled:
        return []
    return [
        f"policy {before.version} is in force already with these budgets, and --backfill counts what was spent only "
        "for budgets that are new or defined anew: what one began with does not change. Apply it under another name, "
        "and take the present one out"
    ]


async def _has_events(gates: Sequence[Gate]) -> bool:
    return any(await asyncio.gather(*(gate.has_events() for gate in gates)))


def remarks_on(
    before: PolicyInForce, policy: Policy, at_ms: int, *, prices: PriceCatalogue, backfills: bool = False
) -> list[str]:
    """Return what a person should know of a policy before it is in force; none of it keeps it from that.

    `prices` are those that would be in force with it.
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
    """Put a policy in force in every partition, unless it is in force already.

    With `based_on`, only where that version is in force, so that nobody undoes what they have not seen. If it
    `backfills`, budgets that it adds or defines anew begin with what was spent before in their window; `read_spent`
    reads that, also to complete a change that did so.
    Errors: PolicyRefused, also where it should backfill budgets that are in force without it; PolicyChanged where
        another one was applied meanwhile; PolicyUnreadable; CallsStopped; LedgerUnavailable: a repeat completes what
        was begun; those of `read_spent`.
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
    """Return what each partition has as its policy. Errors: LedgerUnavailable."""
    return tuple(await asyncio.gather(*(gate.policy() for gate in gates)))


async def _put(
    gate: Gate, request: PolicyRequest, applied: PolicyApplied, policy: Policy, read_spent: ReadSpent | None
) -> None:
    """Put a policy in force in one partition, with what its budgets begin with.

    Calls go on meanwhile: where something was booked between counting and applying, that is counted too, and the gate
    is asked again.
    """
    if not applied.backfilled:
        await gate.apply_policy(request)
        return
    if read_spent is None:
        raise PolicyRefused(
            [
                f"policy {applied.version} begins with what was spent before, and is applied in a part of the ledger "
                "only: `tollbook policy apply` completes it"
            ]
        )
    tally = _tally(policy, applied, await gate.now_ms())
    counted = await read_spent(gate.keys.partition, tally, None)
    for _ in range(_COUNTS):
        try:
            await gate.apply_policy(replace(request, opened=Opened(tally.openings(), counted.seq, tally.until_ms)))
        except EventsNotCounted:
            if (now_ms := await gate.now_ms()) >= tally.until_ms:
                tally, counted = _tally(policy, applied, now_ms), None
            counted = await read_spent(gate.keys.partition, tally, counted)
        else:
            return
    raise LedgerUnavailable(
        f"partition {gate.keys.partition}: there was no moment without a new event in {_COUNTS:,} tries, so what was "
        "spent could not be counted; apply the policy again when there are fewer calls"
    )


def _tally(policy: Policy, applied: PolicyApplied, now_ms: int) -> OpeningTally:
    return OpeningTally(policy, applied.definitions, applied.backfilled, now_ms, takes_holds=applied.takes_holds)


async def _complete(
    gates: Sequence[Gate], stored: Sequence[StoredPolicy], read_spent: ReadSpent | None
) -> tuple[StoredPolicy, bool]:
    """Bring every partition to the newest policy of any; return it, and whether one was behind."""
    newest = max(stored, key=lambda each: each.version)
    in_force = policy_in_force(newest)  # What was changed by hand goes no further.
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

    Before the first policy there may be budgets `day` and `campaign`, by settings: they keep their balances.
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
    """Return with which version each budget's definition begins, where that is later than 1.

    A budget that is new, or kept by other attributes or another window than before, begins at zero (it has another name
    in its keys); one with another cap keeps its balance.
    """
    known = {rule.name: (rule.by, rule.window) for rule in before.policy.budgets}
    since = {
        rule.name: before.definitions.get(rule.name, 1) if known.get(rule.name) == (rule.by, rule.window) else version
        for rule in policy.budgets
    }
    return {name: first for name, first in since.items() if first > 1}


def check_stated_policy(settings: Settings, in_force: PolicyInForce) -> None:
    """Refuse where a file or a setting of this process states another policy than the ledger's (G11).

    Errors: PolicyDiffers; SettingsError; LedgerUnavailable where the ledger has no policy yet to compare with.
    """
    sources = policy_sources(settings)
    changes = stated_changes(settings, in_force)
    if not changes:
        return
    if not in_force.version:
        raise LedgerUnavailable(
            f"the ledger has no policy yet that {' and '.join(sources)} could be compared with: `tollbook up`, "
            "`tollbook projector` or `tollbook policy apply` puts the first one in force"
        )
    raise PolicyDiffers(sources, in_force, changes)  # G11


def stated_changes(settings: Settings, in_force: PolicyInForce) -> list[str]:
    """Return what the file and the settings of this process would change of the ledger's policy; [] where nothing.

    A file is compared as a whole; settings alone are compared with the parts that they state. Errors: SettingsError.
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
    """Log a warning where this process states another policy than the ledger's, which counts; for what only reads."""
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
        both = f"{' and '.join(policy_sources(settings))} and policy {in_force.version} of the ledger, which counts"
        _log.warning("policy.differs", problem=f"{both}, differ: {changes[0]}{more}; see `tollbook policy diff`")


async def start_policy(
    settings: Settings, gates: Sequence[Gate], author: str, *, read_spent: ReadSpent | None = None
) -> None:
    """Do what `up` and `projector` do at their start: put in force what the file and settings here state.

    A new ledger, and one from before there were policies, gets its first policy. Later a changed file is applied where
    the ledger's policy is the one that this data directory applied last; else somebody else has changed it meanwhile,
    and a person must look. Calls that are stopped leave it for the next start. `read_spent` as for `apply_policy`.
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
                # Another process has put one in force at this moment: it is compared with that.
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
    """Note which policy this data directory applied last, so that `up` may replace it by a changed file."""
    document = {"ledger_id": ledger_id, "version": in_force.version, "digest": in_force.digest}
    try:
        make_private_folder(data_dir)
        write_private(data_dir / _APPLIED, json.dumps(document) + "\n")
    except OSError as exc:
        _log.warning("policy.not_noted", problem=f"{exc.filename}: {exc.strerror}")


def _read_applied(data_dir: Path, ledger_id: str) -> str | None:
    """Return the digest of the policy that was applied last from here; None where that is not known."""
    try:
        document = json.loads(read_private(data_dir / _APPLIED))
        return document["digest"] if document["ledger_id"] == ledger_id else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
