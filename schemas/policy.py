"""The policy: who may spend how much on which models. One for all processes, since the ledger holds it (G11).

A policy file, `tollbook.toml`, has the same shape; so has the `content` of a `policy-applied` event. Amounts in it are
dollars, as people write them; whoever compares balances takes them as nano-dollars from the properties.
"""

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, date, datetime, time, tzinfo
from decimal import Decimal
from functools import cached_property
from typing import Annotated, Any, Final, Literal, Self, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    StringConstraints,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from tollbook.schemas.expectations import Expected
from tollbook.schemas.identifiers import Identifier, budget_value, is_hashed_id, normalise_id, read_values
from tollbook.schemas.money import MAX_NANOUSD, NANOUSD_PER_USD, nanousd_from_usd
from tollbook.schemas.problems import did_you_mean, shown, unknown_name
from tollbook.schemas.routes import DEFAULT_PROVIDER, EMBEDDINGS, ModelAt, Route
from tollbook.schemas.tasks import PING, RESERVED_STREAM_WORDS, InvalidTask, ModelId, Name, Task, may_be_prompt
from tollbook.schemas.windows import WeekStart, WindowKind, find_zone

MAX_CAP_USD: Final = MAX_NANOUSD // NANOUSD_PER_USD
# A bound is tokens times price; this limit keeps it far below the largest amount that the ledger can hold.
MAX_USD_PER_MTOK: Final = 10_000


def _not_bool(value: object) -> object:
    # To Python, and so to pydantic, true is the number 1.
    if isinstance(value, bool):
        raise ValueError(f"must be a number, not {shown(value)}")  # noqa: TRY004 - pydantic turns only ValueErrors into problems.
    return value


def _number_schema(**limits: int) -> WithJsonSchema:
    """In a file a number; in an event's JSON text."""
    text = {"type": "string", "pattern": r"^\d+(\.\d+)?$"}
    return WithJsonSchema({"anyOf": [{"type": "number", **limits}, text]}, mode="validation")


_AsText = PlainSerializer(lambda number: f"{number.normalize():f}", return_type=str, when_used="json")
Usd = Annotated[
    Decimal,
    BeforeValidator(_not_bool),
    Field(ge=0, le=MAX_CAP_USD, allow_inf_nan=False),
    Expected(f"dollars from 0 to {MAX_CAP_USD}"),
    _AsText,
    _number_schema(minimum=0, maximum=MAX_CAP_USD),
]
"""Dollars; in JSON a string, since a JSON number is a float to most readers."""
UsdPerMtok = Annotated[
    Decimal,
    BeforeValidator(_not_bool),
    Field(ge=0, le=MAX_USD_PER_MTOK, allow_inf_nan=False),
    Expected(f"dollars from 0 to {MAX_USD_PER_MTOK}"),
    _AsText,
    _number_schema(minimum=0, maximum=MAX_USD_PER_MTOK),
]
Fraction = Annotated[
    Decimal,
    BeforeValidator(_not_bool),
    Field(gt=0, le=10, allow_inf_nan=False, decimal_places=4),
    Expected("a fraction of the cap, greater than 0 and at most 10, such as 0.8"),
    _AsText,
    _number_schema(exclusiveMinimum=0, maximum=10),
]
EnvName = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,99}$"),
    Expected("the name of an environment variable, such as OPENAI_API_KEY"),
]

Dialect = Literal["openrouter", "openai", "anthropic", "compatible"]
"""How a provider is spoken to: OpenRouter's or OpenAI's chat completions, Anthropic's Messages, or chat completions as
most other servers speak them."""
WITHOUT_EMBEDDINGS: Final = ("anthropic",)
"""The dialects of providers that make no embeddings."""
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
    alerts: tuple[Fraction, ...] | None = None
    """Fractions of the cap; an alert is raised when a user's settled spend in the period reaches one."""


class StreamRule(Rule):
    """A task stream."""

    concurrency: Annotated[int, BeforeValidator(_not_bool), Field(ge=1, le=10_000)] | None = None
    """Concurrent calls per worker; absent: TOLLBOOK_CONCURRENCY, which also wins over it for a stream it names."""


