"""The checks of `tollbook doctor`: everything that stops or endangers calls. It changes nothing.

The parts are in `server_findings` (Redis), `ledger_findings` and `process_findings`. If an embedded server is stopped,
its data is read without it, and checks that need a running system are skipped.
"""

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from redis.exceptions import NoPermissionError, RedisError

from tollbook.app import ledger_findings as ledger
from tollbook.app import process_findings as processes
from tollbook.app import server_findings as server
from tollbook.app.connect import readable_redis, with_running_provider
from tollbook.app.findings import Finding, Place
from tollbook.inference.current_policy import CurrentPolicy
from tollbook.inference.errors import (
    PriceUnknown,
    ProviderNotConfigured,
    ProviderRefused,
    ProviderUnavailable,
    SettingsError,
)
from tollbook.inference.prices.catalogue import PriceCatalogue
from tollbook.inference.provider_access import access_of
from tollbook.inference.providers.client import ProviderClient
from tollbook.inference.settings import Settings, load_settings
from tollbook.inference.stated_policy import policy_of
from tollbook.ledger.clock import now_ms
from tollbook.ledger.errors import LedgerError, ServerTooOld
from tollbook.ledger.gate.functions import check_server
from tollbook.ledger.keys import Keys
from tollbook.ledger.server.at_rest import is_at_rest
from tollbook.ledger.server.connection import connect
from tollbook.ledger.server.embedded import EmbeddedServerError
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.ledger.server.refusals import reason_of
from tollbook.schemas.policy import Policy
from tollbook.schemas.routes import DEFAULT_PROVIDER

# The embedded server and the projector stop when the disk is full; a warning before that leaves time to free space.
_DISK_FAILED_BYTES: Final = 256 << 20
_DISK_WARNING_BYTES: Final = 2 << 30
_LIMIT_S: Final = 10.0


async def examine(settings: Settings | None = None) -> list[Finding]:
    """Run all checks and return their findings. A problem is a finding, never an exception."""
    try:
        settings = settings or load_settings()
    except SettingsError as exc:
        return [Finding("settings", "failed", problem, "correct the variable") for problem in exc.problems]
    findings = [Finding("settings", "ok", f"data in {settings.data_dir}")]
    known = _Known(settings, policy_of(settings))
    for check in (_check_disk, _check_redis, _check_routes, _check_providers):
        findings += [finding async for finding in check(known)]
    return findings


@dataclass(slots=True)
class _Known:
    """Shared by the checks. `policy` is the policy stated here, until the ledger's policy is read."""

    settings: Settings
    policy: Policy


async def _check_disk(known: _Known) -> AsyncIterator[Finding]:
    for folder in _folders(known.settings):
        existing = _existing(folder)
        try:
            free = shutil.disk_usage(existing).free
        except OSError as exc:
            yield Finding(
                "disk", "failed", f"{existing} cannot be read: {exc.strerror or exc}", "correct its permissions"
            )
            continue
        state = "ok" if free > _DISK_WARNING_BYTES else "warning" if free > _DISK_FAILED_BYTES else "failed"
        yield Finding(
            "disk",
            state,
            f"{free / 2**30:,.1f} GiB free for {folder}",
            "" if state == "ok" else "free some space there",
        )


def _folders(settings: Settings) -> list[Path]:
    """Return the folders that Tollbook writes to, one for each disk."""
    written = [settings.data_dir] if settings.archive_url else [settings.archive_path, settings.data_dir]
    folders = {_existing(folder).stat().st_dev: folder for folder in written}
    return list(reversed(folders.values()))


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


async def _check_redis(known: _Known) -> AsyncIterator[Finding]:
    settings = known.settings
    try:
        async with AsyncExitStack() as stack:
            try:
                url, rests = await stack.enter_async_context(readable_redis(settings))
            except EmbeddedServerError as exc:
                yield Finding("redis", "failed", str(exc), "see its log")
                return
            except LedgerError as exc:
                yield Finding("redis", "warning", str(exc), "`tollbook up` starts an embedded server")
                return
            redis = connect(url)
            stack.push_async_callback(redis.aclose)
            pipeline = CommandPipeline(redis, timeout_s=_LIMIT_S)
            stack.push_async_callback(pipeline.aclose)
            async with asyncio.timeout(_LIMIT_S):
                await pipeline.execute("PING")
            await check_server(redis)
            async for finding in server.server_findings(redis, url):
                yield finding
            try:
                keys = await _keys_of(pipeline, settings)
            except NoPermissionError:
                keys = ()  # `writing_findings` reports the missing permissions.
            if keys:
                known.policy = (await CurrentPolicy.of_ledger(pipeline, keys)).newest.policy
            written = keys or (Keys(settings.namespace),)
            if rests:
                yield Finding(
                    "running system",
                    "skipped",
                    f"Tollbook does not run on {settings.data_dir}. Its stored data was checked, but not the server's "
                    "settings and memory, writing, projector, processes and workers",
                    "`tollbook up` starts it",
                )
            else:
                async for finding in server.keeping_findings(redis, settings, written):
                    yield finding
                async for finding in server.writing_findings(pipeline, written, known.policy):
                    yield finding
            place = Place(settings, redis, pipeline, url, written, rests, known.policy)
            async for finding in _check_ledger(place, has_ledger=bool(keys)):
                yield finding
    except ServerTooOld as exc:
        yield Finding("redis", "failed", str(exc), "install Redis 7.0 or later, or unset REDIS_URL")
    except (LedgerError, RedisError, OSError, TimeoutError) as exc:
        found = reason_of(exc) or f"the server did not answer within {_LIMIT_S:g} s"
        yield Finding("redis", "failed", found)


