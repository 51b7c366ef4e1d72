"""What `tollbook doctor` checks: settings, Redis, DuckDB, prices, routes and provider. Nothing is changed."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from redis.exceptions import RedisError, ResponseError

from tollbook.app.connect import connected, query_projection, with_running_provider
from tollbook.inference.address import find_redis_url
from tollbook.inference.errors import PriceUnknown, ProviderRefused, ProviderUnavailable, SettingsError
from tollbook.inference.prices.catalogue import PriceCatalogue
from tollbook.inference.providers.client import ProviderClient
from tollbook.inference.routing import routing_with
from tollbook.inference.settings import Settings, load_settings
from tollbook.ledger.clock import now_ms
from tollbook.ledger.errors import LedgerError, ServerTooOld
from tollbook.ledger.gate.functions import check_server
from tollbook.ledger.keys import Keys
from tollbook.ledger.server.address import hide_password
from tollbook.ledger.server.connection import connect
from tollbook.ledger.server.refusals import reason_of

if TYPE_CHECKING:
    from redis.asyncio import Redis

State = Literal["ok", "warning", "failed"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found, and what to do about it."""

    check: str
    state: State
    found: str
    advice: str = ""


async def examine() -> list[Finding]:
    """Return what each check found. What is wrong is a finding, never an exception."""
    try:
        settings = load_settings()
    except SettingsError as exc:
        return [Finding("settings", "failed", problem, "correct the variable") for problem in exc.problems]
    findings = [Finding("settings", "ok", f"data in {settings.data_dir}")]
    for check in (_check_redis, _check_duckdb, _check_routes, _check_provider):
        findings += [finding async for finding in check(settings)]
    return findings


async def _check_redis(settings: Settings) -> AsyncIterator[Finding]:
    try:
        url = find_redis_url(settings)
    except LedgerError as exc:
        yield Finding("redis", "warning", str(exc), "`tollbook up` starts an embedded server")
        return
    try:
        async with connected(settings) as connection:
            redis = connect(url)
            try:
                await check_server(redis)
                async for finding in _check_server_settings(redis, hide_password(url)):
                    yield finding
            finally:
                await redis.aclose()
            letters = int(await connection.pipeline.execute("XLEN", f"{settings.namespace}:dead-letters"))
            if letters:
                yield Finding(
                    "dead letters",
                    "warning",
                    f"{letters:,} task{'' if letters == 1 else 's'} could not be executed",
                    "`tollbook dead-letters list`",
                )
    except ServerTooOld as exc:
        yield Finding("redis", "failed", str(exc), "install Redis 7.0 or later, or unset REDIS_URL")
    except LedgerError as exc:
        yield Finding("redis", "failed", reason_of(exc))
    except RedisError as exc:
        yield Finding("redis", "failed", reason_of(exc))


async def _check_server_settings(redis: "Redis", url: str) -> AsyncIterator[Finding]:
    """Say which server it is and how it keeps its data, as far as this user may ask."""
    try:
        info = await redis.info()  # pyright: ignore[reportUnknownMemberType]
    except ResponseError as exc:
        yield Finding(
            "redis",
            "warning",
            f"the server at {url} answers, but does not say which version it is ({_first_line(exc)})",
            "allow INFO to this user",
        )
        info = dict[str, Any]()
    else:
        name = "Valkey" if "valkey_version" in info else "Redis"
        yield Finding("redis", "ok", f"{name} {info.get('valkey_version', info['redis_version'])}")
    try:
        config = await redis.config_get("append*")  # pyright: ignore[reportUnknownMemberType]
    except ResponseError as exc:
        yield Finding(
            "persistence",
            "warning",
            f"it cannot be checked ({_first_line(exc)})",
            "allow CONFIG GET to this user, or see that appendonly is yes, appendfsync always, "
            "and maxmemory-policy noeviction",
        )
        return
    yield _persistence({str(k): str(v) for k, v in config.items()}, str(info.get("maxmemory_policy", "")))


def _persistence(config: dict[str, str], policy: str) -> Finding:
    if policy and policy != "noeviction":
        return Finding(
            "persistence", "failed", f"maxmemory-policy is {policy}: keys can be evicted", "set it to noeviction"
        )
    if config.get("appendonly") != "yes":
        return Finding(
            "persistence",
            "failed",
            "the append-only file is off: a crash loses the ledger",
            "set appendonly yes and appendfsync always",
        )
    fsync = config.get("appendfsync", "")
    if fsync != "always":
        return Finding(
            "persistence", "warning", f"appendfsync is {fsync}: a crash can lose the latest writes", "set it to always"
        )
    return Finding("persistence", "ok", "append-only file, synced on every write")


