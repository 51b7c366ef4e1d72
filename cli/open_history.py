"""Opens the ledger for `replay`, `verify`, `audit` and `what-if`: the archive, and the stream if Redis answers."""

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import typer
from redis.asyncio import Redis
from redis.exceptions import RedisError

from tollbook.app.connect import readable_redis
from tollbook.inference.archive_place import archive_at, archive_of
from tollbook.inference.policy_changes import warn_of_difference
from tollbook.inference.settings import Settings
from tollbook.ledger.archive.history import LedgerSource, NoLedger
from tollbook.ledger.archive.segments import Archive
from tollbook.ledger.errors import LedgerUnavailable
from tollbook.ledger.gate.policies import POLICY_FIELDS, StoredPolicy
from tollbook.ledger.keys import Keys
from tollbook.ledger.server.address import hide_password
from tollbook.ledger.server.connection import connect
from tollbook.ledger.server.refusals import reason_of


@asynccontextmanager
async def open_source(settings: Settings, archive: str | None = None) -> AsyncGenerator[LedgerSource]:
    """Open the ledger: `archive` alone, or the settings' archive and stream.

    For a stopped system, the command starts its own server on the data. If no Redis answers, it reads the archive
    alone, and a line on standard error says so.
    Errors: NoLedger; ArchiveDamaged; LedgerUnavailable if there is no archive either.
    """
    if archive is not None:
        yield LedgerSource.of_archive(archive_at(archive), namespace=settings.namespace)
        return
    own = archive_of(settings)
    async with AsyncExitStack() as stack:
        try:
            url, _ = await stack.enter_async_context(readable_redis(settings, on_waiting=_print_waiting))
            redis, source = await _with_stream(url, settings, own)
        except LedgerUnavailable as exc:
            try:
                alone = LedgerSource.of_archive(own, namespace=settings.namespace)
            except NoLedger:
                raise exc from None
            typer.echo(f"tollbook: reading the archive alone ({exc})", err=True)
            yield alone
            return
        stack.push_async_callback(redis.aclose)
        policy: Any = await redis.hmget(source.keys[0].meta, list(POLICY_FIELDS))
        warn_of_difference(settings, StoredPolicy.of_fields(policy))
        yield source


def _print_waiting() -> None:
    typer.echo("tollbook: waiting for another command that reads this data", err=True)


async def _with_stream(url: str, settings: Settings, archive: Archive) -> tuple[Redis, LedgerSource]:
    redis = connect(url)
    try:
        meta = await redis.hmget(Keys(settings.namespace).meta, ["ledger_id", "partitions"])
    except (RedisError, OSError) as exc:
        await redis.aclose()
        raise LedgerUnavailable(f"Redis at {hide_password(url)}: {reason_of(exc)}") from None
    ledger_id, partitions = meta
    if ledger_id is None or partitions is None:
        await redis.aclose()
        raise LedgerUnavailable(f"there is no ledger {settings.namespace!r} in Redis at {hide_password(url)}")
    keys = tuple(Keys(settings.namespace, number) for number in range(int(partitions)))
    return redis, LedgerSource(_text(ledger_id), keys, archive, redis)


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
