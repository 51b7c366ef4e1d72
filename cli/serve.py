"""`tollbook up`, `worker`, `gateway` and `projector`: the long-running processes."""

import asyncio
import gc
import os
import signal
import sys
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tollbook.inference.settings import Settings

# Limits for a shutdown that hangs: Redis may accept connections and never answer, and a disk may hang.
_MIN_GRACE_S = 2.0
_CANCEL_AFTER_S = 1.0
_END_AFTER_S = 2.0
_CHILDREN_S = 6.0
Streams = Annotated[str, typer.Option(help="Task streams, separated by commas; by default all of the policy.")]
Supervised = Annotated[bool, typer.Option("--supervised", hidden=True, help="Stop when standard input closes.")]


def up(
    streams: Streams = "",
    workers: Annotated[
        int, typer.Option(min=0, max=64, help="Worker processes, in addition to the projector; 0: all in one process.")
    ] = 0,
    with_stand_in: Annotated[
        bool, typer.Option("--stand-in", help="Call a local stand-in for OpenRouter, to try things out.")
    ] = False,
) -> None:
    """Run everything: server (unless REDIS_URL is set), workers and projector.

    Example: OPENROUTER_API_KEY=... tollbook up --workers 2
    """
    from functools import partial

    from tollbook.app.gateways import gateway_child, open_gateway
    from tollbook.app.processes import run_processes, run_up
    from tollbook.inference.errors import UnknownStream
    from tollbook.inference.stated_policy import chosen_streams, policy_of, policy_sources
    from tollbook.views.web.sessions import make_link_at
    from tollbook.views.web.site import open_site

    settings, names = _settings(), _streams(streams)
    if policy_sources(settings) or not settings.projection_path.exists():  # Otherwise the policy is on the ledger.
        try:
            chosen_streams(names, policy_of(settings))
        except UnknownStream as exc:
            raise typer.BadParameter(str(exc), param_hint="--streams") from None

    async def run(stop: asyncio.Event) -> None:
        async with _provider(settings, with_stand_in=with_stand_in) as chosen:

            async def announce(redis_url: str, metrics: str, gateway: str) -> None:
                # A sign-in link must not be written to a log (G10); there, people sign in with a key.
                has_link = bool(gateway) and chosen.log_format != "json"
                once = await make_link_at(redis_url, chosen.namespace) if has_link else ""
                _announce(chosen, redis_url, metrics, gateway, once, with_stand_in=with_stand_in)

            if workers:
                await run_processes(chosen, names, workers, stop, announce, gateway_child(chosen))
                return
            await run_up(chosen, names, stop, announce, partial(open_gateway, pages=open_site))

    # Child processes get the whole grace, and are killed some seconds later.
    run_until_signal(run, grace_s=settings.stop_grace_s + (_CHILDREN_S if workers else 0))


def worker(
    streams: Streams = "",
    concurrency: Annotated[int | None, typer.Option(min=1, help="Concurrent calls per stream.")] = None,
    supervised: Supervised = False,
) -> None:
    """Run one worker process, next to a running projector; any number may run on one ledger.

    Example: tollbook worker --streams generation --concurrency 64
    """
    from tollbook.app.processes import run_remote_worker
    from tollbook.inference.address import find_redis_url

    names = _streams(streams)
    settings = require_providers(_settings() if concurrency is None else _settings(concurrency=concurrency))
    redis_url = find_redis_url(settings)
    run_until_signal(
        lambda stop: run_remote_worker(settings, names, stop, redis_url=redis_url),
        grace_s=settings.stop_grace_s,
        supervised=supervised,
    )


def gateway(supervised: Supervised = False) -> None:
    """Run one HTTP gateway, next to a running projector: OpenAI's and Anthropic's APIs, under the ledger's caps.

    Any number may run on one ledger. Clients need a key: `tollbook keys create`.

    Example: TOLLBOOK_GATEWAY_PORT=8788 tollbook gateway
    """
    from tollbook.app.gateways import run_gateway
    from tollbook.inference.address import find_redis_url
    from tollbook.views.web.site import open_site

    settings = require_providers(_settings())
    redis_url = find_redis_url(settings)
    run_until_signal(
        lambda stop: run_gateway(settings, stop, redis_url=redis_url, pages=open_site),
        grace_s=settings.stop_grace_s,
        supervised=supervised,
    )


def projector(
    standby: Annotated[
        bool,
        typer.Option("--standby", help="Wait while another projector runs on the ledger, and take over when it ends."),
    ] = False,
    supervised: Supervised = False,
) -> None:
    """Run only the projector: it folds the ledger into DuckDB, and gives workers the balances.

    Example: REDIS_URL=redis://localhost:6379 tollbook projector
    """
    from tollbook.app.processes import run_projector

    settings = _settings()
    run_until_signal(
        lambda stop: run_projector(settings, stop, is_standby=standby),
        grace_s=settings.stop_grace_s,
        supervised=supervised,
    )


def _settings(**overrides: Any) -> "Settings":
    from tollbook.inference.settings import load_settings
    from tollbook.observability.logs import configure_logging

    settings = load_settings(**overrides)
    configure_logging(form=settings.log_format, level=settings.log_level)
    return settings


def _streams(names: str) -> list[str]:
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    if names and not chosen:
        raise typer.BadParameter("names no stream", param_hint="--streams")
    return chosen


