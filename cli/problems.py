"""What went wrong, for the person at the terminal: what, with what value, and what to do."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

import typer


def describe_usage(exc: typer.TyperException) -> str:
    """Return what is wrong with a command line, in one line; with the command whose help can help, where it can."""
    told: Any = exc
    problem = exc.format_message().strip().removesuffix(".")
    if isinstance(exc, typer.BadParameter) and not problem.startswith("Missing"):
        return _bad_value(exc)
    if hasattr(told, "possibilities"):
        problem = f"there is no option {told.option_name}"
        if suggestion := did_you_mean(told.option_name, told.possibilities or ()):
            return problem + suggestion
    problem = problem.replace("No such command", "there is no command")
    if ". Did you mean" in problem:
        return problem.replace(". Did you mean", "; did you mean")
    context = getattr(told, "ctx", None)
    return f"{problem} (see `{context.command_path} --help`)" if context else problem


def asks_for_help(exc: typer.TyperException) -> bool:
    """Whether a command was given nothing that it could do; its help is the message then."""
    return type(exc).__name__ == "NoArgsIsHelpError"


def describe(exc: Exception) -> list[str]:
    """Return what an error says, a line for each problem."""
    if isinstance(exc, OSError) and exc.strerror:
        return [f"{exc.strerror}: {exc.filename}" if exc.filename else exc.strerror]
    # Here, since it loads pydantic, which `--version` and `--help` do not need.
    from tollbook.ledger.server.refusals import explain

    if exc.__cause__ is not None or not type(exc).__module__.startswith("tollbook."):
        return [explain(exc) or type(exc).__name__]
    return str(exc).strip().splitlines()


def is_expected(exc: Exception) -> bool:
    """Whether an error says by itself what is wrong: ours, Redis' or the operating system's."""
    # By name: to import Redis' client only to ask takes longer than most commands.
    packages = {kind.__module__.partition(".")[0] for kind in type(exc).__mro__}
    return isinstance(exc, OSError) or not packages.isdisjoint(("tollbook", "redis"))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean ...?` with the closest of the known words, or nothing where none is close."""
    close = get_close_matches(word, list(known), n=1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else ""


def _bad_value(exc: typer.BadParameter) -> str:
    problem = _pydantic_problem(exc.__cause__) or exc.message.strip().removesuffix(".")
    hint = exc.param_hint or (exc.param.get_error_hint() if exc.param is not None else None)
    name = hint if isinstance(hint, str) else " / ".join(hint or ())
    return f"{name.replace(chr(39), '')}: {problem}" if name else problem


def _pydantic_problem(cause: object) -> str | None:
    """Say in our words why Typer refuses a value, which it leaves to pydantic; None for other errors."""
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
            return f"{refused} is none of {', '.join(known)}{did_you_mean(refused, known)}" if known else problem
