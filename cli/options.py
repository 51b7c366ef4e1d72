"""Options that several commands have, and options that one command takes over from another.

Each is declared once, shown and read the same in all. Nothing heavy is imported here: every start pays for it.
"""

import inspect
from collections.abc import Callable, Mapping
from copy import copy
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, get_args

import typer
from typer.models import OptionInfo

ArchiveOption = Annotated[
    Path | None,
    typer.Option(
        "--archive", help="An archive alone, copied from anywhere; by default this system's archive and stream."
    ),
]

_Command = TypeVar("_Command", bound=Callable[..., int])


def with_options_of(other: Callable[..., int], *, panel: str) -> Callable[[_Command], _Command]:
    """Give a command the options of `other` that it does not declare itself; it gets them as keywords.

    In its help they stand under the heading `panel`.
    """

    def extend(command: _Command) -> _Command:
        signature = inspect.signature(command, eval_str=True)
        own = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
        names = {each.name for each in own}
        added = [_in_panel(each, panel) for each in options_of(other).values() if each.name not in names]
        # Typer reads a command by its signature.
        cast("Any", command).__signature__ = signature.replace(parameters=[*own, *added])
        return command

    return extend


def options_of(command: Callable[..., int]) -> Mapping[str, inspect.Parameter]:
    """Return a command's options by name."""
    return inspect.signature(command, eval_str=True).parameters


def refuse_without(flag: str, values: Mapping[str, object], command: Callable[..., int]) -> None:
    """Refuse options of `command` that were given although they mean nothing without `flag`.

    Errors: typer.BadParameter, which names the first of them.
    """
    for name, value in values.items():
        if value not in (None, [], options_of(command)[name].default):
            option = f"--{name.replace('_', '-')}"
            raise typer.BadParameter(f"it goes with {flag}", param_hint=option)


def _in_panel(option: inspect.Parameter, panel: str) -> inspect.Parameter:
    kind, info = get_args(option.annotation)
    shown = copy(cast("OptionInfo", info))
    shown.rich_help_panel = panel
    annotation = cast("Any", Annotated)[kind, shown]
    return option.replace(annotation=annotation, kind=inspect.Parameter.KEYWORD_ONLY)
