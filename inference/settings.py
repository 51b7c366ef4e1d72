"""Settings from the environment and `.env`, checked once at the start.

An unknown `TOLLBOOK_*` variable is refused: with a misspelt name, a default would silently be used, and defaults cost
money. No message shows a value that may be secret (G10).

The file is long because it is one list: every setting is here once, with its default, its limits and its meaning.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from tollbook.inference.environment import unknown_variables, variables_of
from tollbook.inference.errors import SettingsError
from tollbook.inference.setting_addresses import (
    ApiKey,
    AppTitle,
    AppUrl,
    BaseUrl,
    KeepSeconds,
    MetricsPort,
    Namespace,
    Origins,
    Port,
    ProviderId,
    RedisUrl,
    S3Url,
    WebhookSecret,
)
from tollbook.inference.setting_tables import (
    CapOverrides,
    CapTable,
    Concurrency,
    ConcurrencyTable,
    MemoryLimit,
    PriceOverrides,
    RouteOverrides,
    UsdCap,
)
from tollbook.inference.stated_policy import policy_of
from tollbook.ledger.keys import Keys
from tollbook.ledger.projection import PROJECTION_FILE
from tollbook.ledger.server.replication import Replication
from tollbook.schemas.policy import Dialect, ProviderRule
from tollbook.schemas.problems import problems_of, unknown_name

_DAY_S: Final = 86_400
DEMO_DATA_DIR: Final = Path("tollbook-demo")
"""The data directory of `tollbook demo --keep`. Commands that only read use it if there is no other data."""


def _field(name: str, default: Any, description: str, **limits: Any) -> Any:
    return Field(default=default, validation_alias=name, description=description, **limits)


def _seconds(name: str, default: float | None, description: str, **limits: float) -> Any:
    return _field(name, default, f"{description}, seconds", allow_inf_nan=False, **limits)


class Settings(BaseSettings):
    """All settings. A name that ends in `_s` is a duration in seconds."""

    model_config = SettingsConfigDict(
        env_file=".env", extra="ignore", frozen=True, env_ignore_empty=True, populate_by_name=True,
        hide_input_in_errors=True  # G10
    )  # fmt: skip

    redis_url: RedisUrl | None = _field(
        "REDIS_URL",
        None,
        "address of Redis 7.0 or later, or Valkey, of Sentinels, or of any nodes of a cluster; unset: an embedded "
        "Valkey is started",
        repr=False,
    )
    data_dir: Path = _field("TOLLBOOK_DATA_DIR", Path("data"), "directory of the DuckDB file and the embedded server")
    namespace: Namespace = _field(
        "TOLLBOOK_NAMESPACE", "tollbook", "name of the ledger in its Redis keys; task streams do not have it"
    )
    partitions: int = _field(
        "TOLLBOOK_PARTITIONS", 1, "number of ledger partitions; fixed when the ledger is created", ge=1, le=1024
    )
    allow_unsynced: bool = _field(
        "TOLLBOOK_ALLOW_UNSYNCED",
        False,
        "1: use a server that does not sync every write, has no append-only file, or does not report this; its crash "
        "can lose holds and charges, or without the file the whole ledger",
    )
    min_replicas: int = _field(
        "TOLLBOOK_MIN_REPLICAS",
        0,
        "replicas that must have a write before any process relies on it; the same in every process. With fewer, no "
        "call is made. 0: none, and a failover can lose the last writes",
        ge=0,
        le=100,
    )
    replica_durability: Literal["memory", "disk"] = _field(
        "TOLLBOOK_REPLICA_DURABILITY",
        "memory",
        "whether these replicas must have a write in memory, or must have synced it to disk (disk needs Redis 7.2 or "
        "Valkey)",
    )
    port: Port | None = _field("TOLLBOOK_PORT", None, "port of the embedded server; unset: a free one")

    openrouter_api_key: ApiKey | None = _field("OPENROUTER_API_KEY", None, "API key of the provider")
    openrouter_base_url: BaseUrl = _field(
        "OPENROUTER_BASE_URL",
        "https://openrouter.ai/api/v1",
        "address of OpenRouter or of another OpenAI-compatible server",
    )
    dialect: Literal["auto", "openrouter", "openai", "anthropic"] = _field(
        "TOLLBOOK_DIALECT",
        "auto",
        "API of the provider at OPENROUTER_BASE_URL: openrouter (with OpenRouter's own request fields), openai (chat "
        "completions), anthropic (Messages); auto: by its address",
    )
    stand_in_url: BaseUrl | None = _field(
        "TOLLBOOK_STAND_IN_URL",
        None,
        "address of a stand-in that is called instead of every provider in the policy; `up --stand-in` sets it",
    )
    app_title: AppTitle = _field("TOLLBOOK_APP_TITLE", "Tollbook", "name of the application in OpenRouter's rankings")
    app_url: AppUrl | None = _field("TOLLBOOK_APP_URL", None, "address of the application in OpenRouter's rankings")
    provider_user: Literal["hashed", "none", "plain"] = _field(
        "TOLLBOOK_PROVIDER_USER",
        "hashed",
        "user name that is sent to the provider: hashed (a keyed hash of the id), none, or plain (the id itself)",
    )
    stream_replies: bool = _field(
        "TOLLBOOK_STREAM_REPLIES", True,
        "whether the default provider's replies are streamed if it is an OpenRouter; then the cost of a dead worker's "
        "request can usually be asked for",
    )  # fmt: skip
    attempt_timeout_s: float = _seconds(
        "TOLLBOOK_ATTEMPT_TIMEOUT_S", 60.0, "maximum duration of one HTTP request", gt=0, le=3600
    )
    idle_timeout_s: float | None = _seconds(
        "TOLLBOOK_IDLE_TIMEOUT_S", None, "maximum wait for the next byte of a streamed reply", gt=0, le=3600
    )
    connect_timeout_s: float = _seconds(
        "TOLLBOOK_CONNECT_TIMEOUT_S", 10.0, "maximum wait for a connection to the provider", gt=0, le=300
    )
    retries: int = _field("TOLLBOOK_RETRIES", 2, "retries of a failed request, per model", ge=0, le=10)
    backoff_base_s: float = _seconds(
        "TOLLBOOK_BACKOFF_BASE_S", 0.5, "pause before the first retry, doubled for each further one", ge=0, le=60
    )
    backoff_max_s: float = _seconds("TOLLBOOK_BACKOFF_MAX_S", 8.0, "maximum pause before a retry", ge=0, le=300)
    retry_after_max_s: float = _seconds(
        "TOLLBOOK_RETRY_AFTER_MAX_S",
        20.0,
        "longest Retry-After of a provider after which the same model is retried",
        ge=0,
        le=600,
    )

    concurrency: Annotated[Concurrency, NoDecode] = _field(
        "TOLLBOOK_CONCURRENCY",
        ConcurrencyTable(),
        'concurrent calls per stream and worker; a number, or JSON: {"generation": 64}',
    )
    claim_after_s: float = _seconds(
        "TOLLBOOK_CLAIM_AFTER_S",
        30.0,
        "time without a heartbeat of its worker after which a task is given to another worker",
        ge=1,
        le=86_400,
    )
    max_task_attempts: int = _field(
        "TOLLBOOK_MAX_TASK_ATTEMPTS", 3, "attempts before a task is dead-lettered", ge=1, le=100
    )
    stop_grace_s: float = _seconds(
        "TOLLBOOK_STOP_GRACE_S",
        15.0,
        "maximum duration of a graceful shutdown; running tasks have most of it to finish",
        ge=0,
        le=3600,
    )

    dead_letters_max: int = _field(
        "TOLLBOOK_DEAD_LETTERS_MAX",
        10_000,
        "maximum number of dead letters; the oldest are dropped and counted",
        ge=1,
        le=1_000_000,
    )
    dead_letters_keep_s: float = _seconds(
        "TOLLBOOK_DEAD_LETTERS_KEEP_S", 30.0 * _DAY_S, "how long dead letters are kept", ge=60
    )
    task_keep_s: Annotated[KeepSeconds, NoDecode] = _field(
        "TOLLBOOK_TASK_KEEP_S",
        1.0 * _DAY_S,
        "how long finished tasks are kept on their streams, seconds; off: Tollbook removes none",
    )
    reply_stream_max: int = _field(
        "TOLLBOOK_REPLY_STREAM_MAX",
        100_000,
        "approximate maximum number of entries of a reply stream; 0: no limit",
        ge=0,
        le=100_000_000,
    )

    hold_wait_s: float = _seconds(
        "TOLLBOOK_HOLD_WAIT_S", 600.0, "maximum wait for money that other calls hold", ge=0, le=86_400
    )
    result_ttl_s: int = _field("TOLLBOOK_RESULT_TTL_S", 7 * _DAY_S, "how long results are kept, seconds", ge=60)
    idempotency_ttl_s: int = _field(
        "TOLLBOOK_IDEMPOTENCY_TTL_S",
        40 * _DAY_S,
        "how long task ids are remembered, seconds; at least 31 days",
        ge=31 * _DAY_S,
    )
    tail_keep_s: float = _seconds(
        "TOLLBOOK_TAIL_KEEP_S",
        10.0,
        "how long the tail keeps folded entries for workers with an older baseline",
        ge=1,
        le=3600,
    )

    archive_dir: Path | None = _field(
        "TOLLBOOK_ARCHIVE_DIR", None, "directory of sealed segments; unset: `archive` in the data directory"
    )
    archive_url: S3Url | None = _field(
        "TOLLBOOK_ARCHIVE_URL",
        None,
        "place of sealed segments in an object store, instead of a directory: s3://bucket/prefix. It needs "
        "tollbook[s3]; credentials, AWS_REGION and AWS_ENDPOINT_URL are found as by other AWS programs",
    )
    publish_url: S3Url | None = _field(
        "TOLLBOOK_PUBLISH_URL",
        None,
        "object in an object store to which the projector publishes a read-only copy of tollbook.duckdb, such as "
        "s3://bucket/tollbook.duckdb; unset: none",
    )
    publish_every_s: float = _seconds(
        "TOLLBOOK_PUBLISH_EVERY_S", 300.0, "time between published copies", ge=10, le=31 * _DAY_S
    )
    segment_events: int = _field("TOLLBOOK_SEGMENT_EVENTS", 100_000, "events in a full segment", ge=1, le=1_000_000)
    segment_age_s: float = _seconds(
        "TOLLBOOK_SEGMENT_AGE_S", 3600.0, "age of its first event at which a segment is sealed without being full", gt=0
    )
    stream_keep_s: float = _seconds(
        "TOLLBOOK_STREAM_KEEP_S", 7.0 * _DAY_S, "how long sealed events stay on the ledger stream", ge=0
    )
    stream_keep_events: int = _field(
        "TOLLBOOK_STREAM_KEEP_EVENTS", 2_000_000, "maximum number of sealed events on the ledger stream", ge=0
    )

    policy_file: Path | None = _field(
        "TOLLBOOK_POLICY",
        None,
        "policy file: plans, task types, streams, budgets, prices; unset: `tollbook.toml` in the working directory",
    )
    routes: Annotated[RouteOverrides, NoDecode] = _field(
        "TOLLBOOK_ROUTES",
        {},
        'routes by task type, JSON: {"generate_draft": {"model": ..., "fallback": ..., "max_tokens": ...}}',
    )
    prices: Annotated[PriceOverrides, NoDecode] = _field(
        "TOLLBOOK_PRICES",
        {},
        "prices in dollars per million tokens, JSON: "
        '{"my/model": {"prompt": 0.5, "completion": 1.5, "from": "2026-12-01"}}',
    )
    price_provider: ProviderId = _field(
        "TOLLBOOK_PRICE_PROVIDER", "openrouter", "provider whose prices are taken from the price catalogue"
    )
    tokenizers: Literal["on", "off"] = _field(
        "TOLLBOOK_TOKENIZERS",
        "on",
        "whether holds for OpenAI's models use the true number of tokens, if tollbook[tokenizers] is installed; off: "
        "the number of bytes",
    )
    caps: Annotated[CapOverrides, NoDecode] = _field(
        "TOLLBOOK_CAPS", CapTable(), 'caps in dollars, JSON: {"users": {"u42": 100}, "plans": {"trial": 3}}'
    )
    day_cap_nanousd: Annotated[UsdCap, NoDecode] = _field(
        "TOLLBOOK_DAY_CAP_USD", None, "cap per user and day (UTC), dollars; unset: none"
    )
    campaign_cap_nanousd: Annotated[UsdCap, NoDecode] = _field(
        "TOLLBOOK_CAMPAIGN_CAP_USD", None, "cap per campaign and billing period, dollars; unset: none"
    )

    confirm_usd: int = _field(
        "TOLLBOOK_CONFIRM_USD",
        100,
        "commands that move more dollars than this ask for confirmation, or need --yes",
        ge=0,
        le=1_000_000,
    )

    webhook_secret: WebhookSecret | None = _field(
        "TOLLBOOK_WEBHOOK_SECRET",
        None,
        "secret that signs the webhooks of alerts: whsec_ and at least 16 random bytes in base64",
        repr=False,
    )

    duckdb_memory: MemoryLimit = _field(
        "TOLLBOOK_DUCKDB_MEMORY", "1GB", "memory that the projector's DuckDB may use, such as 512MB or 2GB"
    )
    report_memory: MemoryLimit = _field(
        "TOLLBOOK_REPORT_MEMORY", "2GB", "memory that DuckDB may use for the report, `spend` and notebooks"
    )

    metrics_port: Annotated[MetricsPort, NoDecode] = _field(
        "TOLLBOOK_METRICS_PORT",
        None,
        "port of metrics and health; 0: a free one; off: none; unset: a free one for `tollbook up`, else none",
    )
    metrics_host: str = _field("TOLLBOOK_METRICS_HOST", "127.0.0.1", "address of metrics and health", min_length=1)
    gateway_port: Annotated[MetricsPort, NoDecode] = _field(
        "TOLLBOOK_GATEWAY_PORT",
        None,
        "port of the HTTP gateway; 0: a free one; off: none; unset: a free one for `tollbook up`, 8788 for "
        "`tollbook gateway`",
    )
    gateway_host: str = _field("TOLLBOOK_GATEWAY_HOST", "127.0.0.1", "address of the HTTP gateway", min_length=1)
    gateway_wait_s: float = _seconds(
        "TOLLBOOK_GATEWAY_WAIT_S",
        30.0,
        "maximum wait of a gateway call for money that other calls hold",
        ge=0,
        le=600,
    )
    gateway_timeout_s: float = _seconds(
        "TOLLBOOK_GATEWAY_TIMEOUT_S",
        600.0,
        "maximum duration of a gateway call, including its wait for money and its fallbacks; "
        "TOLLBOOK_ATTEMPT_TIMEOUT_S limits how long a provider may be silent",
        gt=0,
        le=3600,
    )
    gateway_max_calls: int = _field(
        "TOLLBOOK_GATEWAY_MAX_CALLS", 4096, "maximum number of concurrent calls of a gateway", ge=1, le=1_000_000
    )
    gateway_cors: Annotated[Origins, NoDecode] = _field(
        "TOLLBOOK_GATEWAY_CORS",
        (),
        "origins whose pages may call the gateway, separated by commas; unset: none",
    )
    gateway_cert: Path | None = _field("TOLLBOOK_GATEWAY_CERT", None, "file with the gateway's TLS certificate")
    gateway_key: Path | None = _field("TOLLBOOK_GATEWAY_KEY", None, "file with the key of the gateway's certificate")
    gateway_proxies: str = _field(
        "TOLLBOOK_GATEWAY_PROXIES",
        "",
        "addresses of proxies before the gateway whose X-Forwarded-For is trusted, separated by commas; unset: none",
    )
    traces: Literal["off", "otlp", "console"] = _field(
        "TOLLBOOK_TRACES", "off", "where traces are sent: off, otlp (a collector, set by OTEL_* variables) or console"
    )

    log_format: Literal["json", "console"] = _field("TOLLBOOK_LOG_FORMAT", "console", "log format: json or console")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = _field(
        "TOLLBOOK_LOG_LEVEL", "INFO", "lowest level that is logged: DEBUG, INFO, WARNING or ERROR"
    )

    @field_validator("log_level", mode="before")
    @classmethod
    def _level_in_capitals(cls, value: object) -> object:
        return value.upper() if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_combinations(self) -> "Settings":
        if self.result_ttl_s > self.idempotency_ttl_s:
            raise ValueError(
                f"TOLLBOOK_RESULT_TTL_S: must be at most TOLLBOOK_IDEMPOTENCY_TTL_S ({self.idempotency_ttl_s}), "
                f"not {self.result_ttl_s}"
            )
        if self.archive_url is not None and self.archive_dir is not None:
            raise ValueError("TOLLBOOK_ARCHIVE_URL: cannot be set together with TOLLBOOK_ARCHIVE_DIR")
        if self.publish_url is not None and not self.publish_url.endswith(".duckdb"):
            raise ValueError("TOLLBOOK_PUBLISH_URL: must end with .duckdb, as in s3://bucket/tollbook.duckdb")
        if (self.gateway_cert is None) != (self.gateway_key is None):
            names = ["TOLLBOOK_GATEWAY_CERT", "TOLLBOOK_GATEWAY_KEY"]
            given, missing = names if self.gateway_key is None else names[::-1]
            raise ValueError(f"{given}: needs {missing} too: TLS takes a certificate and its key")
        return self

    @property
    def replication(self) -> Replication | None:
        """The replicas to wait for after writes to the ledger; None for none."""
        if not self.min_replicas:
            return None
        return Replication(
            self.min_replicas, is_on_disk=self.replica_durability == "disk", mark=Keys(self.namespace).mark
        )

    @property
    def projection_path(self) -> Path:
        """The projection's file."""
        return self.data_dir / PROJECTION_FILE

    @property
    def archive_place(self) -> str:
        """The place of the sealed segments: a directory, or an address in an object store."""
        return self.archive_url or str(self.archive_path)

    @property
    def archive_path(self) -> Path:
        """Directory of the sealed segments, unless they are in an object store."""
        return self.archive_dir or self.data_dir / "archive"

    @property
    def has_provider(self) -> bool:
        """Whether calls can be made: a key is set, or another server than OpenRouter, which may need no key."""
        default_url = type(self).model_fields["openrouter_base_url"].default
        return self.openrouter_api_key is not None or self.openrouter_base_url != default_url

    def url_of(self, rule: ProviderRule) -> str:
        """Return the address for calls to a provider of the policy: its own, or the stand-in's."""
        if self.stand_in_url is None:
            return rule.base_url
        return f"{self.stand_in_url.rstrip('/')}/{rule.dialect}/v1"

    @property
    def streams_replies(self) -> bool:
        """Whether replies of the default provider are requested as event streams."""
        return self.stream_replies and self.provider_dialect == "openrouter"

    @property
    def provider_dialect(self) -> Dialect:
        """The dialect of the default provider. OpenAI's own API and Azure's refuse fields that other servers accept."""
        url = self.openrouter_base_url
        if self.dialect == "openrouter" or (self.dialect == "auto" and _is_at(url, "openrouter.ai")):
            return "openrouter"
        if self.dialect == "anthropic" or (self.dialect == "auto" and _is_at(url, "api.anthropic.com")):
            return "anthropic"
        return "openai" if _is_at(url, "api.openai.com") or _is_at(url, "openai.azure.com") else "compatible"

    def model_ids_of(self, dialect: Dialect, url: str) -> Literal["openai", "openrouter"] | None:
        """Return the scheme of a provider's model ids, which shows how to count tokens; None if they are not counted.

        Azure's deployments and other servers have their own ids.
        """
        if self.tokenizers == "off":
            return None
        if dialect == "openrouter":
            return "openrouter"
        return "openai" if _is_at(url, "api.openai.com") else None


