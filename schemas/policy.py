"""The policy: who may spend how much on which models. One for all processes, since the ledger holds it (G11).

The policy file, `tollbook.toml`, and the `content` of a `policy-applied` event have the shape of `Policy`. The tables
in it are in policy_rules.py.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from datetime import tzinfo
from decimal import Decimal
from functools import cached_property, lru_cache
from typing import Annotated, Any, Final, Literal, Self, cast

from pydantic import BeforeValidator, Field, field_validator, model_validator

from tollbook.schemas.identifiers import Identifier, is_hashed_id, normalise_id
from tollbook.schemas.money import nanousd_from_usd
from tollbook.schemas.parameters import refuse_bool
from tollbook.schemas.policy_rules import (
    WITHOUT_EMBEDDINGS,
    AlertRule,
    BudgetRule,
    Dialect,
    GatewayRule,
    ModelRule,
    PlanRule,
    PriceRule,
    Prices,
    ProviderRule,
    Rule,
    StreamRule,
    Usd,
)
from tollbook.schemas.problems import did_you_mean, shown, unknown_name
from tollbook.schemas.routes import DEFAULT_PROVIDER, EMBEDDINGS, ModelAt, Route
from tollbook.schemas.tasks import PING, RESERVED_STREAM_WORDS, InvalidTask, ModelId, Name, Task, may_be_prompt
from tollbook.schemas.windows import WeekStart, find_zone

# Rules that readers of policies need are importable from here too.
__all__ = [
    "ATTRIBUTES",
    "CHAT",
    "EMBED",
    "OWN_BUDGET",
    "AlertRule",
    "BudgetRule",
    "Dialect",
    "GatewayRule",
    "ModelRule",
    "Policy",
    "PriceRule",
    "ProviderRule",
    "check_plan",
    "check_stream",
    "check_task",
    "check_task_type",
    "default_policy",
    "digest_of",
]

ATTRIBUTES: Final = ("user", "plan", "campaign", "task", "model")
"""Attributes that a budget may have in `by`, beside the tags of tasks."""
CHAT: Final = "chat"
"""Task type of calls that name a model and no task type of the policy; it needs no route."""
EMBED: Final = "embed"
"""Task type of embeddings calls that name a model and no task type of the policy; it needs no route."""
_BY_MODEL: Final = (CHAT, EMBED)
OWN_BUDGET: Final = "user"
"""Name of the budget that every call has: the user's billing period, whose cap the plan decides."""


