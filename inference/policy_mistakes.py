"""Mistakes in a policy file that is valid otherwise: entries without effect, or with another effect on other machines.

They are refused only in files. A policy that is already on a ledger is read even with such mistakes.
"""

from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Final

from tollbook.inference.setting_addresses import check_base_url
from tollbook.inference.toml_lines import Place
from tollbook.schemas.identifiers import read_values
from tollbook.schemas.policy import ATTRIBUTES, CHAT, EMBED, BudgetRule, Policy
from tollbook.schemas.problems import shown, unknown_name
from tollbook.schemas.tasks import Task

# Time zones that differ between machines, and the prefix of zones that count leap seconds, which clocks do not count.
_NO_ZONES: Final = ("localtime", "posixrules", "Factory")
_LEAP_SECONDS: Final = "right/"
_NO_TAGS: Final = frozenset(Task.model_fields) - frozenset(ATTRIBUTES)
_MEANT: Final[Mapping[str, str]] = {"user_id": "user", "campaign_id": "campaign"}


def mistakes_in(policy: Policy) -> Iterator[tuple[Place, str]]:
    """Yield the place of each mistake, and a sentence about it."""
    zone = policy.timezone
    if zone in _NO_ZONES or zone.startswith(_LEAP_SECONDS):
        reason = "it is not the same on every machine, or counts leap seconds"
        yield ("timezone",), f"'timezone' must be a zone such as 'Europe/Berlin', not {shown(zone)}: {reason}"
    for name, provider in policy.providers.items():
        try:
            check_base_url(provider.base_url)
        except ValueError as exc:
            yield ("providers", name, "base_url"), f"'providers.{name}.base_url' {exc}"
    for name, plan in policy.plans.items():
        yield from _repeated(("plans", name, "alerts"), f"plans.{name}.alerts", plan.alerts or ())
    for number, rule in enumerate(policy.budgets):
        yield from _mistakes_in_budget(number, rule, policy)


def _mistakes_in_budget(number: int, rule: BudgetRule, policy: Policy) -> Iterator[tuple[Place, str]]:
    place, words = ("budgets", number), f"budgets[{number}]"
    yield from _repeated((*place, "alerts"), f"{words}.alerts", rule.alerts)
    yield from _repeated((*place, "by"), f"{words}.by", rule.by)
    for name in rule.by:
        if name in _NO_TAGS:  # No call has this attribute, so no call would be held against the budget (G1).
            meant = f"; did you mean {_MEANT[name]!r}?" if name in _MEANT else ""
            yield (*place, "by"), f"'{words}.by' has {name!r}, a field of tasks that is no tag{meant}"
    known = {"plan": tuple(policy.plans), "task": (*policy.task_types, CHAT, EMBED)}
    for value in rule.caps:
        for attribute, part in zip(rule.by, read_values(value, len(rule.by)), strict=True):
            if attribute in known and part not in known[attribute]:
                kind = {"plan": "plan", "task": "task type"}[attribute]
                yield (*place, "caps", value), f"'{words}.caps' has an {unknown_name(kind, part, known[attribute])}"


def _repeated(place: Place, words: str, entries: Sequence[str | Decimal]) -> Iterator[tuple[Place, str]]:
    """Yield each entry of a list that repeats an earlier one."""
    for number, entry in enumerate(entries):
        if entry in entries[:number]:
            yield (*place, number), f"'{words}' has {entry} twice"