def _first_line(exc: Exception) -> str:
    return str(exc).strip().partition("\n")[0]


async def _check_duckdb(settings: Settings) -> AsyncIterator[Finding]:
    sql = (
        "SELECT (SELECT sum(seq) FROM position)::BIGINT AS events, "
        "(SELECT any_value(ledger_id) FROM position) AS ledger_id, "
        "(SELECT count(*) FROM discrepancies) AS discrepancies"
    )
    try:
        row = (await asyncio.to_thread(query_projection, settings, sql))[0]
    except LedgerError as exc:
        yield Finding("duckdb", "warning", str(exc), "`tollbook up` or `tollbook projector` makes it")
        return
    except Exception as exc:  # noqa: BLE001 - whatever is wrong with the file is a finding.
        yield Finding("duckdb", "failed", _first_line(exc), "move the file away: it is rebuilt from the ledger")
        return
    folded = Finding("duckdb", "ok", f"{row['events'] or 0} events folded")
    yield await _check_same_ledger(settings, row["ledger_id"]) or folded
    if row["discrepancies"]:
        yield Finding(
            "projection",
            "failed",
            f"{row['discrepancies']} events where the projection and the ledger disagree",
            "see the table `discrepancies`; stop spending until it is explained",
        )


async def _check_same_ledger(settings: Settings, folded_id: str) -> Finding | None:
    """Return what is wrong if Redis holds another ledger than the folded one, or none; None if they agree."""
    try:
        async with connected(settings) as connection:
            stored: bytes | None = await connection.pipeline.execute("HGET", Keys(settings.namespace).meta, "ledger_id")
    except (LedgerError, ResponseError):
        return None  # The check of Redis reports it.
    found = stored.decode() if stored else None
    if found == folded_id:
        return None
    return Finding(
        "duckdb",
        "failed",
        f"{settings.data_dir} and Redis do not belong together: the projection is of ledger {folded_id}, "
        f"{hide_password(connection.redis_url)} holds {'ledger ' + found if found else 'no ledger'} "
        f"under {settings.namespace!r}",
        "correct REDIS_URL, TOLLBOOK_NAMESPACE or TOLLBOOK_DATA_DIR; if Redis was emptied or replaced, restore it",
    )


async def _check_routes(settings: Settings) -> AsyncIterator[Finding]:
    """Say which models serve a task type, and whether their prices are known."""
    prices = PriceCatalogue(settings.price_overrides, provider=settings.price_provider)
    for task_type, route in routing_with(settings.routes).items():
        name = f"price {task_type.value}"
        models = [route.model, *([route.fallback] if route.fallback else [])]
        try:
            for model in models:
                prices.price(model, now_ms())
        except PriceUnknown as exc:
            yield Finding(name, "failed", str(exc), "set TOLLBOOK_PRICES or TOLLBOOK_ROUTES")
        else:
            yield Finding(name, "ok", ", then ".join(models))


async def _check_provider(settings: Settings) -> AsyncIterator[Finding]:
    settings = with_running_provider(settings)
    if not settings.has_provider:
        yield Finding(
            "provider",
            "failed",
            "OPENROUTER_API_KEY is not set",
            "set it, or try things out with `tollbook up --stand-in`",
        )
        return
    async with ProviderClient.from_settings(settings) as provider:
        try:
            offered = set(await provider.models())
            await provider.check_key()
        except ProviderRefused as exc:
            yield Finding("provider", "failed", str(exc), "check OPENROUTER_API_KEY")
            return
        except ProviderUnavailable as exc:
            yield Finding("provider", "failed", str(exc), "check OPENROUTER_BASE_URL and the network")
            return
    yield Finding("provider", "ok", f"{settings.openrouter_base_url}, {len(offered)} models, the key is good")
    for task_type, route in routing_with(settings.routes).items():
        gone = [model for model in (route.model, route.fallback) if model and model not in offered]
        if gone:
            yield Finding(
                f"route {task_type.value}",
                "warning",
                f"{', '.join(gone)} is no longer offered",
                "choose another with TOLLBOOK_ROUTES",
            )
