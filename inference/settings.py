"""Settings: the environment and `.env`, checked once at start.

A name that is misspelt would silently leave a default in force, and defaults cost money:
unknown `TOLLBOOK_*` variables are refused. No message shows a value that may be secret.
"""

import os
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from dotenv import dotenv_values
from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from tollbook.inference.errors import SettingsError
from tollbook.inference.prices.model_price import DatedPrice
from tollbook.inference.routing import routing_with
from tollbook.inference.setting_values import (
    ApiKey,
    BaseUrl,
    CapOverrides,
    CapTable,
    Concurrency,
    ConcurrencyTable,
    MetricsPort,
    PriceOverrides,
    RedisUrl,
    RouteOverrides,
    UsdCap,
)
from tollbook.schemas.plans import CAPS_NANOUSD, Plan

_DAY_S: Final = 86_400
_PREFIX: Final = "TOLLBOOK_"
DEMO_DATA_DIR: Final = Path("tollbook-demo")
"""Where `tollbook demo --keep` leaves its data; commands that read find them there when there is no other data."""
Port = Annotated[int, Field(ge=1, le=65_535)]


def _field(name: str, default: Any, description: str, **limits: Any) -> Any:
    return Field(default=default, validation_alias=name, description=description, **limits)


class Settings(BaseSettings):
    """Everything that can be set. Durations are seconds unless the description says otherwise."""

    model_config = SettingsConfigDict(
        env_file=".env", extra="ignore", frozen=True, env_ignore_empty=True, populate_by_name=True,
        hide_input_in_errors=True,
    )  # fmt: skip

    redis_url: RedisUrl | None = _field(
        "REDIS_URL", None, "Redis 7.0 or later, or Valkey; unset: an embedded Valkey is started", repr=False
    )
    data_dir: Path = _field("TOLLBOOK_DATA_DIR", Path("data"), "directory of DuckDB and the embedded server")
    allow_unsynced: bool = _field(
        "TOLLBOOK_ALLOW_UNSYNCED",
        False,
        "1: use a server that does not sync every write, or does not say so; a crash of it can lose holds and charges",
    )
    namespace: str = _field(
        "TOLLBOOK_NAMESPACE",
        "tollbook",
        "first part of the ledger's Redis keys; task streams have none",
        pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$",
    )
    partitions: int = _field("TOLLBOOK_PARTITIONS", 1, "ledger partitions; fixed at creation", ge=1, le=1024)
    port: Port | None = _field("TOLLBOOK_PORT", None, "port of the embedded server; unset: a free one")
    quack_port: Port | None = _field("TOLLBOOK_QUACK_PORT", None, "port of the DuckDB server; unset: a free one")

    openrouter_api_key: ApiKey | None = _field("OPENROUTER_API_KEY", None, "key of the provider")
    openrouter_base_url: BaseUrl = _field(
        "OPENROUTER_BASE_URL", "https://openrouter.ai/api/v1", "OpenRouter or any OpenAI-compatible server"
    )
    dialect: Literal["auto", "openrouter", "openai"] = _field(
        "TOLLBOOK_DIALECT", "auto", "whether OpenRouter's own request fields are sent; auto: to openrouter.ai only"
    )
    app_title: str = _field(
        "TOLLBOOK_APP_TITLE", "Tollbook", "name shown in OpenRouter's rankings", pattern=r"^[\x20-\x7e]{0,100}$"
    )
    app_url: str | None = _field(
        "TOLLBOOK_APP_URL", None, "address shown in OpenRouter's rankings", pattern=r"^https?://[\x21-\x7e]{1,200}$"
    )
    attempt_timeout_s: float = _field(
        "TOLLBOOK_ATTEMPT_TIMEOUT_S", 60.0, "one HTTP request, seconds in all", gt=0, le=3600, allow_inf_nan=False
    )
    connect_timeout_s: float = _field(
        "TOLLBOOK_CONNECT_TIMEOUT_S", 10.0, "connecting, seconds", gt=0, le=300, allow_inf_nan=False
    )
    retries: int = _field("TOLLBOOK_RETRIES", 2, "tries after the first, per model", ge=0, le=10)
    backoff_base_s: float = _field(
        "TOLLBOOK_BACKOFF_BASE_S", 0.5, "first pause between tries, doubled each time, seconds", ge=0, le=60
    )
    backoff_max_s: float = _field("TOLLBOOK_BACKOFF_MAX_S", 8.0, "longest pause, seconds", ge=0, le=300)
    retry_after_max_s: float = _field(
        "TOLLBOOK_RETRY_AFTER_MAX_S", 20.0, "longest pause a provider may ask for, seconds", ge=0, le=600
    )

    concurrency: Annotated[Concurrency, NoDecode] = _field(
        "TOLLBOOK_CONCURRENCY",
        ConcurrencyTable(),
        'calls in flight a stream and worker; a number, or JSON: {"generation": 64}',
    )
    claim_after_s: float = _field(
        "TOLLBOOK_CLAIM_AFTER_S", 30.0, "a task without a sign of life is taken over, seconds", ge=1, le=86_400
    )
    max_task_attempts: int = _field("TOLLBOOK_MAX_TASK_ATTEMPTS", 3, "workers a task may cost", ge=1, le=100)
    stop_grace_s: float = _field(
        "TOLLBOOK_STOP_GRACE_S", 15.0, "for tasks at hand when stopping, seconds", ge=0, le=3600
    )

    hold_wait_s: float = _field(
        "TOLLBOOK_HOLD_WAIT_S", 600.0, "waiting for other calls' holds, seconds", ge=0, le=86_400, allow_inf_nan=False
    )
    result_ttl_s: int = _field("TOLLBOOK_RESULT_TTL_S", 7 * _DAY_S, "results are kept, seconds", ge=60)
    idempotency_ttl_s: int = _field(
        "TOLLBOOK_IDEMPOTENCY_TTL_S", 40 * _DAY_S, "task ids are remembered, seconds; 31 days at least", ge=31 * _DAY_S
    )
    tail_keep_s: float = _field(
        "TOLLBOOK_TAIL_KEEP_S", 10.0, "folded deltas are kept for cached baselines, seconds", ge=1, le=3600
    )

    archive_dir: Path | None = _field(
        "TOLLBOOK_ARCHIVE_DIR", None, "directory of sealed segments; unset: `archive` in the data directory"
    )
    segment_events: int = _field("TOLLBOOK_SEGMENT_EVENTS", 100_000, "events of a sealed segment", ge=1, le=1_000_000)
    segment_age_s: float = _field(
        "TOLLBOOK_SEGMENT_AGE_S",
        3600.0,
        "a smaller segment is sealed when its first event is so old, seconds",
        gt=0,
    )
    stream_keep_s: float = _field(
        "TOLLBOOK_STREAM_KEEP_S", 7.0 * _DAY_S, "sealed events stay on the stream, seconds", ge=0
    )
    stream_keep_events: int = _field(
        "TOLLBOOK_STREAM_KEEP_EVENTS", 2_000_000, "sealed events stay on the stream, at most so many", ge=0
    )

    routes: Annotated[RouteOverrides, NoDecode] = _field(
        "TOLLBOOK_ROUTES", {}, 'routes, JSON: {"generate_draft": {"model": ..., "fallback": ..., "max_tokens": ...}}'
    )
    prices: Annotated[PriceOverrides, NoDecode] = _field(
        "TOLLBOOK_PRICES",
        {},
        'dollars per million tokens, JSON: {"my/model": {"prompt": 0.5, "completion": 1.5, "from": "2026-12-01"}}',
    )
    price_provider: str = _field(
        "TOLLBOOK_PRICE_PROVIDER",
        "openrouter",
        "whose prices are taken from the catalogue",
        pattern=r"^[a-z0-9-]{1,40}$",
    )
    caps: Annotated[CapOverrides, NoDecode] = _field(
        "TOLLBOOK_CAPS", CapTable(), 'caps in dollars, JSON: {"users": {"u42": 100}, "plans": {"trial": 3}}'
    )
    day_cap_nanousd: Annotated[UsdCap, NoDecode] = _field(
        "TOLLBOOK_DAY_CAP_USD", None, "cap of a user's day (UTC), dollars; unset: none"
    )
    campaign_cap_nanousd: Annotated[UsdCap, NoDecode] = _field(
        "TOLLBOOK_CAMPAIGN_CAP_USD", None, "cap of a campaign's period, dollars; unset: none"
    )

    metrics_port: Annotated[MetricsPort, NoDecode] = _field(
        "TOLLBOOK_METRICS_PORT",
        None,
        "port of metrics and health; 0: a free one; off: none; unset: a free one with `tollbook up`, else none",
    )
    metrics_host: str = _field(
        "TOLLBOOK_METRICS_HOST", "127.0.0.1", "address on which metrics and health are served", min_length=1
    )
    traces: Literal["off", "otlp", "console"] = _field(
        "TOLLBOOK_TRACES", "off", "off, otlp (a collector; OTEL_* variables say where) or console"
    )

    log_format: Literal["json", "console"] = _field("TOLLBOOK_LOG_FORMAT", "console", "json or console")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = _field("TOLLBOOK_LOG_LEVEL", "INFO", "least level shown")

    @field_validator("log_level", mode="before")
    @classmethod
    def _level_in_capitals(cls, value: object) -> object:
        return value.upper() if isinstance(value, str) else value

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> "Settings":
        if self.result_ttl_s > self.idempotency_ttl_s:
            raise ValueError("TOLLBOOK_RESULT_TTL_S: longer than TOLLBOOK_IDEMPOTENCY_TTL_S")
        return self

    @property
    def archive_path(self) -> Path:
        """Where sealed segments are."""
        return self.archive_dir or self.data_dir / "archive"

    @property
    def user_caps_nanousd(self) -> dict[str, int]:
        """Caps of single users."""
        return dict(self.caps.users)

    @property
    def price_overrides(self) -> dict[str, tuple[DatedPrice, ...]]:
        """Configured prices by model id, oldest first."""
        return dict(self.prices)

    @property
    def is_openrouter(self) -> bool:
        """Whether the provider is taken for OpenRouter, whose own request fields it understands."""
        if self.dialect != "auto":
            return self.dialect == "openrouter"
        host = self.openrouter_base_url.split("://", 1)[1].split("/", 1)[0].split(":", 1)[0]
        return host == "openrouter.ai" or host.endswith(".openrouter.ai")

    @property
    def most_calls(self) -> int:
        """Calls that one worker can have in flight over all streams."""
        return self.concurrency.total()

    def plan_cap_nanousd(self, plan: Plan) -> int:
        """Return the cap of a plan's period."""
        return self.caps.plans.get(plan, CAPS_NANOUSD[plan])

    def concurrency_of(self, stream: str) -> int:
        """Return how many calls of a stream one worker has in flight."""
        return self.concurrency.of(stream)


