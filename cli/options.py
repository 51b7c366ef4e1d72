"""Options that several commands share, and the parsing of their values.

Never imports anything heavy, because every command loads this module.
"""

import re
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from tollbook.schemas.money import MoneyError, nanousd_from_usd

if TYPE_CHECKING:
    from tollbook.inference.settings import Settings
    from tollbook.schemas.policy import Policy

ArchiveOption = Annotated[
    str | None,
    typer.Option(
        "--archive",
        metavar="PLACE",
        help="Read only this archive: a directory or s3://bucket/prefix; by default this system's archive and stream.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def read_id(value: str | None) -> str | None:
    """Return an id normalised; the callback of every option that names a user or a campaign.

    Errors: typer.BadParameter.
    """
    return None if value is None else check_id(value)


def read_call(value: str | None) -> str | None:
    """Return a call id normalised. It may also be the id of a command or an application."""
    from tollbook.schemas.identifiers import normalise_id

    return None if value is None else normalise_id(value)


UserArgument = Annotated[str, typer.Argument(metavar="USER", help="User id.", callback=read_id)]


def data_settings() -> "Settings":
    """Return the settings of a command that reads; a line on standard error says if it reads a kept demo."""
    from tollbook.app.connect import data_settings as with_data
    from tollbook.inference.settings import load_settings

    settings = load_settings()
    chosen = with_data(settings)
    if chosen is not settings:
        typer.echo(f"tollbook: reading the demo's data in {chosen.data_dir}/", err=True)
    return chosen


def load_redis_alone() -> None:
    """Import the Redis client without OpenTelemetry, for a fast command.

    If OpenTelemetry is installed, redis-py 8.1 imports its SDK for metrics that are off. That takes a third of the
    command's time.
    """
    sdk = "opentelemetry.sdk.metrics"
    if sdk in sys.modules or "redis" in sys.modules:
        return
    sys.modules[sdk] = None  # pyright: ignore[reportArgumentType] - Python's way to say that there is no such module.
    try:
        import redis.asyncio  # noqa: F401  # pyright: ignore[reportUnusedImport]
    finally:
        del sys.modules[sdk]


def check_id(value: str, hint: str | None = None) -> str:
    """Return an id normalised.

    Errors: typer.BadParameter, which names `hint`, or by default the option whose callback this is.
    """
    from tollbook.schemas.identifiers import check_id as check

    try:
        return check(value)
    except ValueError as exc:
        raise typer.BadParameter(f"{exc}: {value!r:.80}", param_hint=hint) from None


def read_period(value: str | None) -> str | None:
    """Return a valid billing period unchanged; the callback of every option that names one.

    Errors: typer.BadParameter.
    """
    if value is not None and not re.fullmatch(r"\d{4}-(0[1-9]|1[0-2])", value):
        raise typer.BadParameter("a billing period is written YYYY-MM")
    return value


def check_usd(dollars: str, hint: str) -> int:
    """Return an amount in nano-dollars. Errors: typer.BadParameter, which names `hint`."""
    try:
        return nanousd_from_usd(dollars)
    except MoneyError as exc:
        raise typer.BadParameter(str(exc), param_hint=hint) from None


def complete_stream(incomplete: str) -> list[str]:
    """Return the task streams that begin with `incomplete`, for shell completion."""
    return _names_of_policy(incomplete, lambda policy: policy.streams)


def complete_task_type(incomplete: str) -> list[str]:
    """Return the task types that begin with `incomplete`, for shell completion."""
    return _names_of_policy(incomplete, lambda policy: policy.task_types)


def complete_plan(incomplete: str) -> list[str]:
    """Return the plans that begin with `incomplete`, for shell completion."""
    return _names_of_policy(incomplete, lambda policy: policy.plans)


def _names_of_policy(incomplete: str, names: "Callable[[Policy], Iterable[str]]") -> list[str]:
    """Return names of the local policy file or the defaults; completion must be fast, so no server is asked."""
    from tollbook.inference.errors import SettingsError
    from tollbook.inference.settings import load_settings
    from tollbook.inference.stated_policy import policy_of
    from tollbook.schemas.policy import default_policy

    try:
        policy = policy_of(load_settings())
    except SettingsError:
        policy = default_policy()
    return [name for name in names(policy) if name.startswith(incomplete)]
