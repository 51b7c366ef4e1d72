"""`tollbook dead-letters`: look at tasks that could not be executed, run them again, or drop them."""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tollbook.consumers.dead_letters import DeadLetter, DeadLetters

app = typer.Typer(name="dead-letters", help="Tasks that could not be executed.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Ids = Annotated[list[str], typer.Argument(help="Ids of dead letters, as `dead-letters list` shows them.")]


@app.command("list")
def list_letters(
    count: Annotated[int, typer.Option(min=1, max=100_000, help="How many at most, the oldest first.")] = 50,
    as_json: Json = False,
) -> int:
    """List dead letters.

    Example: tollbook dead-letters list
    """

    async def run(letters: "DeadLetters") -> int:
        found = await letters.list(count=count)
        if as_json:
            typer.echo(json.dumps([_document(letter) for letter in found]))
        elif found:
            _print(found, total=await letters.count())
        else:
            typer.echo("no dead letters")
        return 0

    return _with_letters(run)


@app.command()
def show(letter_id: Annotated[str, typer.Argument(metavar="ID")], as_json: Json = False) -> int:
    """Show one dead letter, with the task as it was published (prompt included).

    Example: tollbook dead-letters show 1764000000000-0
    """

    async def run(letters: "DeadLetters") -> int:
        document = _document(await _get(letters, letter_id), whole=True)
        if as_json:
            typer.echo(json.dumps(document))
            return 0
        for name, value in document.items():
            if name == "fields":
                typer.echo("fields:")
                for field, content in value.items():
                    typer.echo(f"  {field}: {content}")
            else:
                typer.echo(f"{name}: {value}")
        return 0

    return _with_letters(run)


@app.command()
def retry(letter_ids: Ids, as_json: Json = False) -> int:
    """Put tasks on their streams again and drop their letters.

    A malformed task goes back as it was. One whose workers died, or whose task id was used before, runs under a new
    task id, which is printed: the result under the old id stands. Example: tollbook dead-letters retry 1764000000000-0
    """

    async def run(letters: "DeadLetters") -> int:
        for letter in [await _get(letters, letter_id) for letter_id in letter_ids]:
            done = await letters.retry(letter)
            answer = {"letter": letter.id, "stream": done.stream, "entry_id": done.entry_id, "task_id": done.task_id}
            typer.echo(json.dumps(answer) if as_json else f"{letter.id}: on {done.stream} again as task {done.task_id}")
        return 0

    return _with_letters(run)


@app.command()
def drop(letter_ids: Ids) -> int:
    """Remove dead letters for good.

    Example: tollbook dead-letters drop 1764000000000-0
    """

    async def run(letters: "DeadLetters") -> int:
        for letter in [await _get(letters, letter_id) for letter_id in letter_ids]:
            await letters.drop(letter.id)
            typer.echo(f"{letter.id}: dropped")
        return 0

    return _with_letters(run)


def _with_letters(run: "Callable[[DeadLetters], Awaitable[int]]") -> int:
    async def connect() -> int:
        from tollbook.app.connect import connected
        from tollbook.consumers.dead_letters import DeadLetters
        from tollbook.inference.settings import load_settings

        settings = load_settings()
        async with connected(settings) as connection:
            return await run(DeadLetters(connection.pipeline, settings.namespace))

    return asyncio.run(connect())


async def _get(letters: "DeadLetters", letter_id: str) -> "DeadLetter":
    if not re.fullmatch(r"\d{1,20}-\d{1,20}", letter_id):
        raise typer.BadParameter(f"{letter_id!r} is no id; ids look like 1764000000000-0", param_hint="ID")
    letter = await letters.get(letter_id)
    if letter is None:
        raise typer.BadParameter(f"there is no dead letter {letter_id}", param_hint="ID")
    return letter


def _document(letter: "DeadLetter", *, whole: bool = False) -> dict[str, Any]:
    """Return what is shown of a letter; the published fields, which hold prompts, only where asked for."""
    document: dict[str, Any] = {
        "id": letter.id,
        "reason": letter.reason,
        "error": letter.error,
        "stream": letter.stream,
        "entry_id": letter.entry_id,
        "task_id": letter.task_id,
        "user_id": letter.user_id or None,
        "deliveries": letter.deliveries,
        "at": datetime.fromtimestamp(letter.at_ms / 1000, UTC).isoformat(timespec="milliseconds"),
    }
    if whole:
        document["fields"] = {
            name.decode(errors="replace"): value.decode(errors="replace") for name, value in letter.fields.items()
        }
    return document


def _print(letters: "list[DeadLetter]", *, total: int) -> None:
    from tollbook.views.tables import Printer, Row, printable, utc

    rows = [
        Row(
            [letter.id, f"{utc(letter.at_ms):%m-%d %H:%M:%S}", letter.reason, printable(letter.stream)],
            [f"{printable(letter.task_id)}: {printable(letter.error)}"],
        )
        for letter in letters
    ]
    Printer().table(("id", "time (UTC)", "reason", "stream"), rows)
    if total > len(letters):
        typer.echo(f"{len(letters)} of {total}; --count shows more")