def load_settings(*, env_file: Path | None = Path(".env"), **overrides: Any) -> Settings:
    """Read the settings; `overrides` (field names) win over the environment, that over `env_file`.

    Errors: SettingsError, one line for each problem.
    """
    problems = _unknown_names(os.environ) + _unknown_names(dotenv_values(env_file) if env_file else {})
    try:
        values: dict[str, Any] = {"_env_file": env_file, **overrides}
        settings = Settings(**values)
    except ValidationError as exc:
        raise SettingsError([*problems, *(_line(error) for error in exc.errors(include_url=False))]) from None
    try:
        routing_with(settings.routes)
    except SettingsError as exc:
        problems += [f"TOLLBOOK_ROUTES: {problem}" for problem in exc.problems]
    if problems:
        raise SettingsError(list(dict.fromkeys(problems)))
    return settings


def settings_table() -> list[tuple[str, str, str]]:
    """Return (variable, default, meaning) of every setting, for the README and `doctor`."""
    rows: list[tuple[str, str, str]] = []
    for field in Settings.model_fields.values():
        default = "" if field.default is None or field.default == {} else str(field.default)
        rows.append((str(field.validation_alias), default, field.description or ""))
    return rows


def _known_names() -> list[str]:
    return [str(field.validation_alias) for field in Settings.model_fields.values()]


def _unknown_names(variables: Mapping[str, object]) -> list[str]:
    known = _known_names()
    problems: list[str] = []
    for name in variables:
        if not name.upper().startswith(_PREFIX) or name.upper() in known:
            continue
        # Compared without the prefix, which would make any two names look alike.
        endings = [other.removeprefix(_PREFIX) for other in known if other.startswith(_PREFIX)]
        close = get_close_matches(name.upper().removeprefix(_PREFIX), endings, n=3, cutoff=0.65)
        hint = (
            f"; did you mean {' or '.join(_PREFIX + ending for ending in close)}?"
            if close
            else "; the README lists the known ones"
        )
        problems.append(f"{name}: unknown setting{hint}")
    return problems


def _line(error: ErrorDetails) -> str:
    message = error["msg"].removeprefix("Value error, ")
    field = Settings.model_fields.get(str(error["loc"][0])) if error["loc"] else None
    name = str(field.validation_alias) if field else str(error["loc"][0]) if error["loc"] else ""
    return f"{name}: {message}" if name else message
