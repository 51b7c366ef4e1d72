"""Turns errors into lines for the terminal: what is wrong, with which value, and what to do."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

import typer


def describe_usage(exc: typer.TyperException) -> str:
    """Return what is wrong with a command line, in one line; where useful, with the `--help` to read."""
    usage_error: Any = exc
    problem = exc.format_message().strip().removesuffix(".")
    if isinstance(exc, typer.BadParameter) and not problem.startswith("Missing"):
        return _bad_value(exc)
    if hasattr(usage_error, "possibilities"):
        problem = f"there is no option {usage_error.option_name}"
        if suggestion := did_you_mean(usage_error.option_name, usage_error.possibilities or ()):
            return problem + suggestion
    problem = problem.replace("No such command", "there is no command")
    if ". Did you mean" in problem:
        return problem.replace(". Did you mean", "; did you mean")
    context = getattr(usage_error, "ctx", None)
    return f"{problem} (see `{context.command_path} --help`)" if context else problem


def asks_for_help(exc: typer.TyperException) -> bool:
    """Whether a command was given no arguments at all; the message is then its help."""
    return type(exc).__name__ == "NoArgsIsHelpError"


def describe(exc: Exception) -> list[str]:
    """Return an error's message, a line for each problem."""
    if isinstance(exc, OSError) and exc.strerror:
        return [f"{exc.strerror}: {exc.filename}" if exc.filename else exc.strerror]
    # Imported here: it loads pydantic, which `--version` and `--help` do not need.
    from tollbook.ledger.server.refusals import explain

    if exc.__cause__ is not None or not type(exc).__module__.startswith("tollbook."):
        return [explain(exc) or type(exc).__name__]
    return str(exc).strip().splitlines()


def is_expected(exc: Exception) -> bool:
    """Whether an error's message explains it: an error of ours, of Redis, or of the operating system."""
    # By name: importing the Redis client for this takes longer than most commands.
    packages = {kind.__module__.partition(".")[0] for kind in type(exc).__mro__}
    return isinstance(exc, OSError) or not packages.isdisjoint(("tollbook", "redis"))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean ...?` with the closest known word, or an empty text if none is close."""
    close = get_close_matches(word, list(known), n=1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else ""


def _bad_value(exc: typer.BadParameter) -> str:
    problem = _pydantic_problem(exc.__cause__) or exc.message.strip().removesuffix(".")
    hint = exc.param_hint or (exc.param.get_error_hint() if exc.param is not None else None)
    name = hint if isinstance(hint, str) else " / ".join(hint or ())
    return f"{name.replace(chr(39), '')}: {problem}" if name else problem


def _pydantic_problem(cause: object) -> str | None:
    """Return our text for a value that Typer refuses with a pydantic error; None for other errors."""
    if type(cause).__name__ != "ValidationError":
        return None
    error: Any = cause
    first: dict[str, Any] = error.errors(include_url=False)[0]
    given, limits, message = f"{first['input']!r:.80}", first.get("ctx", {}), str(first["msg"])
    match first["type"]:
        case "greater_than_equal":
            return f"{given} is too small: it must be {limits['ge']} or more"
        case "less_than_equal":
            return f"{given} is too large: it must be {limits['le']} or less"
        case "int_parsing" | "int_type" | "int_from_float":
            return f"{given} is not a whole number"
        case "float_parsing" | "float_type" | "finite_number":
            return f"{given} is not a number"
        case _:
            problem = message.removeprefix("Value error, ")
            refused, _, choices = problem.partition(" is not one of ")
            known = re.findall(r"'([^']+)'", choices)
            return f"{refused} is not one of {', '.join(known)}{did_you_mean(refused, known)}" if known else problem
