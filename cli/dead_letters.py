"""`tollbook dead-letters`: list tasks that could not be executed, retry them, or drop them."""

import asyncio
import json
import re
import shutil
import sys
import textwrap
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from tollbook.cli.moments import parse_since
from tollbook.cli.options import JsonOption, data_settings, load_redis_alone, read_id
from tollbook.cli.user_ids import on_ledger_or_none
from tollbook.views.tables import printable

if TYPE_CHECKING:
    from tollbook.consumers.dead_letters import DeadLetter, DeadLetters, Selection

app = typer.Typer(help="Tasks that could not be executed.", no_args_is_help=True)

_REASONS: Final = ("invalid_task", "idempotency_conflict", "attempts_exhausted")
_INDENT: Final = " " * 4

Id = Annotated[str, typer.Argument(metavar="ID", help="Id of a dead letter, as `dead-letters list` shows it.")]
Ids = Annotated[
    list[str] | None, typer.Argument(metavar="ID", help="Ids of dead letters, as `dead-letters list` shows them.")
]
All = Annotated[bool, typer.Option("--all", help="All dead letters, or all that match the filters.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Stream = Annotated[str | None, typer.Option(help="Only tasks of this stream.")]
ReasonFilter = Annotated[str | None, typer.Option(help=f"Only for this reason: {', '.join(_REASONS)}.")]
User = Annotated[str | None, typer.Option(help="Only tasks of this user.", callback=read_id)]
Since = Annotated[
    str | None, typer.Option(help="Only tasks dead-lettered since then: 2026-11-24 or 2026-11-24T12:00:00Z.")
]


@app.command("list")
def list_letters(
    count: Annotated[int, typer.Option(min=1, max=100_000, help="How many at most, the oldest first.")] = 50,
    is_all: Annotated[bool, typer.Option("--all", help="Show all, however many.")] = False,
    stream: Stream = None,
    reason: ReasonFilter = None,
    user: User = None,
    since: Since = None,
    as_json: JsonOption = False,
) -> int:
    """List dead letters.

    Too many or too old dead letters are dropped; a line on standard error says how many.

    Example: tollbook dead-letters list --user u42 --since 2026-11-24
    """
    selection = _selection(stream, reason, user, since)

    async def run(letters: "DeadLetters") -> int:
        found = [letter async for letter in letters.select(selection)]
        shown = await _with_plain_ids(letters, found if is_all else found[:count])
        if dropped := await letters.dropped():
            were = "was" if dropped == 1 else "were"
            limits = "TOLLBOOK_DEAD_LETTERS_MAX and TOLLBOOK_DEAD_LETTERS_KEEP_S limit what is kept"
            typer.echo(f"tollbook: {_number(dropped)} {were} dropped, the oldest first: {limits}", err=True)
        if as_json:
            typer.echo(json.dumps([_document(letter) for letter in shown]))
            return 0
        for letter in shown:
            for line in _lines(letter):
                typer.echo(line)
        if not found:
            typer.echo("no dead letters")
        elif len(found) > len(shown):
            typer.echo(f"{len(shown):,} of {len(found):,} dead letters; --all shows all")
        else:
            typer.echo(_number(len(found)))
        return 0

    return _with_letters(run, is_reading=True)


@app.command()
def show(letter_id: Id, as_json: JsonOption = False) -> int:
    """Show one dead letter, with the task as it was published (prompt included).

    Example: tollbook dead-letters show 1764000000000-0
    """
    load_redis_alone()

    async def run(letters: "DeadLetters") -> int:
        (letter,) = await _with_plain_ids(letters, [await _get(letters, letter_id)])
        document = _document(letter, whole=True)
        if as_json:
            typer.echo(json.dumps(document))
            return 0
        for name, value in document.items():
            if name == "fields":
                typer.echo("fields:")
                for field, content in value.items():
                    lines = "\n    ".join(printable(line) for line in content.splitlines())
                    typer.echo(f"  {printable(field)}: {lines}")
            elif value is not None:
                typer.echo(f"{name}: {printable(str(value))}")
        return 0

    return _with_letters(run, is_reading=True)


@app.command()
def retry(
    letter_ids: Ids = None,
    is_all: All = False,
    stream: Stream = None,
    reason: ReasonFilter = None,
    user: User = None,
    since: Since = None,
    unchanged: Annotated[
        bool, typer.Option("--unchanged", help="Put each entry back byte for byte, malformed ones too.")
    ] = False,
    yes: Yes = False,
    as_json: JsonOption = False,
) -> int:
    """Put tasks on their streams again, and drop their dead letters.

    Each task gets a new task id, which is printed; the result under the old id is kept. A malformed task would fail
    again, so it stays a dead letter, and the exit code is 1.

    Example: tollbook dead-letters retry 1764000000000-0
    Example: tollbook dead-letters retry --all --reason attempts_exhausted --yes
    """
    chosen = _Choice(letter_ids, _selection(stream, reason, user, since), is_all=is_all)

    async def run(letters: "DeadLetters") -> int:
        from tollbook.schemas.tasks import InvalidTask

        found = await chosen.find(letters)
        chosen.confirm(found, "retry", yes=yes)
        stay = 0
        for letter in found:
            try:
                done = await letters.retry(letter, unchanged=unchanged)
            except InvalidTask as exc:
                stay += 1
                answer = {"letter": letter.id, "error": str(exc)}
                if as_json:
                    typer.echo(json.dumps(answer))
                else:
                    typer.echo(f"tollbook: {letter.id} is not retried: it is malformed ({exc})", err=True)
                continue
            answer = {"letter": letter.id, "stream": done.stream, "entry_id": done.entry_id, "task_id": done.task_id}
            typer.echo(json.dumps(answer) if as_json else f"{letter.id}: on {done.stream} again as task {done.task_id}")
        if stay and not as_json:
            advice = "publish corrected tasks and drop these dead letters, or retry with --unchanged"
            typer.echo(f"tollbook: {stay:,} of {_number(len(found))} would fail again: {advice}", err=True)
        elif chosen.is_bulk and not as_json:
            typer.echo(f"{_number(len(found))} retried")
        return 1 if stay else 0

    return _with_letters(run)


@app.command()
def drop(
    letter_ids: Ids = None,
    is_all: All = False,
    stream: Stream = None,
    reason: ReasonFilter = None,
    user: User = None,
    since: Since = None,
    yes: Yes = False,
) -> int:
    """Remove dead letters for good.

    Example: tollbook dead-letters drop 1764000000000-0
    Example: tollbook dead-letters drop --all --user u42 --yes
    """
    chosen = _Choice(letter_ids, _selection(stream, reason, user, since), is_all=is_all)

    async def run(letters: "DeadLetters") -> int:
        found = await chosen.find(letters)
        chosen.confirm(found, "drop", yes=yes)
        for letter in found:
            await letters.drop(letter.id)
            typer.echo(f"{letter.id}: dropped")
        if chosen.is_bulk:
            typer.echo(f"{_number(len(found))} dropped")
        return 0

    return _with_letters(run)


class _Choice:
    """The dead letters that a command acts on: the ids given, or all that match the filters."""

    def __init__(self, ids: Sequence[str] | None, selection: "Selection", *, is_all: bool) -> None:
        from tollbook.consumers.dead_letters import Selection

        self._ids = ids or ()
        self._selection = selection
        self.is_bulk = is_all
        if ids and (is_all or selection != Selection()):
            raise typer.BadParameter("give ids, or --all with filters", param_hint="ID")
        if not ids and not is_all:
            raise typer.BadParameter("give the ids of dead letters, or --all", param_hint="ID")

    async def find(self, letters: "DeadLetters") -> "list[DeadLetter]":
        """Return the dead letters, oldest first. Errors: typer.BadParameter for an unknown id."""
        if self._ids:
            return [await _get(letters, each) for each in self._ids]
        return [letter async for letter in letters.select(self._selection)]

    def confirm(self, found: "Sequence[DeadLetter]", verb: str, *, yes: bool) -> None:
        """Ask before --all changes many. Errors: typer.Exit if the answer is no; typer.BadParameter."""
        if not self.is_bulk or yes or not found:
            return
        if not sys.stdin.isatty():
            raise typer.BadParameter(f"this would {verb} {_number(len(found))}; add --yes to do it", param_hint="--all")
        if not typer.confirm(f"{verb.capitalize()} {_number(len(found))}?", err=True):
            raise typer.Exit(1)


def _selection(stream: str | None, reason: str | None, user: str | None, since: str | None) -> "Selection":
    load_redis_alone()
    from tollbook.consumers.dead_letters import Selection

    if reason is not None and reason not in _REASONS:
        raise typer.BadParameter(f"{reason!r:.80} is not one of {', '.join(_REASONS)}", param_hint="--reason")
    kept = on_ledger_or_none(data_settings(), user)
    return Selection(stream, reason, kept, None if since is None else parse_since(since, "--since"))


def _with_letters(run: "Callable[[DeadLetters], Awaitable[int]]", *, is_reading: bool = False) -> int:
    """Run a command on the dead letters. One that only reads also works on a stopped system and on a kept demo."""

    async def connect() -> int:
        from tollbook.app.connect import connected, readable_redis
        from tollbook.consumers.dead_letters import DeadLetters
        from tollbook.inference.settings import load_settings

        async with AsyncExitStack() as stack:
            if is_reading:
                settings = data_settings()
                url, _ = await stack.enter_async_context(readable_redis(settings))
                settings = settings.model_copy(update={"redis_url": url})
            else:
                settings = load_settings()
            connection = await stack.enter_async_context(connected(settings))
            return await run(DeadLetters(connection.pipeline, settings.namespace))

    return asyncio.run(connect())


async def _get(letters: "DeadLetters", letter_id: str) -> "DeadLetter":
    if not re.fullmatch(r"\d{1,20}-\d{1,20}", letter_id):
        raise typer.BadParameter(f"{letter_id!r:.80} is not an id; ids look like 1764000000000-0", param_hint="ID")
    letter = await letters.get(letter_id)
    if letter is None:
        raise typer.BadParameter(f"there is no dead letter {letter_id}", param_hint="ID")
    return letter


async def _with_plain_ids(letters: "DeadLetters", found: "Sequence[DeadLetter]") -> "list[DeadLetter]":
    """Return the letters with plain user ids, where the table beside the ledger knows them."""
    known = await letters.plain_ids(letter.user_id for letter in found)
    return [replace(letter, user_id=known.get(letter.user_id, letter.user_id)) for letter in found]


def _document(letter: "DeadLetter", *, whole: bool = False) -> dict[str, Any]:
    """Return a letter as JSON; with `whole` also the published fields, which contain prompts."""
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


def _lines(letter: "DeadLetter") -> Iterator[str]:
    """Return a letter as lines of text. Ids are never cut; only the error is wrapped."""
    at = datetime.fromtimestamp(letter.at_ms / 1000, UTC)
    yield f"{letter.id}  {at:%Y-%m-%d %H:%M:%S} UTC  {letter.stream}  {letter.reason}"
    yield f"{_INDENT}task {printable(letter.task_id)}"
    if letter.user_id:
        yield f"{_INDENT}user {printable(letter.user_id)}"
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000
    yield from textwrap.wrap(
        printable(letter.error),
        width,
        initial_indent=_INDENT,
        subsequent_indent=_INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _number(count: int) -> str:
    return f"{count:,} dead letter{'' if count == 1 else 's'}"