async def _keys_of(pipeline: CommandPipeline, settings: Settings) -> tuple[Keys, ...]:
    """Return the keys of the ledger's partitions; none if there is no ledger yet."""
    stored: bytes | None = await pipeline.execute("HGET", Keys(settings.namespace).meta, "partitions")
    return tuple(Keys(settings.namespace, number) for number in range(int(stored or 0)))


async def _check_ledger(place: Place, *, has_ledger: bool) -> AsyncIterator[Finding]:
    checks = [ledger.projection_findings, ledger.failure_findings]
    if has_ledger:
        checks += [ledger.archive_findings, ledger.account_findings, ledger.stop_findings]
        checks += [] if place.is_at_rest else [processes.process_findings]
    for check in (*checks, processes.task_findings, processes.receiver_findings):
        async for finding in check(place):
            yield finding


async def _check_routes(known: _Known) -> AsyncIterator[Finding]:
    """Report the models of each task type, and the sources of their prices."""
    prices = PriceCatalogue.from_settings(with_running_provider(known.settings), known.policy)
    for task_type, route in known.policy.tasks.items():
        name = f"price {task_type}"
        try:
            priced = {
                target: f"{target} ({prices.at(target.provider).price(target.model, now_ms()).source})"
                for target in route.targets
            }
        except PriceUnknown as exc:
            yield Finding(name, "failed", str(exc), "set TOLLBOOK_PRICES or TOLLBOOK_ROUTES")
        else:
            cheaper = route.cheaper_target
            otherwise = f", or {priced[cheaper]} if that does not fit the budget" if cheaper is not None else ""
            yield Finding(
                name, "ok", ", then ".join(priced[each] for each in (route.first, *route.fallbacks)) + otherwise
            )


async def _check_providers(known: _Known) -> AsyncIterator[Finding]:
    """Report whether each provider answers and accepts the key, and which models of routes it no longer offers."""
    settings, policy = with_running_provider(known.settings), known.policy
    names = dict.fromkeys((*policy.called_providers, *policy.providers))
    offered: dict[str, set[str]] = {}
    for name in names:
        finding, models = await _check_provider(name, policy, settings)
        if models is not None:
            offered[name] = models
        yield finding
    for task_type, route in policy.tasks.items():
        gone = [
            str(target)
            for target in route.targets
            if target.provider in offered and target.model not in offered[target.provider]
        ]
        if gone:
            yield Finding(
                f"route {task_type}",
                "warning",
                f"{', '.join(gone)} is no longer offered",
                "choose another with TOLLBOOK_ROUTES",
            )


async def _check_provider(name: str, policy: Policy, settings: Settings) -> tuple[Finding, set[str] | None]:
    """Return the finding about one provider, and the models that it offers; None if they are unknown."""
    is_default = name == DEFAULT_PROVIDER
    check = "provider" if is_default else f"provider {name}"
    if is_default and not settings.has_provider:
        if settings.redis_url is None and is_at_rest(settings.data_dir):
            found = "no provider is configured here, and no process runs that would call one"
            return Finding(check, "skipped", found), None
        advice = "set it, or try things out with `tollbook up --stand-in`"
        return Finding(check, "failed", "OPENROUTER_API_KEY is not set", advice), None
    try:
        access = access_of(name, policy, settings)
    except (ProviderNotConfigured, SettingsError) as exc:
        # Workers may have the key in their own environment.
        state = "failed" if name in policy.called_providers else "warning"
        return Finding(check, state, str(exc), "set it for the workers, and also here to let doctor check it"), None
    async with ProviderClient.from_access(access, settings) as provider:
        try:
            models = set(await provider.models())
            await provider.check_key()
        except ProviderRefused as exc:
            return Finding(check, "failed", str(exc), f"check {access.key_env or 'whether it needs a key'}"), None
        except ProviderUnavailable as exc:
            what = "OPENROUTER_BASE_URL" if is_default else f"base_url of providers.{name} in the policy"
            return Finding(check, "failed", str(exc), f"check {what} and the network"), None
    key = "the key is accepted" if access.api_key is not None or is_default else "no key is sent"
    return Finding(check, "ok", f"{access.base_url}, {len(models)} models, {key}"), models
