"""The table of all commands: the module of each, and its line in `tollbook --help`.

A command's module is imported only when that command is used, so that no command waits for another's imports.
"""

import re
from collections.abc import Mapping
from importlib import import_module
from typing import Any, Final, NamedTuple

import typer
from typer.core import (
    CompletionItem,  # pyright: ignore[reportPrivateImportUsage] - what a completion returns; it has no public home.
    TyperCommand,
    TyperGroup,
)
from typer.main import get_group

from tollbook.ledger.logs import configure_when_used


class Entry(NamedTuple):
    """Where to import a command from (`module:name` in this package), and its line in the help.

    `logs` is false for commands that answer at once: importing structlog would take longer than the command.
    """

    place: str
    summary: str
    logs: bool = True


COMMANDS: Final[Mapping[str, Entry]] = {
    "demo": Entry("demo:demo", "Run everything here with a stand-in provider, and verify the books."),
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
    "sql": Entry("sql:sql", "Query the projection in SQL.", logs=False),
    "report": Entry("report:report", "Show the spend report in the browser, or write it to one file."),
    "doctor": Entry("doctor:doctor", "Check settings, Redis, DuckDB, prices and provider."),
    "partitions": Entry("partitions:partitions", "Show where each partition is, its rate, lag and size.", logs=False),
    "reconcile": Entry("reconcile:reconcile", "Ask the provider for the real cost of uncertain charges."),
    "verify": Entry("verify:verify", "Prove that the ledger is whole and that no cap was passed."),
    "recover": Entry("recover:recover", "Repair a ledger that lost events."),
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
    "users": Entry("users:app", "Show and forget users whose ids are hashed on the ledger.", logs=False),
    "alerts": Entry("alerts:app", "List the alerts of budgets, and test who receives them."),
    "cost": Entry("cost:app", "Correct costs of calls, or give back assumed charges.", logs=False),
}

_SENTENCE_END: Final = re.compile(r"(?<=\.)\s|\n\n")
# At the end of a line, alone or after a sentence.
_EXAMPLE: Final = re.compile(r"(?:^|(?<=\s))Example: (.+)$", re.MULTILINE)


class LazyGroup(TyperGroup):
    """The commands of the table. Each is imported when it is run or when its help is shown."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands.update({name: TyperCommand(name, short_help=each.summary) for name, each in COMMANDS.items()})

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002 - the signature is Typer's.
        """Import and return a command; None for an unknown name."""
        return load_command(cmd_name) if cmd_name in COMMANDS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Return the command to run. Its help has the examples on lines of their own."""
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
        """Return the command names (from the table) and the options that begin with `incomplete`."""
        names = [name for name in COMMANDS if name.startswith(incomplete)]
        # Skips TyperGroup's own method, which would import every one of these commands.
        options = super(TyperGroup, self).shell_complete(ctx, incomplete)
        return [CompletionItem(name, help=COMMANDS[name].summary) for name in names] + options


def load_command(name: str) -> Any:
    """Import a command's module and return the command."""
    module, _, attribute = COMMANDS[name].place.partition(":")
    found = getattr(import_module(f"tollbook.cli.{module}"), attribute)
    # Without Rich: its import takes as long as the rest of a `--help`.
    holder = typer.Typer(rich_markup_mode=None)
    if isinstance(found, typer.Typer):
        holder.add_typer(found, name=name)
    else:
        holder.command(name)(found)
    return get_group(holder).commands[name]


def _set_up_logging(entry: Entry) -> None:
    """Send log lines to standard error, because standard output is for data.

    Long-running commands set level and format again, from the settings.
    """

    def configure() -> None:
        from tollbook.observability.logs import configure_logging

        configure_logging(form="console", level="WARNING")

    if entry.logs:
        configure()
    else:
        configure_when_used(configure)


def _set_examples_apart(command: Any) -> None:
    """Put each example of a command's help on a line of its own, which is not wrapped.

    A group lists the whole first sentence of each command: Click would cut it off at 45 characters.
    """
    for each in (command, *getattr(command, "commands", {}).values()):
        text: str = each.help or ""
        each.short_help = _SENTENCE_END.split(text.strip(), maxsplit=1)[0]
        examples = [f"  {example}" for example in _EXAMPLE.findall(text)]
        if examples:
            head = "Example:" if len(examples) == 1 else "Examples:"
            # The backspace tells Click's help formatter not to wrap this paragraph.
            each.help = "\n\n".join((_EXAMPLE.sub("", text).strip(), "\b\n" + "\n".join((head, *examples))))
