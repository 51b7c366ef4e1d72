"""Which cases of a table one runs while working. The others are marked slow: `.ci/run` has them all."""

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, TypeVar

import pytest

_T = TypeVar("_T")


def first_quick(number: int, cases: Iterable[Any]) -> list[Any]:
    """Return the cases for `parametrize`, all but the first `number` marked slow. A tuple is a case's arguments."""
    return [case if place < number else _slow(case) for place, case in enumerate(cases)]


def one_of_each(kind: Callable[[_T], Hashable], cases: Mapping[str, _T]) -> list[Any]:
    """Return the names of the cases for `parametrize`, all but the first of each kind marked slow."""
    first = {kind(case): name for name, case in reversed(list(cases.items()))}
    return [name if first[kind(case)] == name else _slow(name) for name, case in cases.items()]


def _slow(case: Any) -> Any:
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