def _is_at(url: str, domain: str) -> bool:
    host = url.split("://", 1)[1].split("/", 1)[0].split(":", 1)[0]
    return host == domain or host.endswith(f".{domain}")


def load_settings(*, env_file: Path | None = Path(".env"), **overrides: Any) -> Settings:
    """Read the settings. `overrides` (by field name) take precedence over the environment, and that over `env_file`.

    Errors: SettingsError, one line for each problem.
    """
    known = [str(field.validation_alias) for field in Settings.model_fields.values()]
    problems = unknown_variables(os.environ, known) + unknown_variables(variables_of(env_file), known)
    problems += [
        unknown_name("setting", name, Settings.model_fields) for name in overrides.keys() - Settings.model_fields
    ]
    try:
        values: dict[str, Any] = {"_env_file": env_file, **overrides}
        settings = Settings(**values)
    except ValidationError as exc:
        raise SettingsError(
            [*problems, *problems_of(exc, Settings, subject=_subject, limit=exc.error_count())]
        ) from None
    try:
        policy_of(settings)
    except SettingsError as exc:
        problems += exc.problems
    if problems:
        raise SettingsError(list(dict.fromkeys(problems)))
    return settings


def given_or_loaded(settings: object) -> Settings:
    """Return settings that an application gave; of None, those of the environment and `.env`. Errors: SettingsError."""
    if settings is None:
        return load_settings()
    if not isinstance(settings, Settings):
        raise SettingsError([f"settings must be what load_settings() returns, not of type {type(settings).__name__}"])
    return settings


def settings_table() -> list[tuple[str, str, str]]:
    """Return (variable, default, meaning) of every setting, for the documentation."""
    rows: list[tuple[str, str, str]] = []
    for field in Settings.model_fields.values():
        default = "" if field.default is None or field.default == {} else str(field.default)
        rows.append((str(field.validation_alias), default, field.description or ""))
    return rows


def _subject(path: str) -> str:
    field = Settings.model_fields.get(path)
    return f"{field.validation_alias if field else path}: "