def require_providers(settings: "Settings") -> "Settings":
    """Return the settings if the routes' providers can be called; otherwise print what is missing, and exit.

    If neither a file nor a setting states the policy, an existing ledger has it. Then the providers are checked when
    the ledger is open.
    """
    from tollbook.inference.provider_access import NO_DEFAULT_PROVIDER, provider_problems
    from tollbook.inference.stated_policy import policy_of, policy_sources

    may_have_ledger = settings.redis_url is not None or settings.projection_path.exists()
    if may_have_ledger and not policy_sources(settings):
        return settings
    problems = provider_problems(policy_of(settings), settings)
    for problem in problems:
        typer.echo(f"tollbook: {problem}", err=True)
    if NO_DEFAULT_PROVIDER in problems:
        hint = "to try things out without a key, use the local stand-in: tollbook up --stand-in"
        typer.echo(f"tollbook: {hint}", err=True)
    if problems:
        raise typer.Exit(1)
    return settings


@asynccontextmanager
async def _provider(settings: "Settings", *, with_stand_in: bool) -> AsyncGenerator["Settings"]:
    """Yield the settings with a provider that can be called: the configured one, or the stand-in."""
    if not with_stand_in:
        yield require_providers(settings)
        return
    from tollbook.standin import StandIn, StandInConfig

    async with StandIn(StandInConfig(latency_ms=200, lists_prices=True)) as server:
        yield settings.model_copy(
            update={
                "openrouter_base_url": server.base_url,
                "openrouter_api_key": None,
                "dialect": "openrouter",
                "stand_in_url": server.root_url,
            }
        )


def _announce(
    settings: "Settings", redis_url: str, metrics: str, gateway: str, once: str, *, with_stand_in: bool
) -> None:
    provider = "the local stand-in for OpenRouter (not OpenRouter)" if with_stand_in else settings.openrouter_base_url
    data_dir = Path(settings.data_dir).resolve()
    from tollbook.ledger.server.address import hide_password

    if settings.log_format == "json":
        # Programs read a JSON log, so no plain text may be mixed in.
        import structlog

        structlog.get_logger(__name__).info(
            "system.started",
            redis_url=hide_password(redis_url),
            provider_url=settings.openrouter_base_url,
            is_stand_in=with_stand_in,
            data_dir=str(data_dir),
            metrics=metrics,
            gateway=gateway,
        )
        return
    typer.echo(f"Tollbook is up. Publish to {hide_password(redis_url)}, for example:")
    typer.echo("  tollbook publish generation generate_draft 'Write a haiku about ledgers.' --user u42 --wait 60")
    typer.echo(f"Provider: {provider}")
    typer.echo(f"Data:     {data_dir}")
    if gateway:
        typer.echo(f"Gateway:  {gateway}/v1 for clients of OpenAI and Anthropic; `tollbook keys create` creates a key")
    if once:
        typer.echo(f"Web view: {gateway}/ui?once={once}")
        typer.echo(
            "          The link works once, within 15 minutes; `tollbook keys create --admin` creates a key for later."
        )
    if metrics:
        typer.echo(f"Metrics:  {metrics}")
    typer.echo("Ctrl-C stops it, after the running calls are finished.")


def run_until_signal(
    main: Callable[[asyncio.Event], Awaitable[None]], *, grace_s: float = 0.0, supervised: bool = False
) -> None:
    """Run `main` until it ends. SIGINT or SIGTERM sets its event; a second signal cancels it.

    After the signal, `main` has `grace_s` seconds and a few more to end. Then it is cancelled, and the process ends in
    any case.
    """
    import uvloop

    from tollbook.inference.errors import UnknownStream

    # Only their own user may read what these processes write (the projection, the archive).
    os.umask(0o077)

    async def run() -> None:
        stop = asyncio.Event()
        loop, this = asyncio.get_running_loop(), asyncio.current_task()
        assert this is not None

        def on_signal() -> None:
            if stop.is_set():
                this.cancel()
            stop.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_signal)
        watching = [asyncio.create_task(_enforce_grace(stop, this, grace_s))]
        if supervised:
            watching.append(asyncio.create_task(_stop_at_end_of_input(stop)))
        try:
            await main(stop)
        except UnknownStream as exc:
            raise typer.BadParameter(str(exc), param_hint="--streams") from None
        except asyncio.CancelledError:
            if not stop.is_set():
                raise
            # The ledger records what is open, so the next start continues with it.
            typer.echo("tollbook: stopped before everything was closed; the next start continues from there", err=True)
            raise typer.Exit(1) from None
        finally:
            for task in watching:
                task.cancel()

    # Modules loaded by now stay loaded. Each garbage collection over them would stop all calls for 60 ms.
    gc.collect()
    gc.freeze()
    uvloop.run(run())


async def _enforce_grace(stop: asyncio.Event, main: "asyncio.Task[Any]", grace_s: float) -> None:
    """Cancel `main` if it has not ended within the grace after `stop`; if that does not help, exit the process."""
    await stop.wait()
    await asyncio.sleep(max(grace_s, _MIN_GRACE_S) + _CANCEL_AFTER_S)
    main.cancel()
    # A thread, because the event loop itself may hang.
    timer = threading.Timer(_END_AFTER_S, os._exit, (1,))
    timer.daemon = True
    timer.start()


async def _stop_at_end_of_input(stop: asyncio.Event) -> None:
    """Stop when the parent process ends, which closes the pipe to standard input."""
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    await reader.read()
    stop.set()