class BudgetRule(Rule):
    """A budget beside the user's billing period: one balance per window and per value of its attributes."""

    name: Name
    """Its name; it is part of the keys of its balances."""
    by: tuple[Name, ...] = ()
    """Attributes that have a balance each: any of user, plan, campaign, task, model, or a tag. None: all together.
    A call without one of them is not held against this budget."""
    window: WindowKind
    """When the balance begins anew; `total`: never."""
    cap_usd: Usd
    """Cap per window, dollars. With window `total`, 0 and credits make a prepaid balance."""
    caps: dict[str, Usd] = Field(default_factory=dict[str, Usd])
    """Caps of single values; of several attributes, the values joined by a comma (a comma in one is %2C)."""
    alerts: tuple[Fraction, ...] = ()
    """Fractions of the cap; an alert is raised when settled spend reaches one."""

    @field_validator("caps")
    @classmethod
    def _values_are_as_in_keys(cls, caps: dict[str, Decimal], info: ValidationInfo) -> dict[str, Decimal]:
        """Write the values of single caps as they stand in keys, so that a look-up finds them."""
        if "by" not in info.data:  # It has a mistake of its own.
            return caps
        kept: dict[str, Decimal] = {}
        for value, cap in caps.items():
            try:
                key = budget_value(read_values(value, len(info.data["by"])))
            except ValueError as exc:
                raise ValueError(f"has {shown(value)}, which {exc}") from None
            if key in kept:
                raise ValueError(f"has {shown(key)} twice, in two spellings")
            kept[key] = cap
        return kept

    def cap_nanousd(self, value: str) -> int:
        """Return the cap of one value, nano-dollars."""
        return nanousd_from_usd(self.caps.get(value, self.cap_usd))

    def users(self) -> list[str]:
        """Return the users of single caps, where the budget is kept by user."""
        if "user" not in self.by:
            return []
        place = self.by.index("user")
        return [read_values(value, len(self.by))[place] for value in self.caps]


def _day(value: object) -> object:
    # TOML has days; JSON has none.
    return value.isoformat() if type(value) is date else value


def _is_day(value: str) -> str:
    try:
        date.fromisoformat(value)
    except ValueError:
        raise ValueError(f"must be a day in UTC such as '2026-12-01', not {shown(value)}") from None
    return value


Day = Annotated[str, BeforeValidator(_day), AfterValidator(_is_day), Expected("a day in UTC such as '2026-12-01'")]


class PriceRule(Rule):
    """Prices of a model in dollars per million tokens, and per request."""

    model_config = ConfigDict(populate_by_name=True)

    prompt: UsdPerMtok
    """A million prompt tokens, dollars."""
    completion: UsdPerMtok
    """A million completion tokens, dollars."""
    cached: UsdPerMtok | None = None
    """A million prompt tokens that the provider read from its cache; absent: as `prompt`."""
    cache_write: UsdPerMtok | None = None
    """A million prompt tokens that the provider wrote into its cache; absent: as `prompt`."""
    image: UsdPerMtok | None = None
    """A million prompt tokens of images, dollars; absent: as `prompt`."""
    audio: UsdPerMtok | None = None
    """A million prompt tokens of sound, dollars; absent: sound is refused."""
    video: UsdPerMtok | None = None
    """A million prompt tokens of videos, dollars; absent: videos are refused."""
    image_output: UsdPerMtok | None = None
    """A million completion tokens of images, dollars; absent: a model that puts out images is refused."""
    web_search: UsdPerMtok | None = None
    """One request with `web_search_options`, dollars beside its tokens; absent: searches are refused."""
    request: UsdPerMtok = Decimal(0)
    """One request, dollars."""
    starts: Annotated[Day | None, Field(alias="from")] = None
    """Day (UTC) from which it counts, such as 2026-12-01; absent: always."""

    @property
    def starts_ms(self) -> int | None:
        """When it begins to count, milliseconds since the epoch; None: it always does."""
        if self.starts is None:
            return None
        return round(datetime.combine(date.fromisoformat(self.starts), time.min, UTC).timestamp()) * 1000


TokenLimit = Annotated[int, BeforeValidator(_not_bool), Field(ge=1, le=1_000_000)]


class ModelRule(Rule):
    """The most tokens that a model makes of one image, sound, file or video, where the provider publishes it."""

    image_tokens: TokenLimit | None = None
    """Most tokens of one image; absent: what is known of the model."""
    audio_tokens: TokenLimit | None = None
    """Most tokens of one sound; absent: by `audio_tokens_per_second`."""
    audio_tokens_per_second: TokenLimit | None = None
    """Most tokens of a second of sound, in the formats wav and mp3; absent: by `audio_tokens`."""
    file_tokens: TokenLimit | None = None
    """Most tokens of one file; absent: files are refused."""
    video_tokens: TokenLimit | None = None
    """Most tokens of one video; absent: videos are refused."""
    web_search_tokens: TokenLimit | None = None
    """Most tokens that a request's web searches add to its prompt; absent: all that the model can read."""


def _each(value: object) -> object:
    """One price, or a list of them."""
    return (cast("object", value),) if isinstance(value, Mapping | PriceRule) else value


def _differ_in_days(rules: tuple[PriceRule, ...]) -> tuple[PriceRule, ...]:
    if not rules or len({rule.starts for rule in rules}) != len(rules):
        raise ValueError("must have one price or more, each with another 'from' day")
    return tuple(sorted(rules, key=lambda rule: rule.starts or ""))


