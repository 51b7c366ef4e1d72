"""The tables of a policy: plans, streams, budgets, prices, models, providers, alerts. `policy.py` puts them together.

Amounts are dollars, as people write them. What compares balances converts them to nano-dollars.
"""

from collections.abc import Mapping
from datetime import UTC, date, datetime, time
from decimal import Decimal
from math import inf
from typing import Annotated, Final, Literal, Self, cast

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
from tollbook.schemas.identifiers import budget_value, read_values
from tollbook.schemas.money import MAX_NANOUSD, NANOUSD_PER_USD, nanousd_from_usd
from tollbook.schemas.parameters import refuse_bool
from tollbook.schemas.problems import shown
from tollbook.schemas.tasks import ModelId, Name
from tollbook.schemas.windows import WindowKind

MAX_CAP_USD: Final = MAX_NANOUSD // NANOUSD_PER_USD
# A bound is tokens times price; this limit keeps it far below the largest amount that the ledger can hold.
MAX_USD_PER_MTOK: Final = 10_000
_MAX_PLACES: Final = 100


def _number_schema(**limits: int) -> WithJsonSchema:
    """A number in a policy file; text in an event's JSON."""
    text = {"type": "string", "pattern": r"^\d+(\.\d+)?$"}
    return WithJsonSchema({"anyOf": [{"type": "number", **limits}, text]}, mode="validation")


def check_places(value: Decimal) -> Decimal:
    """Return a number that has at most 100 decimal places. Errors: ValueError."""
    # Numbers are written out in full, so that 1e-999999999 would be a text of a gigabyte.
    if cast("int", value.as_tuple().exponent) < -_MAX_PLACES:
        raise ValueError(f"must have at most {_MAX_PLACES} decimal places")
    return value


