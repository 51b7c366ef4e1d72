"""Shows policies as text and as JSON: the one in force, changes, and earlier versions."""

from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any

from tollbook.audit.policies import PolicyVersion
from tollbook.inference.current_policy import PolicyInForce
from tollbook.inference.policy_diff import policy_changes
from tollbook.schemas.policy import BudgetRule, Policy, PriceRule
from tollbook.schemas.routes import Route, Target
from tollbook.views.audit.texts import iso, moment
from tollbook.views.tables import Printer, Row, printable


def policy_document(version: PolicyVersion | None, in_force: PolicyInForce) -> dict[str, Any]:
    """Return a policy as a JSON document; amounts are dollars, as text."""
    document: dict[str, Any] = {"version": in_force.version, "digest": in_force.digest or in_force.policy.digest}
    if version is not None:
        document |= _applied(version)
    return document | {"definitions": dict(in_force.definitions), "policy": in_force.policy.content()}


def _applied(version: PolicyVersion) -> dict[str, Any]:
    return {
        "applied_at": iso(version.event),
        "author": version.applied.author,
        "reason": version.applied.reason,
        "partitions": version.partitions,
        "backfilled": list(version.applied.backfilled),
    }


def history_document(versions: Sequence[PolicyVersion]) -> list[dict[str, Any]]:
    """Return every version as a JSON document, with its changes to the version before."""
    return [
        {"version": each.applied.version, "digest": each.applied.digest, **_applied(each), "changes": changes}
        for each, changes in _with_changes(versions)
    ]


def print_policy(version: PolicyVersion | None, in_force: PolicyInForce, *, is_newest: bool, partitions: int) -> None:
    """Print a policy: who applied it, and its tables."""
    printer, policy = Printer(), in_force.policy
    title = f"Policy {in_force.version}{', in force' if is_newest else ''}"
    if version is None:
        printer.text(f"{title}: the defaults, because no policy was applied on this ledger", "bold", indent=0)
    else:
        printer.text(title, "bold", indent=0)
        facts = [
            ("applied", f"{moment(version.event):%Y-%m-%d %H:%M:%S} UTC by {printable(version.applied.author)}"),
            ("reason", printable(version.applied.reason)),
            ("digest", version.applied.digest),
        ]
        if version.applied.backfilled:
            names = ", ".join(version.applied.backfilled)
            facts.append(("backfilled", f"{names}: with earlier spend of the window"))
        if len(version.partitions) < partitions:
            done = ", ".join(map(str, version.partitions))
            facts.append(("half applied", f"in partition {done} of {partitions}; the next apply completes it"))
        printer.facts(facts)
    _print_tables(printer, policy)


def _print_tables(printer: Printer, policy: Policy) -> None:
    printer.table(
        ("plan", "cap per billing period>", "also*?"),
        [
            [f"{name}{' (default)' * (name == policy.default_plan)}", _usd(rule.cap_usd), _alerts(rule.alerts or ())]
            for name, rule in policy.plans.items()
        ],
        "Plans",
    )
    if policy.users:
        rows = [[printable(user), _usd(cap)] for user, cap in policy.users.items()]
        printer.table(("user", "cap per billing period>"), rows, "Users with a cap of their own")
    if policy.budgets:
        rows = [[rule.name, _by(rule), rule.window, _usd(rule.cap_usd), _more(rule)] for rule in policy.budgets]
        printer.table(("budget", "by", "window", "cap>", "also*"), rows, "Further budgets")
    types = [
        Row([name, printable(str(route.first)), _limit(route)], _further_models(route))
        for name, route in policy.tasks.items()
    ]
    printer.table(("task type", "model", "max tokens>"), types, "Task types")
    if _priced(policy):
        rows = [
            [printable(model), rule.starts or "always", _usd(rule.prompt), _usd(rule.completion)]
            for model, rules in _priced(policy)
            for rule in rules
        ]
        printer.table(("model", "from", "prompt>", "completion>"), rows, "Prices per million tokens")
    if policy.providers:
        rows = [
            [name, rule.dialect, printable(rule.base_url), rule.key_env or "-", rule.price_source]
            for name, rule in policy.providers.items()
        ]
        printer.table(("provider", "dialect", "address*", "key in", "prices from"), rows, "Further providers")
    printer.line()
    clock = f"in {policy.timezone}, weeks from {policy.week_starts_on}, months from day {policy.month_starts_on}"
    streams = [f"{name} ({rule.concurrency})" if rule.concurrency else name for name, rule in policy.streams.items()]
    calls = " (concurrent calls per worker)" if any(rule.concurrency for rule in policy.streams.values()) else ""
    printer.text(f"Streams{calls}: {', '.join(streams)}. Days, weeks and months are {clock}.")


def _priced(policy: Policy) -> list[tuple[str, Sequence[PriceRule]]]:
    """Return the prices of the policy by model: those for every provider, then each provider's own."""
    own = [
        (str(Target(model, name)), rules)
        for name, rule in policy.providers.items()
        for model, rules in rule.prices.items()
    ]
    return [*policy.prices.items(), *own]


def print_changes(title: str, changes: Iterable[str]) -> None:
    """Print what differs, a line each."""
    printer = Printer()
    printer.text(f"{title}:", "bold", indent=0)
    for change in changes:
        printer.text(printable(change), hang=2)


def print_history(versions: Sequence[PolicyVersion]) -> None:
    """Print every version, the newest last, with what it changed."""
    if not versions:
        Printer().line("no policy was applied on this ledger: the defaults apply (version 0)")
        return
    for number, (version, changes) in enumerate(_with_changes(versions)):
        printer = Printer()
        if number:
            printer.line()
        applied = version.applied
        printer.text(
            f"{applied.version}  {moment(version.event):%Y-%m-%d %H:%M:%S} UTC  {printable(applied.author)}: "
            f"{printable(applied.reason)}",
            "bold",
            indent=0,
            hang=3,
        )
        if applied.backfilled:
            changes = [*changes, f"backfilled with earlier spend: budget {', '.join(applied.backfilled)}"]
        for change in changes or ["no change to the version before"]:
            printer.text(printable(change), indent=3, hang=2)


def _with_changes(versions: Sequence[PolicyVersion]) -> Iterable[tuple[PolicyVersion, list[str]]]:
    before = PolicyInForce()
    for version in versions:
        after = version.in_force
        yield version, [change.text for change in policy_changes(before.policy, after.policy)]
        before = after


def _usd(usd: object) -> str:
    return f"${usd:,f}"


def _by(rule: BudgetRule) -> str:
    return " and ".join(rule.by) or "all together"


def _limit(route: Route) -> str:
    return "embeddings" if route.max_tokens is None else f"{route.max_tokens:,}"


def _more(rule: BudgetRule) -> str:
    parts = [f"{printable(value)} {_usd(cap)}" for value, cap in rule.caps.items()]
    return ", ".join([*parts, *([_alerts(rule.alerts)] if rule.alerts else [])])


def _alerts(fractions: Sequence[Decimal]) -> str:
    return f"alerts at {', '.join(f'{100 * float(part):.4g}%' for part in fractions)}" if fractions else ""


def _further_models(route: Route) -> list[str]:
    """Return a line of fallbacks, and one of the cheaper model."""
    names = [printable(str(target)) for target in route.fallbacks]
    lines = [f"fallback {', '.join(names)}"] if names else []
    return [*lines, f"cheaper {printable(str(route.cheaper_target))}"] if route.cheaper_target else lines
