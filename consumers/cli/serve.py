"""`tollbook up`, `worker`, `projector` and `stand-in`: the processes that stay."""

import asyncio
import signal
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from schemas.tasks import TaskStream

if TYPE_CHECKING:
    from inference.settings import Settings

ALL_STREAMS = [stream.value for stream in TaskStream]
_EVERY_STREAM = ",".join(ALL_STREAMS)
Streams = Annotated[str, typer.Option(help="Task streams, separated by commas.")]


def up(
    streams: Streams = _EVERY_STREAM,
    with_stand_in: Annotated[
        bool, typer.Option("--stand-in", help="Call a local stand-in for OpenRouter, to try things out.")
    ] = False,
) -> None:
    """Run everything in one process: server (unless REDIS_URL is set), workers and projector.

    Example: OPENROUTER_API_KEY=... tollbook up
    """
    from consumers.runtime import open_system, run_worker

    settings, names = _settings(), _streams(streams)

    async def run(stop: asyncio.Event) -> None:
        async with _provider(settings, with_stand_in=with_stand_in) as chosen, open_system(chosen) as system:
            _announce(chosen, system.redis_url, with_stand_in=with_stand_in)
            await run_worker(system.runtime, names, stop, redis_url=system.redis_url)

    _run_until_signal(run)


def worker(
    streams: Streams = _EVERY_STREAM,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Calls in flight per stream.")] = None,
) -> None:
    """Run one worker process beside a projector; any number may run on one ledger.

    Example: tollbook worker --streams generation --concurrency 64
    """
    from consumers.cli.connect import find_redis_url
    from consumers.runtime import run_worker
    from inference.runtime import open_ledger, open_runtime
    from ledger.remote import remote_reader

    names = _streams(streams)
    settings = _settings() if concurrency is None else _settings(concurrency=concurrency)
    _require_provider(settings)
    redis_url = find_redis_url(settings)
    read = remote_reader(settings.data_dir)

    async def run(stop: asyncio.Event) -> None:
        async with open_ledger(settings, redis_url) as handle, open_runtime(settings, handle, read) as runtime:
            await run_worker(runtime, names, stop, redis_url=redis_url)

    _run_until_signal(run)


def projector() -> None:
    """Run the projector alone: it folds the ledger into DuckDB and serves that to workers and commands.

    Example: REDIS_URL=redis://localhost:6379 tollbook projector
    """
    from consumers.runtime import run_projector

    settings = _settings()
    _run_until_signal(lambda stop: run_projector(settings, stop))


def stand_in(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 takes a free one.")] = 8787,
    latency_ms: Annotated[int, typer.Option(min=0, help="How long an answer takes.")] = 200,
) -> None:
    """Run the local stand-in for OpenRouter: answers and bills like it, costs nothing, says nothing of worth.

    Example: tollbook stand-in --port 8787
    """
    from inference.standin import StandIn, StandInConfig

    async def run(stop: asyncio.Event) -> None:
        async with StandIn(StandInConfig(port=port, latency_ms=latency_ms)) as server:
            typer.echo(f"stand-in for OpenRouter (not OpenRouter) at {server.base_url}")
            typer.echo(f"use it with: OPENROUTER_BASE_URL={server.base_url} TOLLBOOK_DIALECT=openrouter tollbook up")
            await stop.wait()

    _run_until_signal(run)


def _settings(**overrides: Any) -> "Settings":
    from consumers.telemetry import configure_logging
    from inference.settings import load_settings

    settings = load_settings(**overrides)
    configure_logging(form=settings.log_format, level=settings.log_level)
    return settings


def _streams(names: str) -> list[str]:
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in chosen if name not in ALL_STREAMS]
    if unknown or not chosen:
        raise typer.BadParameter(
            f"{', '.join(unknown) or 'nothing'} is no task stream; they are {', '.join(ALL_STREAMS)}",
            param_hint="--streams",
        )
    return chosen


def can_call(settings: "Settings") -> bool:
    """Whether a provider is configured: a key for OpenRouter, or another server, which may need none."""
    from inference.settings import Settings

    default_url = Settings.model_fields["openrouter_base_url"].default
    return settings.openrouter_api_key is not None or settings.openrouter_base_url != default_url


def _require_provider(settings: "Settings") -> None:
    if not can_call(settings):
        typer.echo(
            "tollbook: no calls can be made: set OPENROUTER_API_KEY, or OPENROUTER_BASE_URL for another "
            "OpenAI-compatible server.\n"
            "tollbook: to try things out without a key, use the local stand-in: tollbook up --stand-in",
            err=True,
        )
        raise typer.Exit(1)


@asynccontextmanager
async def _provider(settings: "Settings", *, with_stand_in: bool) -> AsyncGenerator["Settings"]:
    """Yield settings whose provider can be called."""
    if not with_stand_in:
        _require_provider(settings)
        yield settings
        return
    from inference.standin import StandIn, StandInConfig

    async with StandIn(StandInConfig(latency_ms=200)) as server:
        yield settings.model_copy(
            update={"openrouter_base_url": server.base_url, "openrouter_api_key": None, "dialect": "openrouter"}
        )


def _announce(settings: "Settings", redis_url: str, *, with_stand_in: bool) -> None:
    provider = "the local stand-in for OpenRouter (not OpenRouter)" if with_stand_in else settings.openrouter_base_url
    data_dir = Path(settings.data_dir).resolve()
    typer.echo(f"Tollbook is up. Publish to {redis_url}, for example:")
    typer.echo("  tollbook publish generation generate_draft 'Write a haiku about ledgers.' --user u42 --wait 60")
    typer.echo(f"Provider: {provider}")
    typer.echo(f"Data:     {data_dir}")
    typer.echo("Ctrl-C stops it; calls in flight are finished first.")


def _run_until_signal(main: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    """Run until it ends or SIGINT or SIGTERM comes; a second signal ends it at once."""
    import uvloop

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
        await main(stop)

    uvloop.run(run())
