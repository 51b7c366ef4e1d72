"""Joining the usages in one event stream to the usage that the last chunk should have.

Most servers report the usage so far in each chunk, or once at the end. Others (seen in November 2026) send an empty or
zero usage after the true one, leave the cost out of the last chunk, or count only the new tokens in each chunk.
Invariant (G3): the joined usage is never less than what one chunk has reported.
"""

from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Final

from tollbook.inference.providers.token_counts import COMPLETION_NAMES, PROMPT_NAMES, TOTAL_NAMES, count_of

USAGE_NAMES: Final = ("usage", "usageMetadata", "usage_metadata")
"""Names under which a chunk has its usage."""
_HIGHEST: Final = frozenset({*PROMPT_NAMES, *TOTAL_NAMES, *COMPLETION_NAMES, "cost"})
_ADDED: Final = frozenset({*COMPLETION_NAMES, "cost"})
"""If one of these numbers falls, each chunk counts only its new tokens, so the chunks are added. The prompt is not."""


class UsageParts:
    """Joins the usages of one stream, all under one name."""

    def __init__(self) -> None:
        self._usage: dict[str, Any] = {}
        self._last: dict[str, Decimal | int] = {}
        self._sums: dict[str, Decimal | int] = {}
        self._fallen: set[str] = set()

    def add(self, usage: Mapping[str, Any]) -> dict[str, Any]:
        """Add a usage, and return the joined usage so far. Of values that are no numbers, the last one is kept."""
        numbers = {name: number for name in _HIGHEST if (number := _number(name, usage.get(name))) is not None}
        if self._usage and not any(numbers.values()):
            return self._usage  # An empty or zero usage.
        joined = {**self._usage, **{name: value for name, value in usage.items() if value is not None}}
        for name, number in numbers.items():
            joined[name] = max(number, _number(name, self._usage.get(name)) or 0)
            if name in _ADDED and number:
                self._sums[name] = self._sums.get(name, 0) + number
                if number < self._last.get(name, 0):
                    self._fallen.add(name)
                self._last[name] = number
        # The highest total is then too low, so the usage gets a doubt.
        joined |= {name: self._sums[name] for name in self._fallen}
        self._usage = joined
        return joined


def _number(name: str, value: object) -> Decimal | int | None:
    if name != "cost":
        return count_of(value)
    if isinstance(value, Decimal):
        return value if value.is_finite() else None
    return value if type(value) is int else None
