"""Shared by the commands that change money: author and reason, confirmation, running, and the report."""

import asyncio
import getpass
import json
import re
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from typer.core import TyperCommand

from tollbook.cli.options import check_usd, load_redis_alone, read_id
from tollbook.schemas.money import NANOUSD_PER_USD, format_usd

if TYPE_CHECKING:
    from tollbook.inference.administration import Administration
    from tollbook.ledger.signature import Signature

ReasonOption = Annotated[str, typer.Option(help="The reason; recorded on the ledger.")]
AuthorOption = Annotated[str | None, typer.Option(help="Who does it; by default your login name.")]
KeyOption = Annotated[
    str | None, typer.Option(help="Idempotency key: a repeat with the same key changes nothing.", callback=read_id)
]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask, whatever the amount.")]

# What is wrong with a zero or negative amount, by command.
_RULES: Final = {
    "grant": "a credit must be greater than zero",
    "revoke": "the amount to take back must be greater than zero",
    "adjust": "a cost cannot be negative",
}


class AmountCommand(TyperCommand):
    """A command whose argument is an amount: `-2.50` is a negative amount, not an unknown option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line, and say what is wrong with a negative amount."""
        negative = next((each for each in args if re.fullmatch(r"-\$?\.?\d\S*", each)), None)
        try:
            return super().parse_args(ctx, args)
        except typer.TyperException as exc:
            if negative is None or not hasattr(exc, "option_name"):
                raise
            raise typer.BadParameter(f"{_RULES[self.name or 'adjust']}, got {negative}") from None


def check_amount(amount: str, hint: str, command: str) -> int:
    """Return an amount above zero in nano-dollars. Errors: typer.BadParameter."""
    if re.fullmatch(r"-\$?\.?\d\S*", amount):
        raise typer.BadParameter(f"{_RULES[command]}, got {amount}", param_hint=hint)
    nanousd = check_usd(amount, hint)
    if nanousd == 0:
        raise typer.BadParameter(f"{_RULES[command]}, got {amount}", param_hint=hint)
    return nanousd


def confirm(text: str, moved_nanousd: int, *, yes: bool) -> None:
    """Ask before a change of more than TOLLBOOK_CONFIRM_USD; without a terminal, refuse it.

    Errors: typer.Exit if the answer is no; typer.BadParameter.
    """
    from tollbook.inference.settings import load_settings

    limit_usd = load_settings().confirm_usd
    if yes or moved_nanousd <= limit_usd * NANOUSD_PER_USD:
        return
    if not sys.stdin.isatty():
        limit = format_usd(limit_usd * NANOUSD_PER_USD)
        problem = f"this changes more than {limit} (TOLLBOOK_CONFIRM_USD), so it needs --yes. It would do this: {text}"
        raise typer.BadParameter(problem, param_hint="--yes")
    if not typer.confirm(f"{text}. Do it?", err=True):
        raise typer.Exit(1)


def run_signed(
    command: "Callable[[Administration, Signature], Awaitable[dict[str, Any]]]",
    author: str | None,
    reason: str,
    key: str | None = None,
) -> dict[str, Any]:
    """Run a command on the ledger, signed. Errors: typer.BadParameter; those of `connect_administration`."""
    load_redis_alone()
    from tollbook.inference.administration import connect_administration

    signature = sign(author, reason, key)

    async def connect() -> dict[str, Any]:
        async with connect_administration() as administration:
            return await command(administration, signature)

    return asyncio.run(connect())


def sign(author: str | None, reason: str, key: str | None = None) -> "Signature":
    """Return the signature of a command: author, reason and idempotency key. Errors: typer.BadParameter."""
    from tollbook.ledger.signature import Signature

    if not reason.strip():
        raise typer.BadParameter("give a reason: it is recorded on the ledger", param_hint="--reason")
    return Signature(author or _login_name(), reason.strip()[:500], key)


def _login_name() -> str:
    """Return who runs this command. Errors: typer.BadParameter if the system does not know."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # A container whose user has no name.
        raise typer.BadParameter("your login name is unknown: give --author", param_hint="--author") from None


def tell(done: dict[str, Any], text: str, *, as_json: bool) -> int:
    """Print what was done, or that there was nothing to do; return the exit code."""
    if as_json:
        typer.echo(json.dumps(done))
    else:
        typer.echo(text if done["is_new"] else f"nothing to do: {text}")
    return 0


def usd(nanousd: int) -> str:
    """Format an amount with as many places as it needs."""
    return format_usd(nanousd, places=None)