class Policy(Rule):
    """Everything that decides about calls and money. Without a file, `default_policy` applies."""

    timezone: str = "UTC"
    """Name of the time zone in which days, weeks and months begin, such as Europe/Berlin."""
    month_starts_on: Annotated[int, Field(ge=1, le=28), BeforeValidator(refuse_bool)] = 1
    """First day of a billing period."""
    week_starts_on: WeekStart = "monday"
    """First day of a week: monday or sunday."""
    user_ids: Literal["plain", "hashed"] = "plain"
    """Whether the ledger has users' ids as they are or as keyed hashes; fixed when the ledger is created."""
    default_plan: Name = "trial"
    """Plan of a task that names none."""
    plans: dict[Name, PlanRule] = Field(default_factory=dict[str, PlanRule])
    """Plans by name; trial, starter and growth exist unless replaced."""
    users: dict[Identifier, Usd] = Field(default_factory=dict[str, Decimal])
    """Caps of single users, dollars per billing period, instead of their plan's."""
    tasks: dict[Name, Route] = Field(default_factory=dict[str, Route])
    """Task types by name, each with its route; the four of the defaults exist unless replaced."""
    streams: dict[Name, StreamRule] = Field(default_factory=dict[str, StreamRule])
    """Task streams by name; scraping, analysis, generation and monitoring exist."""
    budgets: tuple[BudgetRule, ...] = ()
    """Budgets beside the user's billing period."""
    prices: dict[ModelId, Prices] = Field(default_factory=dict[str, tuple[PriceRule, ...]])
    """Prices by model id, which override the catalogue's: one table, or several with the day from which each counts."""
    models: dict[ModelId, ModelRule] = Field(default_factory=dict[str, ModelRule])
    """Models by id, with the most tokens of an image, a sound, a file or a video."""
    providers: dict[Name, ProviderRule] = Field(default_factory=dict[str, ProviderRule])
    """Providers by name, beside the default one: routes name them."""
    gateway: GatewayRule = GatewayRule()
    """Calls that name a model and no task type."""
    alerts: AlertRule = AlertRule()
    """Where alerts are delivered."""

    @field_validator("users", mode="before")
    @classmethod
    def _users_differ(cls, value: object) -> object:
        if not isinstance(value, Mapping):
            return value
        seen: set[str] = set()
        for user_id in cast("Mapping[object, object]", value):
            if (normal := normalise_id(str(user_id))) in seen:
                raise ValueError(f"names user {shown(normal)} twice, in two spellings of Unicode")
            seen.add(normal)
        return cast("object", value)

    @field_validator("tasks")
    @classmethod
    def _ping_is_built_in(cls, value: dict[str, Route]) -> dict[str, Route]:
        if PING in value:
            raise ValueError(f"{PING!r} calls no model and has no route")
        return value

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        if self.default_plan not in self.plans:
            raise ValueError(f"'default_plan': {unknown_name('plan', self.default_plan, self.plans)}")
        names = [rule.name for rule in self.budgets]
        for number, name in enumerate(names):
            if name in names[:number] or name == OWN_BUDGET:
                raise ValueError(f"'budgets[{number}].name': there is another budget named {name!r}")
        return self

    @model_validator(mode="after")
    def _providers_are_known(self) -> Self:
        if DEFAULT_PROVIDER in self.providers:
            raise ValueError(
                f"'providers.{DEFAULT_PROVIDER}' is the provider that OPENROUTER_BASE_URL and OPENROUTER_API_KEY "
                "describe: give this one another name"
            )
        known = (DEFAULT_PROVIDER, *self.providers)
        for task_type, route in self.tasks.items():
            for place, name in _providers_named_by(route):
                if name not in known:
                    raise ValueError(f"'tasks.{task_type}.{place}': {unknown_name('provider', name, known)}")
            for target in route.targets if route.kind == EMBEDDINGS else ():
                rule = self.providers.get(target.provider)
                if rule is not None and rule.dialect in WITHOUT_EMBEDDINGS:
                    raise ValueError(f"'tasks.{task_type}': providers of dialect {rule.dialect!r} make no embeddings")
        return self

    @model_validator(mode="after")
    def _users_are_hashed(self) -> Self:
        if self.user_ids == "plain":
            return self
        named = {"'users'": list(self.users)}
        named |= {f"'budgets[{number}].caps'": rule.users() for number, rule in enumerate(self.budgets)}
        for place, users in named.items():
            if not all(map(is_hashed_id, users)):  # G10
                raise ValueError(
                    f"{place} has a plain user id, and the policy is stored on the ledger: with user_ids = 'hashed', "
                    "put what `tollbook users hash ID` prints"
                )
        return self

    @field_validator("timezone")
    @classmethod
    def _zone_is_known(cls, value: str) -> str:
        find_zone(value)
        return value

    @property
    def zone(self) -> tzinfo:
        """The time zone in which days, weeks and months begin."""
        return find_zone(self.timezone)

    def content(self) -> dict[str, Any]:
        """Return what the ledger stores: everything but the alerts' receivers, dollars as strings."""
        # Left out by default, so that a policy keeps the digest that it had before these tables existed.
        is_default = {"models": not self.models, "gateway": self.gateway == GatewayRule()}
        left_out = {"alerts", *(name for name, is_left_out in is_default.items() if is_left_out)}
        return self.model_dump(mode="json", by_alias=True, exclude=left_out, exclude_none=True)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the content, in hexadecimal. Equal policies have equal digests."""
        return digest_of(self.content())

    @cached_property
    def tag_names(self) -> frozenset[str]:
        """The tags that budgets are kept by: a task may have them as fields of its own."""
        return frozenset(name for rule in self.budgets for name in rule.by if name not in ATTRIBUTES)

    @property
    def called_providers(self) -> tuple[str, ...]:
        """Every provider that a route names, `default` if a route names none."""
        named = (target.provider for route in self.tasks.values() for target in route.targets)
        return tuple(dict.fromkeys(named))

    @property
    def task_types(self) -> tuple[str, ...]:
        """Every task type, `ping` included."""
        return (*self.tasks, PING)

    def route_of(self, task_type: str, model: str | None) -> Route | None:
        """Return the route of a task type; for CHAT and EMBED, a route to `model`; None if there is neither.

        `model@provider` is a model of one of the policy's providers.
        """
        if task_type in self.tasks:
            return self.tasks[task_type]
        if model is None or task_type not in _BY_MODEL:
            return None
        name, _, provider = model.rpartition("@")
        limit = self.gateway.max_tokens if task_type == CHAT else None
        return (
            _route_by_model(name, provider, limit)
            if provider in self.providers
            else _route_by_model(model, None, limit)
        )

    @property
    def plan_caps_nanousd(self) -> dict[str, int]:
        """The cap of each plan's billing period, nano-dollars."""
        return {plan: self.plan_cap_nanousd(plan) for plan in self.plans}

    @property
    def user_caps_nanousd(self) -> dict[str, int]:
        """The caps of single users' billing periods, nano-dollars."""
        return {user_id: nanousd_from_usd(cap_usd) for user_id, cap_usd in self.users.items()}

    def plan_cap_nanousd(self, plan: str) -> int:
        """Return a plan's cap per billing period, nano-dollars. Errors: KeyError."""
        return nanousd_from_usd(self.plans[plan].cap_usd)

    def user_cap_nanousd(self, user_id: str, plan: str) -> int:
        """Return the cap of a user's billing period: the user's own, else the plan's. Errors: KeyError."""
        own = self.users.get(user_id)
        return self.plan_cap_nanousd(plan) if own is None else nanousd_from_usd(own)


