"""The page of commands, made from the command line itself: docs/reference/commands.md."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import typer
import typer.main

from docs.generate.markdown import code, table, with_part
from tollbook.cli.app import app

PAGE: Final = Path(__file__).resolve().parents[1] / "reference" / "commands.md"
_EXAMPLE: Final = re.compile(r"^Example: (.+)$|(?<=\s)Example: (.+)$", re.MULTILINE)


def documents() -> dict[Path, str]:
    """Return the page, with its text."""
    text = PAGE.read_text(encoding="utf-8")
    return {PAGE: with_part(with_part(text, "index", index()), "commands", descriptions())}


def commands() -> dict[str, Any]:
    """Return every command by its full name, for example `dead-letters list`."""
    return dict(_commands_of(typer.main.get_command(app), ""))


def index() -> str:
    """Every command with the first sentence of its help."""
    rows = [(f"[`tollbook {name}`](#{_anchor(name)})", _summary(each)) for name, each in commands().items()]
    return table(("command", "what it does"), rows)


def descriptions() -> str:
    """Every command with its help, its examples and its options."""
    return "\n\n".join(part for name, each in commands().items() for part in _description(name, each))


def _commands_of(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    if not hasattr(command, "list_commands"):
        yield name, command
        return
    context = typer.Context(command)
    for child in command.list_commands(context):
        yield from _commands_of(command.get_command(context, child), f"{name} {child}".strip())


def _description(name: str, command: Any) -> Iterator[str]:
    yield f"## `tollbook {name}`"
    text = command.help or ""
    yield " ".join(_EXAMPLE.sub("", text).split())
    examples = [first or second for first, second in _EXAMPLE.findall(text)]
    if examples:
        yield "```sh\n" + "\n".join(examples) + "\n```"
    rows = [_option(each) for each in command.params if not getattr(each, "hidden", False)]
    if rows:
        yield table(("argument or option", "default", "meaning"), rows)


def _option(option: Any) -> tuple[str, str, str]:
    is_argument = not option.opts[0].startswith("-")
    name = option.opts[0].upper() if is_argument else ", ".join(option.opts)
    meaning = option.help or ""
    if getattr(option, "multiple", False):
        meaning += " Can be given several times."
    return code(name), _default(option, is_argument=is_argument), meaning


def _default(option: Any, *, is_argument: bool) -> str:
    value = option.default
    if option.required:
        return "required"
    is_unset = is_argument or value is None or value is False or value == ""
    return "" if is_unset else code(str(value))


def _summary(command: Any) -> str:
    text = " ".join(_EXAMPLE.sub("", command.help or "").split())
    return re.split(r"(?<=[.])\s", text, maxsplit=1)[0]


def _anchor(name: str) -> str:
    return f"tollbook-{name.replace(' ', '-')}"