_AsText = PlainSerializer(lambda number: f"{number.normalize():f}", return_type=str, when_used="json")
Usd = Annotated[
    Decimal,
    BeforeValidator(refuse_bool),
    Field(ge=0, le=MAX_CAP_USD, allow_inf_nan=False),
    AfterValidator(check_places),
    Expected(f"dollars from 0 to {MAX_CAP_USD}"),
    _AsText,
    _number_schema(minimum=0, maximum=MAX_CAP_USD),
]
"""Dollars; in JSON a string, since a JSON number is a float to most readers."""
UsdPerMtok = Annotated[
    Decimal,
    BeforeValidator(refuse_bool),
    Field(ge=0, le=MAX_USD_PER_MTOK, allow_inf_nan=False),
    AfterValidator(check_places),
    Expected(f"dollars from 0 to {MAX_USD_PER_MTOK}"),
    _AsText,
    _number_schema(minimum=0, maximum=MAX_USD_PER_MTOK),
]
Fraction = Annotated[
    Decimal,
    BeforeValidator(refuse_bool),
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
"""The API of a provider: OpenRouter's or OpenAI's chat completions, Anthropic's Messages, or chat completions as most
other servers have them."""
WITHOUT_EMBEDDINGS: Final = ("anthropic",)
"""The dialects of providers that make no embeddings."""


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

    concurrency: Annotated[int, Field(ge=1, le=10_000), BeforeValidator(refuse_bool)] | None = None
    """Concurrent calls per worker; absent: TOLLBOOK_CONCURRENCY, which overrides it for the streams that it names."""


class BudgetRule(Rule):
    """A budget beside the user's billing period: one balance for each window and each value of its attributes."""

    name: Name
    """Its name; it is part of the keys of its balances."""
    by: tuple[Name, ...] = ()
    """Attributes whose values have a balance each: user, plan, campaign, task, model or a tag. Empty: one balance for
    all calls. A call that lacks one of the attributes is not held against this budget."""
    window: WindowKind
    """How often the balance is reset; `total`: never."""
    cap_usd: Usd
    """Cap per window, dollars. With window `total`, 0 and credits make a prepaid balance."""
    caps: dict[str, Usd] = Field(default_factory=dict[str, Usd])
    """Caps of single values. Values of several attributes are joined by commas (write a comma inside one as %2C)."""
    alerts: tuple[Fraction, ...] = ()
    """Fractions of the cap; an alert is raised when settled spend reaches one."""

    @field_validator("caps")
    @classmethod
    def _values_are_as_in_keys(cls, caps: dict[str, Decimal], info: ValidationInfo) -> dict[str, Decimal]:
        """Write the values of single caps as in keys, so that a look-up finds them."""
        if "by" not in info.data:  # `by` is invalid, and has a problem of its own.
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
        """Return the users that have a cap of their own; none if the budget is not kept by user."""
        if "user" not in self.by:
            return []
        place = self.by.index("user")
        return [read_values(value, len(self.by))[place] for value in self.caps]


def _day(value: object) -> object:
    # TOML has dates; JSON has none.
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
    """A million completion tokens of images, dollars; absent: a model that makes images is refused."""
    file: UsdPerMtok | None = None
    """The highest charge for reading one file, by the page for example, in dollars beside its tokens. Absent: reading
    is free, and OpenRouter is told to pass files to the model as they are."""
    web_search: UsdPerMtok | None = None
    """One request with `web_search_options`, dollars beside its tokens; absent: searches are refused."""
    request: UsdPerMtok = Decimal(0)
    """One request, dollars."""
    starts: Annotated[Day | None, Field(alias="from")] = None
    """Day (UTC) from which it counts, such as 2026-12-01; absent: always."""

    @property
    def starts_ms(self) -> int | None:
        """When the price begins to count, milliseconds since the epoch; None: it always counts."""
        if self.starts is None:
            return None
        return round(datetime.combine(date.fromisoformat(self.starts), time.min, UTC).timestamp()) * 1000


TokenLimit = Annotated[int, Field(ge=1, le=1_000_000), BeforeValidator(refuse_bool)]


class ModelRule(Rule):
    """The most tokens that one image, sound, file or video can have for a model, as the provider publishes it."""

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
    """Most tokens that a request's web searches add to its prompt; absent: the model's whole context."""


def _each(value: object) -> object:
    """One price, or a list of them."""
    return (cast("object", value),) if isinstance(value, Mapping | PriceRule) else value


def by_day(rules: tuple[PriceRule, ...]) -> tuple[PriceRule, ...]:
    """Return the prices of a model in the order of their days. Errors: ValueError, also for two of one day."""
    # Days are compared, not their texts: 20261201 and 2026-W49-2 are both the 1st of December.
    if not rules or len({rule.starts_ms for rule in rules}) != len(rules):
        raise ValueError("must have one price or more, each with a different 'from' day")
    return tuple(sorted(rules, key=lambda rule: -inf if rule.starts_ms is None else rule.starts_ms))


Prices = Annotated[
    tuple[PriceRule, ...],
    BeforeValidator(_each, json_schema_input_type=PriceRule | list[PriceRule]),
    AfterValidator(by_day),
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
    """Its API: `openrouter`; `openai` (OpenAI's own API and Azure's); `anthropic` (Anthropic's Messages);
    `compatible` (chat completions, as most other servers have them)."""
    prices_from: Literal["models", "catalogue", "policy"] | None = None
    """Where its prices come from, if the policy states none: `models` (the provider's own list, completed by the
    catalogue), `catalogue`, or `policy` (from nowhere else). Absent: `models` for `openrouter`, `catalogue` for
    `openai` and `anthropic`, `policy` for `compatible`."""
    catalogue: Annotated[
        str | None,
        Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$"),
        Expected("the name of a provider in the price catalogue, such as 'groq'"),
    ] = None
    """Its name in the price catalogue (genai-prices); absent: the name of the dialect, or none for `compatible`."""
    cost_by_id: bool | None = None
    """Whether the provider reports a request's cost afterwards (`GET /generation?id=`). Absent: for `openrouter`."""
    stream: bool | None = None
    """Whether replies are requested as event streams, so that the id of a request is known long before its answer, and
    an abandoned request is cancelled. Absent: as `cost_by_id`."""
    prices: dict[ModelId, Prices] = Field(default_factory=dict[str, tuple[PriceRule, ...]])
    """Prices of its models. They override the policy's `prices`, which count for models of every provider."""

    @model_validator(mode="after")
    def _prices_come_from_somewhere(self) -> Self:
        if self.prices_from == "catalogue" and self.catalogue_name is None:
            raise ValueError("has prices_from = 'catalogue': set 'catalogue' to its name there, such as 'groq'")
        if self.cost_by_id and self.dialect in ("openai", "anthropic"):
            raise ValueError(
                f"must not have cost_by_id = true: providers of dialect {self.dialect!r} report no cost by id"
            )
        if self.stream and self.dialect in ("openai", "anthropic"):
            raise ValueError(f"must not have stream = true: providers of dialect {self.dialect!r} report no cost by id")
        return self

    @property
    def price_source(self) -> Literal["models", "catalogue", "policy"]:
        """Where its prices come from."""
        usual = "models" if self.dialect == "openrouter" else "policy" if self.catalogue_name is None else "catalogue"
        return self.prices_from or usual

    @property
    def catalogue_name(self) -> str | None:
        """The provider's name in the price catalogue; None if it is not there."""
        return self.catalogue or (None if self.dialect == "compatible" else self.dialect)

    @property
    def can_be_asked_for_costs(self) -> bool:
        """Whether the provider reports the cost of a request by its id."""
        return self.dialect == "openrouter" if self.cost_by_id is None else self.cost_by_id

    @property
    def streams_replies(self) -> bool:
        """Whether replies are requested as event streams."""
        return self.can_be_asked_for_costs if self.stream is None else self.stream


class GatewayRule(Rule):
    """Calls that name a model and no task type of the policy, as clients of the HTTP gateway make them."""

    max_tokens: Annotated[int, Field(ge=1, le=200_000), BeforeValidator(refuse_bool)] = 4_096
    """Maximum completion tokens of such a call if it names none."""


class AlertRule(Rule):
    """Where alerts are delivered. It is not on the ledger, since it decides nothing about money."""

    webhook_env: EnvName | None = Field(default=None, repr=False)
    """Environment variable that holds the webhook's address."""
    apprise_env: EnvName | None = Field(default=None, repr=False)
    """Environment variable that holds addresses for Slack, e-mail and the like, as Apprise takes them."""
    projector_behind_s: Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False), BeforeValidator(refuse_bool)] = (
        60.0
    )
    """An alert is raised when the projector is further behind, seconds."""
    assumed_share: Annotated[Decimal, Field(ge=0, le=1, allow_inf_nan=False)] = Decimal("0.1")
    """An alert is raised when a larger part of the month's spend is assumed."""
