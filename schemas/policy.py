"""The policy: who may spend how much on which models. One for all processes, since the ledger holds it (G11).

A policy file, `tollbook.toml`, has the same shape; so has the `content` of a `policy-applied` event. Amounts in it are
dollars, as people write them; whoever compares balances takes them as nano-dollars from the properties.
"""

import hashlib
import json
from collections.abc import Mapping
from decimal import Decimal
from functools import cached_property
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, StringConstraints, model_validator

from tollbook.schemas.expectations import Expected
from tollbook.schemas.identifiers import Identifier
from tollbook.schemas.money import MAX_NANOUSD, NANOUSD_PER_USD, nanousd_from_usd
from tollbook.schemas.routes import Route
from tollbook.schemas.tasks import ModelId

MAX_CAP_USD: Final = MAX_NANOUSD // NANOUSD_PER_USD
Usd = Annotated[
    Decimal,
    Field(ge=0, le=MAX_CAP_USD, allow_inf_nan=False),
    PlainSerializer(lambda usd: f"{usd.normalize():f}", return_type=str, when_used="json"),
]
"""Dollars; in JSON a string, since a JSON number is a float to most readers."""
Fraction = Annotated[
    Decimal,
    Field(gt=0, le=10, allow_inf_nan=False, decimal_places=4),
    PlainSerializer(lambda part: f"{part.normalize():f}", return_type=str, when_used="json"),
]
Name = Annotated[
    str,
    StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,49}$"),
    Expected("a name of 1 to 50 small letters, digits and any of _ -, a letter first"),
]
"""Name of a plan, task type, stream, budget, tag or provider."""

BudgetWindow = Literal["day", "week", "month", "total"]
ATTRIBUTES: Final = ("user", "plan", "campaign", "task", "model")
"""What budgets may be kept by beside the tags of tasks."""
OWN_BUDGET: Final = "user"
"""Name of the budget that every call has: the user's billing period, whose cap the plan decides."""


class Rule(BaseModel):
    """Base of the parts of a policy."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class PlanRule(Rule):
    """A plan: what one of its users may spend in a billing period."""

    cap_usd: Usd
    """Cap per user and billing period, dollars."""


class StreamRule(Rule):
    """A task stream."""

    concurrency: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """Concurrent calls per worker; absent: TOLLBOOK_CONCURRENCY."""


class BudgetRule(Rule):
    """A budget beside the user's billing period: one balance per window and per value of its attributes."""

    name: Name
    by: tuple[Name, ...] = ()
    """Attributes that have a balance each: any of user, plan, campaign, task, model, or a tag. None: all together.
    A call without one of them is not held against this budget."""
    window: BudgetWindow
    """When the balance begins anew; `total`: never."""
    cap_usd: Usd
    """Cap per window, dollars. With window `total`, 0 and credits make a prepaid balance."""
    caps: dict[str, Usd] = Field(default_factory=dict[str, Usd])
    """Caps of single values; of several attributes, the values joined by a comma."""
    alerts: tuple[Fraction, ...] = ()
    """Fractions of the cap; an alert is raised when settled spend reaches one."""

    def cap_nanousd(self, value: str) -> int:
        """Return the cap of one value, nano-dollars."""
        return nanousd_from_usd(self.caps.get(value, self.cap_usd))


class PriceRule(Rule):
    """Prices of a model in dollars per million tokens, and per request."""

    prompt: Usd
    completion: Usd
    cached: Usd | None = None
    cache_write: Usd | None = None
    request: Usd = Decimal(0)
    starts: Annotated[str | None, Field(alias="from")] = None
    """Day (UTC) from which it counts, such as 2026-12-01; absent: always."""


class ProviderRule(Rule):
    """A provider beside the default one."""

    base_url: str
    key_env: str | None = None
    """Environment variable that holds the API key; a policy never holds a secret."""
    dialect: Literal["openrouter", "openai", "anthropic"] = "openai"


class AlertRule(Rule):
    """Where alerts are delivered. Not part of what is on the ledger: it decides nothing about money."""

    webhook_env: str | None = None
    """Environment variable that holds the webhook's address."""
    apprise_env: str | None = None
    """Environment variable that holds addresses for Slack, e-mail and the like, as Apprise takes them."""
    projector_behind_s: Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)] = 60.0
    """An alert is raised when the projector is further behind, seconds."""
    assumed_share: Annotated[Decimal, Field(ge=0, le=1, allow_inf_nan=False)] = Decimal("0.1")
    """An alert is raised when a larger part of the month's spend is assumed."""


