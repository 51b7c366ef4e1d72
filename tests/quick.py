"""Marks the cases of a table slow that are not run while working. `.ci/run` runs all of them."""

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, TypeVar

import pytest

_T = TypeVar("_T")


def first_quick(number: int, cases: Iterable[Any]) -> list[Any]:
    """Return the cases for `parametrize`, all but the first `number` marked slow. A tuple is a case's arguments."""
    return [_case(case) if place < number else _case(case, pytest.mark.slow) for place, case in enumerate(cases)]


def one_of_each(kind: Callable[[_T], Hashable], cases: Mapping[str, _T]) -> list[Any]:
    """Return the names of the cases for `parametrize`, all but the first of each kind marked slow."""
    first: dict[Hashable, str] = {}
    for name, case in cases.items():
        first.setdefault(kind(case), name)
    return [name if first[kind(case)] == name else _case(name, pytest.mark.slow) for name, case in cases.items()]


def _case(case: Any, *marks: pytest.MarkDecorator) -> Any:
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=marks)
