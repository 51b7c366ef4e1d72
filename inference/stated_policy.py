"""The stated policy of a process: the policy file, and the settings that are shorthand for parts of it.

The policy in force is the ledger's. The stated policy is applied to a new ledger, and compared with an existing one's.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

from pydantic import ValidationError

from tollbook.inference.errors import SettingsError, UnknownStream
from tollbook.inference.policy_file import POLICY_FILE, PolicyFile, read_policy_file
from tollbook.inference.routing import routing_with
from tollbook.inference.setting_tables import CapTable, ConcurrencyTable
from tollbook.schemas.money import usd_from_nanousd
from tollbook.schemas.policy import BudgetRule, Policy, PriceRule, default_policy
from tollbook.schemas.problems import problems_of, shown, unknown_name
from tollbook.schemas.windows import WindowKind

# The settings that define a budget, with the budget's name, attribute and window.
_BUDGETS: Final[Mapping[str, tuple[str, str, WindowKind]]] = {
    "TOLLBOOK_DAY_CAP_USD": ("day", "user", "day"),
    "TOLLBOOK_CAMPAIGN_CAP_USD": ("campaign", "campaign", "month"),
}


class PolicySettings(Protocol):
    """The settings that are a part of the stated policy."""

    @property
    def policy_file(self) -> Path | None: ...  # noqa: D102 - as in `Settings`.
    @property
    def caps(self) -> CapTable: ...  # noqa: D102
    @property
    def routes(self) -> Mapping[str, Mapping[str, object]]: ...  # noqa: D102
    @property
    def prices(self) -> Mapping[str, tuple[PriceRule, ...]]: ...  # noqa: D102
    @property
    def day_cap_nanousd(self) -> int | None: ...  # noqa: D102
    @property
    def campaign_cap_nanousd(self) -> int | None: ...  # noqa: D102
    @property
    def concurrency(self) -> ConcurrencyTable: ...  # noqa: D102


def policy_of(settings: PolicySettings) -> Policy:
    """Return the policy of the file and of the shorthand settings, completed by the defaults.

    Errors: SettingsError, one line for each problem; also if file and shorthand differ about the same thing.
    """
    path = policy_path(settings)
    file = PolicyFile(Path(POLICY_FILE), {}, default_policy()) if path is None else read_policy_file(path)
    return _Merge(file).policy_with(settings)


def with_shorthand(settings: PolicySettings, base: Policy, name: str) -> Policy:
    """Return a policy with the shorthand settings applied; `name` is the policy's name, for messages.

    Errors: SettingsError if both have the same user, price or budget, but differ about it.
    """
    return _Merge(PolicyFile(Path(name), {}, base)).policy_with(settings)


def policy_sources(settings: PolicySettings) -> tuple[str, ...]:
    """Return the names of the policy file and of the shorthand settings that are set; () without any."""
    path = policy_path(settings)
    shorthand = {
        "TOLLBOOK_CAPS": settings.caps != CapTable(),
        "TOLLBOOK_ROUTES": bool(settings.routes),
        "TOLLBOOK_PRICES": bool(settings.prices),
        "TOLLBOOK_DAY_CAP_USD": settings.day_cap_nanousd is not None,
        "TOLLBOOK_CAMPAIGN_CAP_USD": settings.campaign_cap_nanousd is not None,
    }
    return (*(() if path is None else (str(path),)), *(name for name, is_given in shorthand.items() if is_given))


def concurrency_of(settings: PolicySettings, policy: Policy) -> dict[str, int]:
    """Return the concurrent calls per worker of each stream of a policy; TOLLBOOK_CONCURRENCY takes precedence.

    Errors: SettingsError if it names a stream that the policy does not have.
    """
    table = settings.concurrency
    unknown = [unknown_name("stream", name, policy.streams) for name in table.streams if name not in policy.streams]
    if unknown:
        raise SettingsError([f"TOLLBOOK_CONCURRENCY: {problem}" for problem in unknown])
    return {name: table.streams.get(name) or rule.concurrency or table.default for name, rule in policy.streams.items()}


def chosen_streams(names: Sequence[str], policy: Policy) -> tuple[str, ...]:
    """Return the streams that a worker serves: the named ones, or without names all of the policy.

    Errors: UnknownStream.
    """
    unknown = [name for name in names if name not in policy.streams]
    if unknown:
        raise UnknownStream([unknown_name("stream", name, policy.streams) for name in unknown])
    return tuple(names) or tuple(policy.streams)


def policy_path(settings: PolicySettings) -> Path | None:
    """Return the policy file: the one in TOLLBOOK_POLICY, else `tollbook.toml` in the working directory, or None.

    Errors: SettingsError if TOLLBOOK_POLICY names no file.
    """
    named = settings.policy_file
    if named is not None:
        if not _is_file(named):
            raise SettingsError([f"TOLLBOOK_POLICY: there is no file {shown(str(named))}"])
        return named
    path = Path(POLICY_FILE)
    return path if path.exists() else None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # The path is not a valid file name.
        return False


class _Merge:
    """Applies the shorthand settings to the policy of a file, and collects the contradictions."""

    def __init__(self, file: PolicyFile) -> None:
        self._file = file
        self._problems: list[str] = []

    def policy_with(self, settings: PolicySettings) -> Policy:
        base = self._file.policy
        changes: dict[str, Any] = {
            "plans": self._plans(settings.caps),
            "users": self._users(settings.caps),
            "tasks": self._tasks(settings.routes),
            "prices": self._prices(settings.prices),
            "budgets": self._budgets(settings),
        }
        self._compare_concurrency(settings.concurrency)
        if self._problems:
            raise SettingsError(self._problems)
        try:
            return Policy.model_validate({**dict(base), **changes})
        except ValidationError as exc:  # Each part is valid, but not their combination.
            raise SettingsError(problems_of(exc, Policy)) from None

    def _plans(self, caps: CapTable) -> dict[str, Any]:
        plans: dict[str, Any] = dict(self._file.policy.plans)
        for name, cap_nanousd in caps.plans.items():
            if name not in plans:
                self._problems.append(f"TOLLBOOK_CAPS: {unknown_name('plan', name, plans)}")
                continue
            cap_usd = usd_from_nanousd(cap_nanousd)
            if cap_usd != plans[name].cap_usd:
                self._refuse_if_in_file("TOLLBOOK_CAPS", f"the cap of plan {name!r}", "plans", name, "cap_usd")
            plans[name] = {**dict(plans[name]), "cap_usd": cap_usd}
        return plans

    def _users(self, caps: CapTable) -> dict[str, Any]:
        users: dict[str, Any] = dict(self._file.policy.users)
        for user_id, cap_nanousd in caps.users.items():
            cap_usd = usd_from_nanousd(cap_nanousd)
            if users.get(user_id, cap_usd) != cap_usd:
                self._refuse("TOLLBOOK_CAPS", f"the cap of user {user_id!r}")
            users[user_id] = cap_usd
        return users

    def _tasks(self, overrides: Mapping[str, Mapping[str, object]]) -> dict[str, Any]:
        before = self._file.policy.tasks
        try:
            routes = routing_with(overrides, before)
        except SettingsError as exc:
            self._problems += [f"TOLLBOOK_ROUTES: {problem}" for problem in exc.problems]
            return dict(before)
        for name, fields in overrides.items():
            for field in fields:
                if getattr(routes[name], field) != getattr(before[name], field):
                    self._refuse_if_in_file("TOLLBOOK_ROUTES", f"{field!r} of {name!r}", "tasks", name, field)
        return dict(routes)

    def _prices(self, given: Mapping[str, tuple[PriceRule, ...]]) -> dict[str, Any]:
        prices = dict(self._file.policy.prices)
        for model, rules in given.items():
            if prices.get(model, rules) != rules:
                self._refuse("TOLLBOOK_PRICES", f"the price of {model!r}")
            prices[model] = rules
        return dict(prices)

    def _budgets(self, settings: PolicySettings) -> Sequence[BudgetRule]:
        budgets = {rule.name: rule for rule in self._file.policy.budgets}
        caps = (settings.day_cap_nanousd, settings.campaign_cap_nanousd)
        for (setting, (name, attribute, window)), cap_nanousd in zip(_BUDGETS.items(), caps, strict=True):
            if cap_nanousd is None:
                continue
            rule = BudgetRule(name=name, by=(attribute,), window=window, cap_usd=usd_from_nanousd(cap_nanousd))
            if budgets.setdefault(name, rule) != rule:
                self._refuse(setting, f"the budget {name!r}")
        return tuple(budgets.values())

    def _compare_concurrency(self, table: ConcurrencyTable) -> None:
        """Check that the setting does not contradict the file, although it is not a part of the policy."""
        for stream, calls in table.streams.items():
            rule = self._file.policy.streams.get(stream)
            if rule is not None and rule.concurrency != calls:
                subject = f"the concurrency of stream {stream!r}"
                self._refuse_if_in_file("TOLLBOOK_CONCURRENCY", subject, "streams", stream, "concurrency")

    def _refuse_if_in_file(self, setting: str, subject: str, *place: str) -> None:
        if self._file.says(*place):
            self._refuse(setting, subject)

    def _refuse(self, setting: str, subject: str) -> None:
        self._problems.append(f"{setting} and {self._file.path} differ about {subject}: give it in one of them")
