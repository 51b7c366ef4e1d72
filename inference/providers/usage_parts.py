"""The usages of one event stream, joined to what the last one should have been.

Most servers count all that was used so far in each chunk, or report once at the end. Seen beside these (November 2026)
are an empty or a zero usage after the true one, a cost that the last chunk leaves out, and chunks that each count what
is new in them. Invariant (G3): what is joined is never less than what one chunk has reported.
"""

from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Final

from tollbook.inference.providers.token_counts import COMPLETION_NAMES, PROMPT_NAMES, TOTAL_NAMES, count_of

USAGE_NAMES: Final = ("usage", "usageMetadata", "usage_metadata")
"""Names under which a chunk has its usage."""
_HIGHEST: Final = frozenset({*PROMPT_NAMES, *TOTAL_NAMES, *COMPLETION_NAMES, "cost"})
_ADDED: Final = frozenset({*COMPLETION_NAMES, "cost"})
"""What is counted anew in each chunk where it falls; the prompt is there but once."""


class UsageParts:
    """Joins the usages of one stream, all under one name."""

    def __init__(self) -> None:
        self._usage: dict[str, Any] = {}
        self._last: dict[str, Decimal | int] = {}
        self._sums: dict[str, Decimal | int] = {}
        self._fallen: set[str] = set()

    def add(self, usage: Mapping[str, Any]) -> dict[str, Any]:
        """Take a usage, and return what all so far say together. Of what is no number, the last one counts."""
        numbers = {name: number for name in _HIGHEST if (number := _number(name, usage.get(name))) is not None}
        if self._usage and not any(numbers.values()):
            return self._usage  # It says nothing.
        joined = {**self._usage, **{name: value for name, value in usage.items() if value is not None}}
        for name, number in numbers.items():
            joined[name] = max(number, _number(name, self._usage.get(name)) or 0)
            if name in _ADDED and number:
                self._sums[name] = self._sums.get(name, 0) + number
                if number < self._last.get(name, 0):
                    self._fallen.add(name)
                self._last[name] = number
        # Their total, which is the highest, is then less: the usage is doubted.
        joined |= {name: self._sums[name] for name in self._fallen}
        self._usage = joined
        return joined


def _number(name: str, value: object) -> Decimal | int | None:
    if name != "cost":
        return count_of(value)
    if isinstance(value, Decimal):
        return value if value.is_finite() else None
    return value if type(value) is int else None
