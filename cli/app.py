"""The entry of the command line: load one command, run it, and turn its errors into lines and an exit code.

Exit codes: 0 success; 1 the command failed, or the task was not done; 2 the command line is wrong;
4 there is no result (yet); 130 interrupted.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from tollbook.cli.commands import LazyGroup
from tollbook.cli.problems import asks_for_help, describe, describe_usage, is_expected


def _print_version(is_asked: bool) -> None:
    from tollbook import __version__

    if is_asked:
        typer.echo(f"tollbook {__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=LazyGroup,
    name="tollbook",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def tollbook(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """An event-sourced spend ledger for LLM calls, with caps that hold."""


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    _make_output_safe()
    try:
        code = app(args=None if arguments is None else list(arguments), prog_name="tollbook", standalone_mode=False)
        sys.stdout.flush()
    except (typer.Abort, KeyboardInterrupt):
        return 130
    except typer.TyperException as exc:
        # One line. Typer would print the usage above it; --help shows that.
        typer.echo(exc.format_message() if asks_for_help(exc) else f"tollbook: {describe_usage(exc)}", err=True)
        return exc.exit_code
    except (BrokenPipeError, SystemExit) as exc:
        # Typer turns a broken pipe into SystemExit. It also raises SystemExit after it has shown a shell's completion.
        if isinstance(exc, SystemExit) and not isinstance(exc.__context__, BrokenPipeError):
            return exc.code if isinstance(exc.code, int) else 0
        # The reader of our output has gone (`tollbook spend | head -1`), so Python's flush at exit must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except Exception as exc:
        if os.environ.get("TOLLBOOK_LOG_LEVEL", "").upper() == "DEBUG":
            raise
        for line in describe(exc):
            typer.echo(f"tollbook: {line}", err=True)
        if not is_expected(exc):
            typer.echo(
                f"tollbook: unexpected error ({type(exc).__name__}); TOLLBOOK_LOG_LEVEL=DEBUG shows where", err=True
            )
        return 1
    return code if isinstance(code, int) else 0


def _make_output_safe() -> None:
    """Printing must not fail because the output is closed, or because the terminal lacks a character."""
    if sys.stdout is None:  # After `>&-`.
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - for the life of the process.
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    if reconfigure := getattr(sys.stdout, "reconfigure", None):
        reconfigure(errors="backslashreplace")
