"""What went wrong, for the person at the terminal: what, with what value, and what to do."""

from typing import Any

import typer

from tollbook.ledger.server.refusals import explain


def describe_usage(exc: typer.TyperException) -> str:
    """Return what is wrong with a command line, and where help can help, which help."""
    anything: Any = exc
    problem = exc.format_message().strip().removesuffix(".")
    possibilities: list[str] | None = getattr(anything, "possibilities", None)
    if option := getattr(anything, "option_name", None):
        problem = problem.partition(" (Possible options:")[0].replace("No such option:", "there is no option")
        if possibilities:
            return f"{problem}; did you mean {' or '.join(sorted(possibilities))}?"
        problem = problem or f"there is no option {option}"
    problem = problem.replace("No such command", "there is no command")
    if ". Did you mean" in problem:
        return problem.replace(". Did you mean", "; did you mean")
    # A value that is refused is named with what is wrong with it; what may be given at all is in the help.
    is_explained = isinstance(exc, typer.BadParameter) and not problem.startswith("Missing")
    context = getattr(anything, "ctx", None)
    if not problem or is_explained or context is None:
        return problem
    return f"{problem} (see `{context.command_path} --help`)"


def describe(exc: Exception) -> list[str]:
    """Return what an error says, a line for each problem."""
    if isinstance(exc, OSError) and exc.strerror:
        return [f"{exc.strerror}: {exc.filename}" if exc.filename else exc.strerror]
    if exc.__cause__ is not None or not type(exc).__module__.startswith("tollbook."):
        return [explain(exc) or type(exc).__name__]
    return str(exc).strip().splitlines()


def is_expected(exc: Exception) -> bool:
    """Whether an error says by itself what is wrong: ours, Redis's, or the operating system's."""
    # By name: to import Redis's client only to ask takes longer than most commands.
    packages = {kind.__module__.partition(".")[0] for kind in type(exc).__mro__}
    return isinstance(exc, OSError) or not packages.isdisjoint(("tollbook", "redis"))
