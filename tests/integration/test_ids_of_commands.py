"""Commands take an id in whatever spelling it is typed: each one that names a user, a campaign or a call."""

from collections.abc import Iterator
from typing import Any

import pytest
import typer

from tollbook.cli.commands import COMMANDS, load_command

DECOMPOSED = "rene\u0301"
COMPOSED = "ren\u00e9"
# What an option or argument is called that takes an id.
NAMES = {"user", "user_id", "campaign", "campaign_id", "call", "call_id", "key", "task_id"}
# `publish` makes a task, whose fields are read as every task's (tests/unit/test_entries.py).
ELSEWHERE = {("publish", "user"), ("publish", "campaign"), ("publish", "task_id")}


def _parameters(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    for child, each in getattr(command, "commands", {}).items():
        yield from _parameters(f"{name} {child}", each)
    for parameter in command.params:
        yield name, parameter


def _of_ids() -> list[tuple[str, str]]:
    found = [(name, each.name) for top in COMMANDS for name, each in _parameters(top, load_command(top))]
    return [each for each in found if each[1] in NAMES and each not in ELSEWHERE]


@pytest.mark.parametrize(("command", "name"), _of_ids(), ids=lambda value: value)
def test_a_command_takes_both_spellings_of_an_id_for_one(command: str, name: str) -> None:
    top = command.split(maxsplit=1)[0]
    (parameter,) = (p for where, p in _parameters(top, load_command(top)) if (where, p.name) == (command, name))
    context = typer.Context(load_command(top))
    assert parameter.process_value(context, DECOMPOSED) == COMPOSED
    assert parameter.process_value(context, COMPOSED) == COMPOSED


def test_some_command_takes_an_id() -> None:
    assert {("plan set", "user"), ("credit grant", "user"), ("spend", "user"), ("audit user", "user_id")} <= set(
        _of_ids()
    )