Prices = Annotated[
    tuple[PriceRule, ...],
    BeforeValidator(_each, json_schema_input_type=PriceRule | list[PriceRule]),
    AfterValidator(_differ_in_days),
]


class ProviderRule(Rule):
    """A provider beside the default one."""

    base_url: Annotated[
        str,
        StringConstraints(pattern=r"^https?://[^\s/@?#]+(/[^\s@?#]*)?$"),
        Expected("an address such as 'https://api.openai.com/v1', without a key in it"),
        Field(repr=False),
    ]
    """Address of its API."""
    key_env: EnvName | None = Field(default=None, repr=False)
    """Environment variable that holds the API key; a policy never holds a secret. Absent: it needs none."""
    dialect: Dialect
    """How it is spoken to: `openrouter`; `openai` (OpenAI's own API and Azure's); `anthropic` (Anthropic's Messages);
    `compatible` (chat completions, as most other servers speak them)."""
    prices_from: Literal["models", "catalogue", "policy"] | None = None
    """Where its prices come from, after those that the policy states: `models` (its own list, completed by the
    catalogue), `catalogue`, or `policy` (from nowhere else). Absent: `models` for `openrouter`, `catalogue` for
    `openai` and `anthropic`, `policy` for `compatible`."""
    catalogue: Annotated[
        str | None,
        Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$"),
        Expected("the name of a provider in the price catalogue, such as 'groq'"),
    ] = None
    """Its name in the price catalogue (genai-prices); absent: the dialect's, which `compatible` has none of."""
    cost_by_id: bool | None = None
    """Whether it tells afterwards what a request has cost (`GET /generation?id=`). Absent: `openrouter` does."""
    stream: bool | None = None
    """Whether replies are asked for as event streams, so that the id of a request is known long before its answer, and
    an abandoned request is cut off. Absent: where it tells costs by id."""
    prices: dict[ModelId, Prices] = Field(default_factory=dict[str, tuple[PriceRule, ...]])
    """Prices of its models, before those in the policy's `prices`, which count for models of every provider."""

    @model_validator(mode="after")
    def _prices_come_from_somewhere(self) -> Self:
        if self.prices_from == "catalogue" and self.catalogue_name is None:
            raise ValueError("takes prices_from = 'catalogue': 'catalogue' must name it there, such as 'groq'")
        if self.cost_by_id and self.dialect in ("openai", "anthropic"):
            raise ValueError(f"must not have cost_by_id = true: providers of dialect {self.dialect!r} do not tell")
        if self.stream and self.dialect in ("openai", "anthropic"):
            raise ValueError(f"must not have stream = true: providers of dialect {self.dialect!r} tell no cost by id")
        return self

    @property
    def price_source(self) -> Literal["models", "catalogue", "policy"]:
        """Where its prices come from."""
        usual = "models" if self.dialect == "openrouter" else "policy" if self.catalogue_name is None else "catalogue"
        return self.prices_from or usual

    @property
    def catalogue_name(self) -> str | None:
        """Its name in the price catalogue; None: it has none there."""
        return self.catalogue or (None if self.dialect == "compatible" else self.dialect)

    @property
    def can_be_asked_for_costs(self) -> bool:
        """Whether a cost can be asked for by id."""
        return self.dialect == "openrouter" if self.cost_by_id is None else self.cost_by_id

    @property
    def streams_replies(self) -> bool:
        """Whether replies are asked for as event streams."""
        return self.can_be_asked_for_costs if self.stream is None else self.stream


class AlertRule(Rule):
    """Where alerts are delivered. Not part of what is on the ledger: it decides nothing about money."""

    webhook_env: EnvName | None = Field(default=None, repr=False)
    """Environment variable that holds the webhook's address."""
    apprise_env: EnvName | None = Field(default=None, repr=False)
    """Environment variable that holds addresses for Slack, e-mail and the like, as Apprise takes them."""
    projector_behind_s: Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)] = 60.0
    """An alert is raised when the projector is further behind, seconds."""
    assumed_share: Annotated[Decimal, Field(ge=0, le=1, allow_inf_nan=False)] = Decimal("0.1")
    """An alert is raised when a larger part of the month's spend is assumed."""


class GatewayRule(Rule):
    """Calls that name a model and no task type of the policy, as clients of the HTTP gateway make them."""

    max_tokens: Annotated[int, BeforeValidator(_not_bool), Field(ge=1, le=200_000)] = 4_096
    """Maximum completion tokens of such a call that says nothing of it."""