@lru_cache(maxsize=1024)
def _route_by_model(model: str, provider: str | None, max_tokens: int | None) -> Route:
    """Return a route to one model; without `max_tokens`, for embeddings. Cached, since each call needs it often."""
    kind = EMBEDDINGS if max_tokens is None else None
    return Route(model=model, provider=provider, kind=kind, max_tokens=max_tokens)


def _providers_named_by(route: Route) -> list[tuple[str, str]]:
    """Return (place in the route, provider) for each provider that a route names."""
    named = [("provider", route.provider)] if route.provider is not None else []
    choices = [(f"fallback[{number}]", each) for number, each in enumerate(route.fallback)]
    choices += [("cheaper", route.cheaper)] if route.cheaper is not None else []
    return named + [(f"{place}.provider", each.provider) for place, each in choices if isinstance(each, ModelAt)]


def digest_of(content: Mapping[str, Any]) -> str:
    """Return the digest of a policy's content as the ledger stores it, SHA-256 in hexadecimal."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def default_policy(changes: Mapping[str, Any] | None = None) -> Policy:
    """Return the default policy: four task types, three plans, four streams. `changes` add to its tables.

    An entry of `changes` replaces one of the same name. Errors: pydantic.ValidationError.
    """
    tables: dict[str, Any] = {
        "plans": {"trial": {"cap_usd": 5}, "starter": {"cap_usd": 15}, "growth": {"cap_usd": 40}},
        "streams": {"scraping": {}, "analysis": {}, "generation": {}, "monitoring": {}},
        "tasks": dict(_TASKS),
    }
    changes = dict(changes or {})
    for name, table in tables.items():
        entries: object = changes.get(name, {})
        if isinstance(entries, Mapping):  # `model_validate` refuses anything else.
            changes[name] = {**table, **entries}
    return Policy.model_validate(changes)


def check_stream(stream: str, policy: Policy) -> str:
    """Return a stream that the policy has. Errors: InvalidTask, with the streams' names."""
    return known_name("stream", stream, policy.streams)


def check_plan(plan: str, policy: Policy) -> str:
    """Return a plan that the policy has. Errors: InvalidTask, with the plans' names."""
    return known_name("plan", plan, policy.plans)


def check_task_type(task_type: str, policy: Policy) -> str:
    """Return a task type that the policy has, or `ping`. Errors: InvalidTask, with the task types' names."""
    return known_name("task type", task_type, policy.task_types)


def known_name(kind: str, name: object, known: Collection[str]) -> str:
    """Return a name that is one of those known. Errors: InvalidTask, with these; also for what is no text."""
    if not isinstance(name, str):
        raise InvalidTask(f"the {kind} must be text, not {shown(name)}")
    if name not in known:
        raise InvalidTask(unknown_name(kind, name, known))
    return name


def _texts(task: Task) -> list[str]:
    return [*(task.input or ()), *(text for message in task.messages or () for text in message.texts)]


def check_task(task: Task, policy: Policy) -> Task:
    """Return a task whose task type, plan and kind of input fit the policy, and whose reply goes to no task stream.

    Errors: InvalidTask, with the policy's names.
    """
    route = policy.route_of(task.task, task.model)
    types = policy.task_types if route is None else (task.task,)
    for field, value, known in (("task", task.task, types), ("plan", task.plan, tuple(policy.plans))):
        if value is not None and value not in known:
            hides = may_be_prompt({"prompt": task.prompt, "system": task.system, "messages": _texts(task)})
            found = "" if hides(value) else f", not {shown(value)}{did_you_mean(value, known)}"
            raise InvalidTask(f"'{field}' must be one of {', '.join(map(repr, known))}{found}")
    if route is not None and (task.input is not None) != (route.kind == EMBEDDINGS):
        raise InvalidTask(
            f"'input' is for embeddings, and {task.task} makes chat completions: give 'prompt' or 'messages'"
            if task.input is not None
            else f"{task.task} makes embeddings: give 'input' instead of 'prompt' or 'messages'"
        )
    if task.reply_to in policy.streams:  # Workers would read the reply as a task.
        raise InvalidTask(f"'reply_to' {RESERVED_STREAM_WORDS} {task.reply_to!r} is")
    return task


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
