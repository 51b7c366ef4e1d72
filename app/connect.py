"""How a command finds the running system: settings first, then what `up` left in the data directory."""

from collections.abc import AsyncGenerator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from redis.exceptions import RedisError

from tollbook.inference.address import find_redis_url
from tollbook.inference.settings import Settings
from tollbook.ledger.errors import LedgerUnavailable
from tollbook.ledger.keys import Keys
from tollbook.ledger.results import Results
from tollbook.ledger.server.connection import connect, hide_password
from tollbook.ledger.server.endpoint import read_endpoint
from tollbook.ledger.server.pipeline import CommandPipeline

# DuckDB and Arrow are loaded by the commands that read the projection; they take longer than the others take in all.
if TYPE_CHECKING:
    import pyarrow as pa

    from tollbook.ledger.projection.comparison import Tables


def with_running_provider(settings: Settings) -> Settings:
    """Return settings whose provider is the one that the running system calls, where none is configured here.

    So `doctor` and `reconcile` ask the stand-in beside `tollbook up --stand-in`.
    """
    default_url = Settings.model_fields["openrouter_base_url"].default
    if settings.openrouter_api_key is not None or settings.openrouter_base_url != default_url:
        return settings
    endpoint = read_endpoint(settings.data_dir)
    if endpoint is None or endpoint.provider_url in (None, default_url):
        return settings
    return settings.model_copy(update={"openrouter_base_url": endpoint.provider_url, "dialect": "openrouter"})


@dataclass(frozen=True, slots=True)
class Connection:
    """A command's connection to Redis."""

    redis_url: str
    pipeline: CommandPipeline
    results: Results


@asynccontextmanager
async def connected(settings: Settings) -> AsyncGenerator[Connection]:
    """Connect to the running system's Redis. Errors: LedgerUnavailable."""
    redis_url = find_redis_url(settings)
    redis = connect(redis_url)
    pipeline = CommandPipeline(redis)
    try:
        await pipeline.execute("PING")
        partitions = await _partitions(pipeline, settings)
        results = Results(
            redis,
            pipeline,
            namespace=settings.namespace,
            partitions=partitions,
            ttl_s=settings.result_ttl_s,
            id_ttl_s=settings.idempotency_ttl_s,
        )
        yield Connection(redis_url, pipeline, results)
    except RedisError as exc:
        raise LedgerUnavailable(f"Redis at {hide_password(redis_url)} did not answer: {exc}") from exc
    finally:
        await pipeline.aclose()
        await redis.aclose()


async def _partitions(pipeline: CommandPipeline, settings: Settings) -> int:
    """Return the ledger's own number of partitions, so that every result is found."""
    stored: bytes | None = await pipeline.execute("HGET", Keys(settings.namespace).meta, "partitions")
    return int(stored) if stored else settings.partitions


def open_tables(settings: Settings) -> "Tables":
    """Return the projection as it is now, whether a projector is running or not; all answers are of one moment.

    Errors: LedgerUnavailable where there is none.
    """
    return _Snapshot(settings)


def query_projection(settings: Settings, sql: str) -> list[dict[str, Any]]:
    """Run one SELECT on the projection. Errors: as `open_tables`; duckdb.Error where the query is wrong."""
    with ExitStack() as parts:
        return _Snapshot(settings, parts).table(sql).to_pylist()


class _Snapshot:
    """A copy of the projection, kept until the process ends or `parts` are closed."""

    def __init__(self, settings: Settings, parts: ExitStack | None = None) -> None:
        self._parts = parts or ExitStack()
        from tollbook.ledger.projection.snapshot import open_snapshot

        path = settings.data_dir / "tollbook.duckdb"
        self._connection = self._parts.enter_context(open_snapshot(path, memory_limit="2GB", threads=2))

    def table(self, sql: str) -> "pa.Table":
        with self._connection.cursor() as cursor:
            return cursor.execute(sql).to_arrow_table()
