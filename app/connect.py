"""Finds the running system and its data for a command: by the settings, then by files in the data directory.

The Redis client and DuckDB are imported where they are used: loading them takes longer than a whole light command.
"""

from collections.abc import AsyncGenerator, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from tollbook.inference.address import find_redis_url
from tollbook.inference.settings import DEMO_DATA_DIR, Settings
from tollbook.inference.stated_policy import policy_sources
from tollbook.ledger.errors import LedgerUnavailable
from tollbook.ledger.projection import PROJECTION_FILE
from tollbook.ledger.server.endpoint import read_endpoint
from tollbook.ledger.server.refusals import reason_of

if TYPE_CHECKING:
    from pathlib import Path

    import pyarrow as pa
    from redis.asyncio import Redis

    from tollbook.ledger.projection.comparison import Tables
    from tollbook.ledger.server.pipeline import CommandPipeline


def with_running_provider(settings: Settings) -> Settings:
    """Return settings with the running system's provider, if none is configured here.

    With it, `doctor` and `reconcile` ask the stand-in of `tollbook up --stand-in`.
    """
    if settings.has_provider or settings.stand_in_url is not None:
        return settings
    endpoint = read_endpoint(settings.data_dir)
    if endpoint is None or endpoint.provider_url in (None, _default_provider_url()):
        return settings
    update = {
        "openrouter_base_url": endpoint.provider_url,
        "dialect": "openrouter",
        "stand_in_url": endpoint.stand_in_url,
    }
    return settings.model_copy(update=update)


def _default_provider_url() -> str:
    return Settings.model_fields["openrouter_base_url"].default


def data_settings(settings: Settings) -> Settings:
    """Return the settings of a command that reads: those of a kept demo, if there is nothing else to read.

    A demo (`tollbook demo --keep`) in the current directory is used if neither a data directory nor a Redis is set, and
    the default data directory has no data.
    """
    # An object store is not checked: that would be a request for each command.
    is_set = {"data_dir", "archive_dir", "archive_url", "redis_url"} & settings.model_fields_set
    if (
        is_set
        or _holds_data(settings.data_dir, settings.archive_path)
        or not (DEMO_DATA_DIR / PROJECTION_FILE).exists()
    ):
        return settings
    return settings.model_copy(update={"data_dir": DEMO_DATA_DIR})


def _holds_data(data_dir: "Path", archive: "Path") -> bool:
    # A system that has just started has an endpoint before it has a projection.
    return (
        (data_dir / PROJECTION_FILE).exists()
        or read_endpoint(data_dir) is not None
        or any(archive.glob("partition-*/*.json"))
    )


@asynccontextmanager
async def readable_redis(
    settings: Settings, *, on_waiting: Callable[[], None] = lambda: None
) -> AsyncGenerator[tuple[str, bool]]:
    """Yield the URL of a Redis to read, and whether the system is stopped.

    If the system is stopped and an embedded server left data, a read-only server is started on that data.
    Errors: LedgerUnavailable if there is neither a server nor data; EmbeddedServerError.
    """
    from tollbook.ledger.server.at_rest import is_at_rest, server_at_rest

    if settings.redis_url is not None or not is_at_rest(settings.data_dir):
        yield find_redis_url(settings), False
        return
    async with server_at_rest(settings.data_dir, on_waiting=on_waiting) as url:
        # If a system was started in the meantime, its own server is read.
        yield url, is_at_rest(settings.data_dir)


@dataclass(frozen=True, slots=True)
class Connection:
    """A command's connection to Redis."""

    redis_url: str
    redis: "Redis"
    pipeline: "CommandPipeline"


