"""`tollbook users`: the table of plain user ids beside a ledger that has only their hashes."""

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from tollbook.cli.options import JsonOption, UserArgument, load_redis_alone

if TYPE_CHECKING:
    from tollbook.inference.user_ids import UserIds
    from tollbook.ledger.server.pipeline import CommandPipeline

app = typer.Typer(help="Users' ids, where the ledger has hashes of them.", no_args_is_help=True)

T = TypeVar("T")
_PLAIN = (
    'users\' ids are plain on this ledger, and stay on it forever. Only a ledger with `user_ids = "hashed"` has hashes'
)


@app.command("hash")
def hash_user(user: UserArgument, as_json: JsonOption = False) -> int:
    """Print a user's hash on the ledger, for example to set a cap for this user in the policy.

    Example: tollbook users hash ann@example.com
    """

    async def run(user_ids: "UserIds", pipeline: "CommandPipeline") -> str:  # noqa: ARG001
        return user_ids.on_ledger(user)

    kept = _with_ids(run)
    typer.echo(json.dumps({"user_id": user, "hash": kept}) if as_json else kept)
    return 0


@app.command("list")
def list_users(as_json: JsonOption = False) -> int:
    """List the users in the table, with their hashes on the ledger.

    Example: tollbook users list
    """
    from tollbook.views.tables import Printer, printable

    async def run(user_ids: "UserIds", pipeline: "CommandPipeline") -> dict[str, str]:  # noqa: ARG001
        return await user_ids.known()

    known = sorted((plain, kept) for kept, plain in _with_ids(run).items())
    if as_json:
        typer.echo(json.dumps([{"user_id": plain, "hash": kept} for plain, kept in known]))
    elif known:
        Printer().table(("user", "on the ledger"), [[printable(plain), kept] for plain, kept in known], "Users")
    else:
        typer.echo("the table has no users")
    return 0


@app.command("forget")
def forget_user(
    user: UserArgument,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: JsonOption = False,
) -> int:
    """Remove the link between a user and the hash: the user's entry in the table, and the user's dead letters.

    The events stay, under the hash. The command lists where else the id remains for a time.

    Example: tollbook users forget ann@example.com --yes
    """
    if not yes and not sys.stdin.isatty():
        raise typer.BadParameter("this cannot be undone; add --yes to do it", param_hint="--yes")
    if not yes and not typer.confirm(f"Forget {user}, and drop the user's dead letters? It cannot be undone", err=True):
        raise typer.Exit(1)

    async def run(user_ids: "UserIds", pipeline: "CommandPipeline") -> dict[str, Any]:
        from tollbook.consumers.dead_letters import DeadLetters, Selection
        from tollbook.inference.settings import load_settings

        kept = user_ids.on_ledger(user)
        letters = DeadLetters(pipeline, load_settings().namespace)
        found = [letter async for letter in letters.select(Selection(user_id=kept))]
        for letter in found:
            await letters.drop(letter.id)
        return {"hash": kept, "is_new": await user_ids.forget(user), "dead_letters": len(found)}

    done = _with_ids(run)
    if as_json:
        typer.echo(json.dumps(done))
        return 0
    what = "forgotten" if done["is_new"] else "this id was not in the table"
    typer.echo(f"{what}; {done['dead_letters']:,} dead letters dropped")
    typer.echo(f"The events stay, under {done['hash']}. The id itself may still be in:")
    typer.echo("  tasks on the task streams, until they are done and TOLLBOOK_TASK_KEEP_S is over")
    typer.echo("  prompts, answers and metadata of stored results, until TOLLBOOK_RESULT_TTL_S is over")
    typer.echo("  backups of Redis, and its append-only file until that is rewritten")
    typer.echo("A new task for this id puts it in the table again.")
    return 0


def _with_ids(run: "Callable[[UserIds, CommandPipeline], Awaitable[T]]") -> T:
    """Run a command on the running system's ids. Errors: typer.BadParameter if ids are plain; LedgerUnavailable."""
    load_redis_alone()

    async def ask() -> T:
        from tollbook.app.connect import connected
        from tollbook.inference.settings import load_settings
        from tollbook.inference.user_ids import read_user_ids

        settings = load_settings()
        async with connected(settings) as connection:
            user_ids = await read_user_ids(connection.pipeline, settings.namespace)
            if user_ids is None:
                raise typer.BadParameter(_PLAIN, param_hint="user_ids")
            return await run(user_ids, connection.pipeline)

    return asyncio.run(ask())