class Policy(Rule):
    """Everything that decides about calls and money. Without a file, the defaults below."""

    timezone: str = "UTC"
    """Name of the time zone in which days, weeks and months begin, such as Europe/Berlin."""
    month_starts_on: Annotated[int, Field(ge=1, le=28)] = 1
    """First day of a billing period."""
    week_starts_on: WeekStart = "monday"
    """First day of a week: monday or sunday."""
    user_ids: Literal["plain", "hashed"] = "plain"
    """Whether users' ids stand on the ledger as they are or as keyed hashes; fixed when the ledger is created."""
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
    """Prices by model id, before the catalogue's: one table, or several with their days."""
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
                    f"{place} has a plain user id, and the policy stands on the ledger: with user_ids = 'hashed', put "
                    "what `tollbook users hash ID` prints"
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
        """Return what stands on the ledger: everything but the alerts' receivers, dollars as strings."""
        # What a policy without these had as its digest stays its digest.
        is_usual = {"models": not self.models, "gateway": self.gateway == GatewayRule()}
        left_out = {"alerts", *(name for name, is_so in is_usual.items() if is_so)}
        return self.model_dump(mode="json", by_alias=True, exclude=left_out, exclude_none=True)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the content, in hexadecimal. Equal policies have equal digests."""
        return digest_of(self.content())

    @cached_property
    def tag_names(self) -> frozenset[str]:
        """The attributes of budgets that are tags: a task may have them as fields of its own."""
        return frozenset(name for rule in self.budgets for name in rule.by if name not in ATTRIBUTES)

    @property
    def called_providers(self) -> tuple[str, ...]:
        """Every provider that a route names, `default` where one names none."""
        named = (target.provider for route in self.tasks.values() for target in route.targets)
        return tuple(dict.fromkeys(named))

    @property
    def task_types(self) -> tuple[str, ...]:
        """Every task type, `ping` included."""
        return (*self.tasks, PING)

    def route_of(self, task_type: str, model: str | None) -> Route | None:
        """Return the route of a task: its task type's; for CHAT and EMBED one of the model that it names, else None.

        `model@provider` is a model of one of the policy's providers.
        """
        if task_type in self.tasks:
            return self.tasks[task_type]
        if model is None or task_type not in _BY_MODEL:
            return None
        name, _, provider = model.rpartition("@")
        target = {"model": name, "provider": provider} if provider in self.providers else {"model": model}
        limit = {"max_tokens": self.gateway.max_tokens} if task_type == CHAT else {"kind": EMBEDDINGS}
        return Route.model_validate({**target, **limit})

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


def _providers_named_by(route: Route) -> list[tuple[str, str]]:
    """Return each provider that a route names, with where."""
    named = [("provider", route.provider)] if route.provider is not None else []
    choices = [(f"fallback[{number}]", each) for number, each in enumerate(route.fallback)]
    choices += [("cheaper", route.cheaper)] if route.cheaper is not None else []
    return named + [(f"{place}.provider", each.provider) for place, each in choices if isinstance(each, ModelAt)]


def digest_of(content: Mapping[str, Any]) -> str:
    """Return the digest of a policy's content as it stands on a ledger, SHA-256 in hexadecimal."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


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
        entries: object = changes.get(name, {})
        if isinstance(entries, Mapping):  # Anything else is for the model to refuse.
            changes[name] = {**table, **entries}
    return Policy.model_validate(changes)


def check_stream(stream: str, policy: Policy) -> str:
    """Return a stream that the policy has. Errors: InvalidTask, with the streams' names."""
    if stream not in policy.streams:
        raise InvalidTask(unknown_name("stream", stream, policy.streams))
    return stream


def check_plan(plan: str, policy: Policy) -> str:
    """Return a plan that the policy has. Errors: InvalidTask, with the plans' names."""
    if plan not in policy.plans:
        raise InvalidTask(unknown_name("plan", plan, policy.plans))
    return plan


def check_task_type(task_type: str, policy: Policy) -> str:
    """Return a task type that the policy has, or `ping`. Errors: InvalidTask, with the task types' names."""
    if task_type not in policy.task_types:
        raise InvalidTask(unknown_name("task type", task_type, policy.task_types))
    return task_type


def _texts(task: Task) -> list[str]:
    return [*(task.input or ()), *(text for message in task.messages or () for text in message.texts)]


def check_task(task: Task, policy: Policy) -> Task:
    """Return a task whose names the policy has, and whose reply goes to no task stream.

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
    if task.reply_to in policy.streams:  # A reply there would be taken for a task.
        raise InvalidTask(f"'reply_to' {RESERVED_STREAM_WORDS} {task.reply_to!r} is")
    return task


CHAT: Final = "chat"
"""Task type of calls that name a model and no task type of the policy; it needs no route."""
EMBED: Final = "embed"
"""The same for embeddings."""
_BY_MODEL: Final = (CHAT, EMBED)
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