@asynccontextmanager
async def connected(settings: Settings, *, only_reads: bool = False) -> AsyncGenerator[Connection]:
    """Connect to the running system's Redis. Errors: LedgerUnavailable, which says what to do.

    `only_reads`: do not wait for replicas (TOLLBOOK_MIN_REPLICAS), so that reads work while one is missing.
    """
    from redis.exceptions import RedisError

    from tollbook.ledger.server.address import hide_password
    from tollbook.ledger.server.connection import connect
    from tollbook.ledger.server.pipeline import CommandPipeline

    redis_url = find_redis_url(settings)
    redis = connect(redis_url)
    pipeline = CommandPipeline(redis, replication=None if only_reads else settings.replication)
    try:
        await pipeline.execute("PING")
        yield Connection(redis_url, redis, pipeline)
    except (RedisError, LedgerUnavailable) as exc:
        raise LedgerUnavailable(f"Redis at {hide_password(redis_url)}: {reason_of(exc)}") from None
    finally:
        await pipeline.aclose()
        await redis.aclose()


async def written_events(settings: Settings) -> tuple[str, int]:
    """Return the ledger's id and how many events were ever written to it; ("", 0) if there is no ledger.

    Errors: LedgerUnavailable.
    """
    from tollbook.ledger.keys import Keys

    async with connected(settings, only_reads=True) as connection:
        ask = connection.pipeline.execute
        ledger_id, partitions = await ask("HMGET", Keys(settings.namespace).meta, "ledger_id", "partitions")
        if ledger_id is None:
            return "", 0
        number = 0
        for keys in (Keys(settings.namespace, partition) for partition in range(int(partitions))):
            number += int(await ask("HGET", keys.meta, "removed") or 0) + int(await ask("XLEN", keys.ledger))
        return ledger_id.decode(), number


def open_tables(settings: Settings) -> "Tables":
    """Open a snapshot of the projection, whether a projector is running or not.

    Errors: LedgerUnavailable if there is no projection.
    """
    return _Snapshot(settings)


def query_projection(settings: Settings, sql: str) -> list[dict[str, Any]]:
    """Run one SELECT on the projection. Errors: as `open_tables`; duckdb.Error if the query is wrong."""
    (rows,) = query_projection_at_once(settings, sql)
    return rows


def query_projection_at_once(settings: Settings, *queries: str) -> list[list[dict[str, Any]]]:
    """Run SELECTs on one snapshot of the projection. Errors: as `query_projection`."""
    with ExitStack() as parts:
        snapshot = _Snapshot(settings, parts)
        return [snapshot.rows(sql) for sql in queries]


class _Snapshot:
    """A copy of the projection, kept until the process ends or `parts` are closed."""

    def __init__(self, settings: Settings, parts: ExitStack | None = None) -> None:
        self._parts = parts or ExitStack()
        from tollbook.ledger.projection.snapshot import naming_memory_limit, open_snapshot

        path = settings.projection_path
        self._limited = partial(naming_memory_limit, settings.report_memory, "TOLLBOOK_REPORT_MEMORY")
        with self._limited():
            opened = open_snapshot(path, memory_limit=settings.report_memory, threads=2)
            self._connection = self._parts.enter_context(opened)
        if policy_sources(settings):
            self._warn_of_other_policy(settings)

    def _warn_of_other_policy(self, settings: Settings) -> None:
        from tollbook.inference.policy_changes import warn_of_difference
        from tollbook.ledger.gate.policies import StoredPolicy
        from tollbook.ledger.projection.store import NEWEST_POLICY

        rows = self.rows(f"SELECT version, digest, payload FROM ({NEWEST_POLICY}) ORDER BY version DESC LIMIT 1")  # noqa: S608 - a constant.
        warn_of_difference(settings, StoredPolicy(**rows[0]) if rows else StoredPolicy())

    def table(self, sql: str) -> "pa.Table":
        with self._limited(), self._connection.cursor() as cursor:
            return cursor.execute(sql).to_arrow_table()

    def rows(self, sql: str) -> list[dict[str, Any]]:
        """Return the rows of a query, without Arrow: importing it takes as long as a small query."""
        with self._limited(), self._connection.cursor() as cursor:
            cursor.execute(sql)
            names = [column[0] for column in cursor.description or ()]
            return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
