"""Expectations: the values that an annotated type accepts, in words, for messages about wrong values."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Final, Literal, Union, cast, get_args, get_origin

from pydantic import AwareDatetime, BaseModel, SecretStr
from pydantic.fields import FieldInfo

_NUMBERS: Final = (int, float, Decimal)
_LIMITS: Final[Mapping[str, str]] = {
    "ge": "at least",
    "gt": "greater than",
    "le": "at most",
    "lt": "less than",
    "min_length": "",
    "max_length": "",
}
# bool is an int to Python, so it comes first.
_NOUNS: Final[Mapping[type, str]] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    Decimal: "a number",
    str: "text",
    SecretStr: "text",
    Path: "a path",
    cast(type, AwareDatetime): "a time with its zone, such as '2026-11-24T07:00:00Z'",
    Mapping: "a JSON object",
    Sequence: "a list",
}


@dataclass(frozen=True, slots=True)
class Expected:
    """The accepted values in words, if the constraints do not say it: `Annotated[str, ..., Expected("a model id")]`."""

    words: str


def expectation(annotation: Any, marks: Sequence[Any] = ()) -> str:
    """Return the values that an annotated type accepts, in words, for example `a whole number from 1 to 200000`."""
    kinds, inner = alternatives_of(annotation)
    every = [*_flat(marks), *inner]
    words = [mark.words for mark in every if isinstance(mark, Expected)]
    if words:
        return words[0]
    if choices := choices_of(annotation):
        return f"one of {', '.join(map(repr, choices))}" if len(choices) > 1 else repr(choices[0])
    kind = next((each for each in kinds if each is not type(None)), Any)
    for python, noun in _NOUNS.items():
        if is_a(kind, python):
            unit = "characters" if python is str else "entries"
            return noun + _limits(every, is_number=python in _NUMBERS, unit=unit)
    return "a JSON object" if is_model(kind) else "a valid value"


def choices_of(annotation: Any) -> list[str]:
    """Return the texts that an enumeration or a literal type accepts."""
    found: list[str] = []
    for kind in alternatives_of(annotation)[0]:
        if get_origin(kind) is Literal:
            found += [str(value) for value in get_args(kind)]
        elif isinstance(kind, type) and issubclass(kind, Enum):
            found += [str(member.value) for member in kind]
    return found


def alternatives_of(annotation: Any) -> tuple[list[Any], list[Any]]:
    """Return the alternatives of a type and the constraints on them."""
    origin = get_origin(annotation)
    if origin is Annotated:
        base, *marks = get_args(annotation)
        kinds, inner = alternatives_of(base)
        return kinds, [*_flat(marks), *inner]
    if origin in (Union, UnionType):
        parts = [alternatives_of(each) for each in get_args(annotation)]
        return [kind for kinds, _ in parts for kind in kinds], [mark for _, marks in parts for mark in marks]
    return [annotation], []


def is_model(kind: Any) -> bool:
    """Whether a type is a pydantic model."""
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def is_a(kind: Any, python: type) -> bool:
    """Whether a type, or its origin (`list` of `list[int]`), is the class `python` or a subclass of it."""
    actual = get_origin(kind) or kind
    return isinstance(actual, type) and issubclass(actual, python)


def _limits(marks: Iterable[Any], *, is_number: bool, unit: str) -> str:
    # pydantic and annotated_types have several classes of constraints, with the same names for the same limits.
    limits = {name: limit for mark in marks for name in _LIMITS if (limit := getattr(mark, name, None)) is not None}
    if not is_number:
        minimum, maximum = limits.get("min_length"), limits.get("max_length")
        if minimum and maximum:
            return f" of {minimum} to {maximum} {unit}"
        return f" with at most {maximum} {unit}" if maximum else " that is not empty" if minimum else ""
    if "ge" in limits and "le" in limits:
        return f" from {limits['ge']} to {limits['le']}"
    words = " and ".join(f"{_LIMITS[name]} {limits[name]}" for name in _LIMITS if name in limits)
    return f" {'of ' if words.startswith('at') else ''}{words}" if words else ""


def _flat(marks: Iterable[Any]) -> list[Any]:
    flat: list[Any] = []
    for mark in marks:
        flat += mark.metadata if isinstance(mark, FieldInfo) else [mark]
    return flat