class Policy(Rule):
    """Everything that decides about calls and money. Without a file, the defaults below."""

    timezone: str = "UTC"
    """Name of the time zone in which days, weeks and months begin, such as Europe/Berlin."""
    month_starts_on: Annotated[int, Field(ge=1, le=28)] = 1
    """First day of a billing period."""
    week_starts_on: Literal["monday", "sunday"] = "monday"
    user_ids: Literal["plain", "hashed"] = "plain"
    """Whether users' ids are kept as they are or as keyed hashes; fixed when the ledger is created."""
    default_plan: Name = "trial"
    """Plan of a task that names none."""
    plans: dict[Name, PlanRule] = Field(default_factory=dict[str, PlanRule])
    users: dict[Identifier, Usd] = Field(default_factory=dict[str, Decimal])
    """Caps of single users, dollars per billing period, instead of their plan's."""
    tasks: dict[Name, Route] = Field(default_factory=dict[str, Route])
    streams: dict[Name, StreamRule] = Field(default_factory=dict[str, StreamRule])
    budgets: tuple[BudgetRule, ...] = ()
    prices: dict[ModelId, tuple[PriceRule, ...]] = Field(default_factory=dict[str, tuple[PriceRule, ...]])
    providers: dict[Name, ProviderRule] = Field(default_factory=dict[str, ProviderRule])
    alerts: AlertRule = AlertRule()

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        if self.default_plan not in self.plans:
            raise ValueError(f"'default_plan' {self.default_plan!r} is none of the plans: {', '.join(self.plans)}")
        names = [rule.name for rule in self.budgets]
        for name in names:
            if names.count(name) > 1 or name == OWN_BUDGET:
                raise ValueError(f"there is another budget named {name!r}")
        return self

    def content(self) -> dict[str, Any]:
        """Return what stands on the ledger: everything but the alerts' receivers, dollars as strings."""
        return self.model_dump(mode="json", by_alias=True, exclude={"alerts"}, exclude_none=True)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the content, in hexadecimal. Equal policies have equal digests."""
        text = json.dumps(self.content(), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def plan_cap_nanousd(self, plan: str) -> int:
        """Return a plan's cap per billing period, nano-dollars. Errors: KeyError."""
        return nanousd_from_usd(self.plans[plan].cap_usd)

    def user_cap_nanousd(self, user_id: str, plan: str) -> int:
        """Return the cap of a user's billing period: the user's own, else the plan's. Errors: KeyError."""
        own = self.users.get(user_id)
        return self.plan_cap_nanousd(plan) if own is None else nanousd_from_usd(own)


def default_policy(changes: Mapping[str, Any] | None = None) -> Policy:
    """Return the mission's policy: four task types, three plans, four streams. `changes` add to its tables.

    An entry of `changes` replaces one of the same name. Errors: pydantic.ValidationError.
    """
    tables: dict[str, Any] = {
        "plans": {"trial": {"cap_usd": 5}, "starter": {"cap_usd": 15}, "growth": {"cap_usd": 40}},
        "streams": {"scraping": {}, "analysis": {}, "generation": {}, "monitoring": {}},
        "tasks": dict(_TASKS),
    }
    changes = dict(changes or {})
    for name, table in tables.items():
        changes[name] = {**table, **changes.get(name, {})}
    return Policy.model_validate(changes)


_TASKS: Final[Mapping[str, Mapping[str, Any]]] = {
    "classify_archetype": {
        "model": "anthropic/claude-3-haiku",
        "fallback": "google/gemini-2.5-flash",
        "max_tokens": 200,
        "temperature": 0.1,
    },
    "generate_draft": {
        "model": "anthropic/claude-sonnet-4",
        "fallback": "openai/gpt-4o-mini",
        "max_tokens": 2000,
        "temperature": 0.7,
    },
    "score_post": {
        "model": "anthropic/claude-3-haiku",
        "fallback": "google/gemini-2.5-flash",
        "max_tokens": 500,
        "temperature": 0.0,
    },
    "extract_patterns": {
        "model": "anthropic/claude-3-haiku",
        "fallback": "google/gemini-2.5-flash",
        "max_tokens": 1000,
        "temperature": 0.2,
    },
}
