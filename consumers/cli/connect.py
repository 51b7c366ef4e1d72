"""How a command finds the running system: settings first, then what `up` left in the data directory."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
from redis.exceptions import RedisError

from inference.settings import Settings
from ledger.connection import connect
from ledger.endpoint import read_endpoint
from ledger.errors import BaselineUnavailable, LedgerUnavailable
from ledger.keys import Keys
from ledger.pipeline import CommandPipeline
from ledger.quack import ADDRESS_FILE, RemoteStore
from ledger.results import Results


def find_redis_url(settings: Settings) -> str:
    """Return the server's URL. Errors: LedgerUnavailable where none is configured and none runs."""
    if settings.redis_url is not None:
        return settings.redis_url
    endpoint = read_endpoint(settings.data_dir)
    if endpoint is None:
        raise LedgerUnavailable(
            f"nothing runs on {settings.data_dir} and REDIS_URL is not set; start `tollbook up`, "
            "or set TOLLBOOK_DATA_DIR to the directory it uses"
        )
    return endpoint.redis_url


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
            redis, pipeline, namespace=settings.namespace, partitions=partitions, ttl_s=settings.result_ttl_s
        )
        yield Connection(redis_url, pipeline, results)
    except RedisError as exc:
        raise LedgerUnavailable(f"Redis at {redis_url} did not answer: {exc}") from exc
    finally:
        await pipeline.aclose()
        await redis.aclose()


async def _partitions(pipeline: CommandPipeline, settings: Settings) -> int:
    """Return the ledger's own number of partitions, so that every result is found."""
    stored: bytes | None = await pipeline.execute("HGET", Keys(settings.namespace).meta, "partitions")
    return int(stored) if stored else settings.partitions


def query_projection(settings: Settings, sql: str) -> list[dict[str, Any]]:
    """Run one SELECT on the projection: through the projector that serves it, else on the file at rest.

    Errors: LedgerUnavailable where there is neither.
    """
    if (settings.data_dir / ADDRESS_FILE).exists():
        store = RemoteStore.open(settings.data_dir)
        try:
            return store.query(sql)
        except BaselineUnavailable:
            pass  # The projector was killed and left its address behind.
        finally:
            store.close()
    return _query_file(settings.data_dir / "tollbook.duckdb", sql)


def _query_file(path: Path, sql: str) -> list[dict[str, Any]]:
    if not path.exists():
        raise LedgerUnavailable(f"there is no projection at {path}; start `tollbook up`, or set TOLLBOOK_DATA_DIR")
    try:
        with duckdb.connect(str(path), read_only=True) as connection:
            return connection.execute(sql).to_arrow_table().to_pylist()
    except duckdb.IOException as exc:
        raise LedgerUnavailable(f"{path} is in use by a process that does not serve it: {exc}") from exc
