"""`tollbook doctor`: is everything there that calls need, and what to do where it is not."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from tollbook.inference.settings import Settings

State = Literal["ok", "warning", "failed"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found, and what to do about it."""

    check: str
    state: State
    found: str
    advice: str = ""


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> int:
    """Check settings, Redis, DuckDB, prices and provider, and say what to do. Exit code 1 where a check failed.

    Example: tollbook doctor
    """
    findings = asyncio.run(_all_findings())
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        _print(findings)
    return 1 if any(finding.state == "failed" for finding in findings) else 0


async def _all_findings() -> list[Finding]:
    from tollbook.inference.errors import SettingsError
    from tollbook.inference.settings import load_settings

    try:
        settings = load_settings()
    except SettingsError as exc:
        return [Finding("settings", "failed", problem, "correct the variable") for problem in exc.problems]
    findings = [Finding("settings", "ok", f"data in {settings.data_dir}")]
    for check in (_check_redis, _check_duckdb, _check_prices, _check_provider):
        findings += [finding async for finding in check(settings)]
    return findings


async def _check_redis(settings: "Settings") -> AsyncIterator[Finding]:
    from tollbook.app.connect import connected
    from tollbook.inference.address import find_redis_url
    from tollbook.ledger.errors import LedgerError, ServerTooOld
    from tollbook.ledger.gate.functions import check_server
    from tollbook.ledger.server.connection import connect, hide_password

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
                    "dead letters", "warning", f"{letters} tasks could not be executed", "`tollbook dead-letters list`"
                )
    except ServerTooOld as exc:
        yield Finding("redis", "failed", str(exc), "install Redis 7.0 or later, or unset REDIS_URL")
    except LedgerError as exc:
        yield Finding("redis", "failed", str(exc), "start the server, or correct REDIS_URL")


async def _check_server_settings(redis: "Redis", url: str) -> AsyncIterator[Finding]:
    """Say which server it is and how it keeps what it is told, as far as this user may know."""
    from redis.exceptions import ResponseError

    try:
        info = await redis.info()  # pyright: ignore[reportUnknownMemberType]
    except ResponseError as exc:
        yield Finding(
            "redis", "warning", f"{url} answers, but does not say what it is: {exc}", "allow INFO to this user"
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
            f"it cannot be checked: {exc}",
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


async def _check_duckdb(settings: "Settings") -> AsyncIterator[Finding]:
    from tollbook.app.connect import query_projection
    from tollbook.ledger.errors import LedgerError

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
    except Exception as exc:  # noqa: BLE001 - whatever is wrong with the file, the doctor says it.
        yield Finding("duckdb", "failed", str(exc), "set the file aside; it is rebuilt from the ledger")
        return
    yield await _belonging(settings, row["ledger_id"]) or Finding("duckdb", "ok", f"{row['events'] or 0} events folded")
    if row["discrepancies"]:
        yield Finding(
            "projection",
            "failed",
            f"{row['discrepancies']} events where the projection and the ledger disagree",
            "see the table `discrepancies`; stop spending until it is explained",
        )


async def _belonging(settings: "Settings", folded_id: str) -> Finding | None:
    """Return what is wrong where Redis holds another ledger than the one folded, or none; None where they agree."""
    from redis.exceptions import ResponseError

    from tollbook.app.connect import connected
    from tollbook.ledger.errors import LedgerError
    from tollbook.ledger.keys import Keys
    from tollbook.ledger.server.connection import hide_password

    try:
        async with connected(settings) as connection:
            stored: bytes | None = await connection.pipeline.execute("HGET", Keys(settings.namespace).meta, "ledger_id")
    except (LedgerError, ResponseError):
        return None  # Told by the check of Redis.
    found = stored.decode() if stored else None
    if found == folded_id:
        return None
    return Finding(
        "duckdb",
        "failed",
        f"{settings.data_dir} and Redis do not belong together: the projection is of ledger {folded_id}, "
        f"{hide_password(connection.redis_url)} holds {'ledger ' + found if found else 'no ledger'} "
        f"under {settings.namespace!r}",
        "correct REDIS_URL, TOLLBOOK_NAMESPACE or TOLLBOOK_DATA_DIR; where Redis was emptied or replaced, restore it",
    )


async def _check_prices(settings: "Settings") -> AsyncIterator[Finding]:
    from tollbook.inference.errors import PriceUnknown
    from tollbook.inference.prices.catalogue import PriceCatalogue
    from tollbook.inference.routing import routing_with
    from tollbook.inference.runtime import now_ms

    prices = PriceCatalogue(settings.price_overrides, provider=settings.price_provider)
    for task_type, route in routing_with(settings.routes).items():
        models = [route.model, *([route.fallback] if route.fallback else [])]
        try:
            for model in models:
                prices.price(model, now_ms())
        except PriceUnknown as exc:
            yield Finding(f"price {task_type.value}", "failed", str(exc), "set TOLLBOOK_PRICES or TOLLBOOK_ROUTES")
        else:
            yield Finding(f"price {task_type.value}", "ok", ", then ".join(models))


async def _check_provider(settings: "Settings") -> AsyncIterator[Finding]:
    from tollbook.app.connect import with_running_provider
    from tollbook.inference.errors import ProviderRefused, ProviderUnavailable
    from tollbook.inference.providers.client import ProviderClient
    from tollbook.inference.routing import routing_with

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
                f"{', '.join(gone)} is not offered (any more)",
                "choose another with TOLLBOOK_ROUTES",
            )


def _print(findings: list[Finding]) -> None:
    from rich.table import Table
    from rich.text import Text

    from tollbook.views.tables import make_console

    marks = {"ok": ("ok", "green"), "warning": ("look", "yellow"), "failed": ("FAILED", "bold red")}
    table = Table(show_header=False, box=None, pad_edge=False)
    for finding in findings:
        mark, style = marks[finding.state]
        text = Text(finding.found)
        if finding.advice:
            text.append(f"\n→ {finding.advice}", style="dim")
        table.add_row(Text(mark, style=style), Text(finding.check), text)
    make_console().print(table)
