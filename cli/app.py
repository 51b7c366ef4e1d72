"""The command line's frame: commands, common options, errors to exit codes.

Exit codes: 0 well; 1 the command failed, or the task was not done; 2 the command line is wrong;
4 there is no result (yet); 130 interrupted.
"""

import os
import sys
from collections.abc import Sequence

import typer

from tollbook.cli import (
    audit,
    dead_letters,
    demo,
    doctor,
    money,
    publish,
    reconcile,
    replay,
    report,
    serve,
    spend,
    sql,
    top,
    verify,
    what_if,
)
from tollbook.observability.logs import configure_logging

app = typer.Typer(
    name="tollbook",
    help="An event-sourced spend ledger for LLM calls, with caps that hold.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo.demo)
app.command()(serve.up)
app.command()(serve.worker)
app.command()(serve.projector)
app.command("stand-in")(serve.stand_in)
app.command()(publish.publish)
app.command()(publish.result)
app.command()(publish.ping)
app.command()(spend.spend)
app.command()(top.top)
app.command()(sql.sql)
app.command()(report.report)
app.command()(doctor.doctor)
app.command()(reconcile.reconcile)
app.command()(verify.verify)
app.command()(replay.replay)
app.command()(what_if.what_if)
app.add_typer(audit.app)
app.add_typer(dead_letters.app)
app.add_typer(money.plan_app)
app.add_typer(money.credit_app)
app.add_typer(money.cost_app)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    # Standard output is for data, whatever is logged; commands that stay set the level and form from the settings.
    configure_logging(form="console", level="WARNING")
    try:
        code = app(args=None if arguments is None else list(arguments), standalone_mode=False)
    except typer.Abort:
        return 130
    except typer.TyperException as exc:
        # One line; the usage, which Typer would print above it, is what --help is for.
        problem = exc.format_message().strip()
        if problem:  # Without any argument, the help has been printed already.
            typer.echo(f"tollbook: {problem} (see --help)", err=True)
        return exc.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output has gone (`tollbook spend | head`).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as exc:
        if os.environ.get("TOLLBOOK_LOG_LEVEL", "").upper() == "DEBUG":
            raise
        problem = str(exc).strip() or type(exc).__name__
        for line in problem.splitlines():
            typer.echo(f"tollbook: {line}", err=True)
        if not _is_expected(exc):
            typer.echo(
                f"tollbook: this is unexpected ({type(exc).__name__}); TOLLBOOK_LOG_LEVEL=DEBUG shows where", err=True
            )
        return 1
    return code if isinstance(code, int) else 0


def _is_expected(exc: Exception) -> bool:
    """Whether an error says by itself what is wrong."""
    from redis.exceptions import RedisError

    from tollbook.schemas.errors import AppError

    return isinstance(exc, AppError | RedisError | OSError)
