"""Every command by its name: where it stands, and its line in `tollbook --help`.

A command's module is loaded when that command is asked for, so that none waits for what only others need.
"""

import re
from collections.abc import Mapping
from importlib import import_module
from typing import Any, Final, NamedTuple

import typer
from typer.core import (
    CompletionItem,  # pyright: ignore[reportPrivateImportUsage] - what a completion returns; it stands nowhere else.
    TyperCommand,
    TyperGroup,
)
from typer.main import get_group

from tollbook.ledger.logs import configure_when_used


class Entry(NamedTuple):
    """Where a command stands (`module:name` in this package), and its line in the help.

    `logs` is false for commands that answer at once: structlog takes longer to load than all that they do.
    """

    place: str
    summary: str
    logs: bool = True


COMMANDS: Final[Mapping[str, Entry]] = {
    "demo": Entry("demo:demo", "Run everything here with a stand-in, and prove the books."),
    "up": Entry("serve:up", "Run everything: server, workers and projector."),
    "worker": Entry("serve:worker", "Run a worker; any number may run on one ledger."),
    "projector": Entry("serve:projector", "Run the projector, which folds the ledger into DuckDB."),
    "gateway": Entry("serve:gateway", "Run an HTTP gateway for clients of OpenAI and Anthropic."),
    "stand-in": Entry("stand_in:stand_in", "Run a local server that answers like OpenRouter, for free."),
    "url": Entry("url:url", "Print the address of Redis, with its password.", logs=False),
    "publish": Entry("publish:publish", "Put a task on a stream.", logs=False),
    "result": Entry("publish:result", "Show a task's result.", logs=False),
    "ping": Entry("publish:ping", "Send a ping and wait for a worker's answer.", logs=False),
    "spend": Entry("spend:spend", "Show spend against caps, per user and billing period.", logs=False),
    "top": Entry("top:top", "Watch the running system: calls, money, users, streams."),
    "sql": Entry("sql:sql", "Ask the projection a question in SQL.", logs=False),
    "report": Entry("report:report", "Show the spend report in the browser, or write it to one file."),
    "doctor": Entry("doctor:doctor", "Check settings, Redis, DuckDB, prices and provider."),
    "partitions": Entry("partitions:partitions", "Show where each partition is, its rate, lag and size.", logs=False),
    "reconcile": Entry("reconcile:reconcile", "Ask the provider what uncertain charges really were."),
    "verify": Entry("verify:verify", "Prove that the ledger is whole and that no cap was passed."),
    "recover": Entry("recover:recover", "Put a ledger in order that went back in time."),
    "replay": Entry("replay:replay", "Fold the ledger into a new DuckDB file."),
    "lake": Entry("lake:lake", "Copy sealed events into a DuckLake for analysts."),
    "what-if": Entry("what_if:what_if", "Show what other caps, prices or models would have changed."),
    "audit": Entry("audit:app", "Answer questions from the ledger: calls, users, refusals."),
    "dead-letters": Entry("dead_letters:app", "List, retry or drop tasks that could not be executed.", logs=False),
    "init": Entry("init:init", "Write a policy file with the defaults, commented.", logs=False),
    "policy": Entry("policy:app", "Show, compare and change the policy: caps, plans, routes, budgets."),
    "plan": Entry("plan:app", "Set, show, list and clear users' plans.", logs=False),
    "credit": Entry("credit:app", "Give users or budgets credit, take it back, list it.", logs=False),
    "keys": Entry("keys:app", "Create, list, revoke and replace keys of the HTTP gateway.", logs=False),
    "users": Entry("users:app", "Show and forget whose hashes are on the ledger.", logs=False),
    "alerts": Entry("alerts:app", "List the alerts of budgets, and try who receives them."),
    "cost": Entry("cost:app", "Correct what calls cost, or give back what is only assumed.", logs=False),
}

_LONGEST: Final = 1_000
"""Characters of a first sentence, behind which Typer would cut it."""
# At the end of a line, alone or after a sentence.
_EXAMPLE: Final = re.compile(r"(?:^|(?<=\s))Example: (.+)$", re.MULTILINE)


class LazyGroup(TyperGroup):
    """The commands of the table, each loaded when it is run or asked for its own help."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands.update({name: TyperCommand(name, short_help=each.summary) for name, each in COMMANDS.items()})

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002 - the signature is Typer's.
        """Return a command, loaded; None where there is none."""
        return load_command(cmd_name) if cmd_name in COMMANDS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Return the command that is to be run, its help with its examples on lines of their own."""
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None and name is not None:
            _set_examples_apart(command)
            if not {"-h", "--help"} & set(rest):
                _set_up_logging(COMMANDS[name])
        return name, command, rest

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002
        """Write the list of commands, from the table."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, each.summary) for name, each in COMMANDS.items()])

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """Return the names that begin like this, from the table, and the options that do."""
        names = [name for name in COMMANDS if name.startswith(incomplete)]
        # Past TyperGroup's own, which would load every command of these names.
        options = super(TyperGroup, self).shell_complete(ctx, incomplete)
        return [CompletionItem(name, help=COMMANDS[name].summary) for name in names] + options


class CommandGroup(TyperGroup):
    """A command with commands of its own, listed as those of the table are: no line is cut."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the list of commands, each with the first sentence of its help."""
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl([(name, each.get_short_help_str(_LONGEST)) for name, each in commands if each])

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """Return the names that begin like this, and the options that do, with the same words."""
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        found = [(name, each) for name, each in commands if each and name.startswith(incomplete)]
        options = super(TyperGroup, self).shell_complete(ctx, incomplete)
        return [CompletionItem(name, help=each.get_short_help_str(_LONGEST)) for name, each in found] + [
            each for each in options if each.value not in dict(found)
        ]


def load_command(name: str) -> Any:
    """Import a command's module and return the command."""
    module, _, attribute = COMMANDS[name].place.partition(":")
    found = getattr(import_module(f"tollbook.cli.{module}"), attribute)
    # Without Rich, whose import takes as long as the rest of a `--help`.
    holder = typer.Typer(rich_markup_mode=None)
    if isinstance(found, typer.Typer):
        holder.add_typer(found, name=name, cls=CommandGroup)
    else:
        holder.command(name)(found)
    return get_group(holder).commands[name]


def _set_up_logging(entry: Entry) -> None:
    """See that what is logged goes to standard error: standard output is for data.

    Commands that stay set the level and the form again, from the settings.
    """

    def configure() -> None:
        from tollbook.observability.logs import configure_logging

        configure_logging(form="console", level="WARNING")

    if entry.logs:
        configure()
    else:
        configure_when_used(configure)


def _set_examples_apart(command: Any) -> None:
    """Give each example of a command's help a line of its own, which is not wrapped."""
    for each in (command, *getattr(command, "commands", {}).values()):
        text: str = each.help or ""
        examples = [f"  {example}" for example in _EXAMPLE.findall(text)]
        if examples:
            head = "Example:" if len(examples) == 1 else "Examples:"
            # The backspace tells the help's formatter to leave the paragraph as it is.
            each.help = "\n\n".join((_EXAMPLE.sub("", text).strip(), "\b\n" + "\n".join((head, *examples))))
