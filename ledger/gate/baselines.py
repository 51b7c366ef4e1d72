"""Baselines: the balances of budgets in DuckDB, read in batches and kept for a few seconds.

A kept baseline gives the exact answer as long as the tail back to its position is
still there; the gate answers STALE if it is not. So an old baseline is never wrong, and
while DuckDB cannot be read it is still used (G6). A budget without a kept baseline
then fails closed (G8).
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final, Protocol

from tollbook.ledger.errors import BaselineUnavailable, LedgerError
from tollbook.ledger.gate.requests import Baseline, Position
from tollbook.schemas.identifiers import describe_budget

_PURGE_AT: Final = 50_000
MAX_PAGE_NAMES: Final = 500
"""So many budgets are read at once; further ones after them."""
_MAX_PAGE_CHARACTERS: Final = 50_000


@dataclass(frozen=True, slots=True)
class BaselinePage:
    """Baselines read in one snapshot: (settled, held) in nano-dollars by budget; budgets without spend are absent.

    `changed` are budgets whose balance is not as it was folded; they have no baseline.
    """

    positions: Mapping[int, Position]
    balances: Mapping[str, tuple[int, int]]
    changed: frozenset[str] = frozenset()


class BaselineReader(Protocol):
    """Reads baselines: from this process's DuckDB, or from the projector's."""

    def __call__(self, names: Sequence[str], /) -> Awaitable[BaselinePage]:
        """Read budgets and positions in one snapshot. Errors: LedgerError."""
        ...


class Baselines:
    """The kept baselines of one partition; concurrent misses are read in one query.

    `failing_since` is when reading began to fail, by `monotonic`; None while it works.
    """

    def __init__(
        self, read: BaselineReader, partition: int, *, monotonic: Callable[[], float], max_age_s: float = 3.0
    ) -> None:
        self.failing_since: float | None = None
        self._read = read
        self._partition = partition
        self._monotonic = monotonic
        self._max_age_s = max_age_s
        self._kept: dict[str, tuple[float, Baseline]] = {}
        self._wanted: dict[str, asyncio.Future[Baseline]] = {}
        self._reader: asyncio.Task[None] | None = None

    async def get(self, names: Sequence[str], *, is_fresh: bool = False) -> tuple[Baseline, ...]:
        """Return a baseline for each budget; `is_fresh` reads DuckDB again.

        Errors: BaselineUnavailable if DuckDB cannot be read and no baseline is kept.
        """
        if not is_fresh:
            oldest = self._monotonic() - self._max_age_s
            kept = [self._kept.get(name) for name in names]
            young = tuple(entry[1] for entry in kept if entry is not None and entry[0] >= oldest)
            if len(young) == len(names):
                return young
        return tuple(await asyncio.gather(*(self._want(name, is_fresh=is_fresh) for name in names)))

    async def _want(self, name: str, *, is_fresh: bool) -> Baseline:
        future = self._wanted.get(name)
        if future is None:
            future = self._wanted[name] = asyncio.get_running_loop().create_future()
            if self._reader is None or self._reader.done():
                self._reader = asyncio.create_task(self._read_wanted())
        try:
            # Shielded, since other calls may wait for the same budget.
            return await asyncio.shield(future)
        except BaselineUnavailable:
            kept = self._kept.get(name)
            if kept is None or is_fresh:
                raise
            return kept[1]  # G6

    async def _read_wanted(self) -> None:
        while self._wanted:
            wanted = self._next_page()
            try:
                page = await self._read(tuple(wanted))
                position = page.positions.get(self._partition, Position())
            except Exception as exc:  # noqa: BLE001 - whatever it is, the waiting checks must fail closed and say why.
                problem = exc if isinstance(exc, LedgerError) else None
                self.failing_since = self._monotonic() if self.failing_since is None else self.failing_since
                for future in wanted.values():
                    _fail(future, problem or BaselineUnavailable(f"DuckDB could not be read ({exc})"))  # G8
                continue
            now = self._monotonic()
            self.failing_since = None
            self._purge(now)
            for name, future in wanted.items():
                if name in page.changed:
                    _fail(future, BaselineUnavailable(_changed(name)))  # G8
                    continue
                baseline = Baseline(*page.balances.get(name, (0, 0)), position)
                self._kept[name] = (now, baseline)
                if not future.done():
                    future.set_result(baseline)

    def _next_page(self) -> dict[str, asyncio.Future[Baseline]]:
        """Take what is read next off the wanted budgets: what is asked of another process has a bounded size."""
        page: list[str] = []
        characters = 0
        for name in islice(self._wanted, MAX_PAGE_NAMES):
            characters += len(name)
            if page and characters > _MAX_PAGE_CHARACTERS:
                break
            page.append(name)
        return {name: self._wanted.pop(name) for name in page}

    def _purge(self, now: float) -> None:
        if len(self._kept) > _PURGE_AT:
            oldest = now - self._max_age_s
            self._kept = {name: entry for name, entry in self._kept.items() if entry[0] >= oldest}


def _changed(name: str) -> str:
    return (
        f"{describe_budget(name)}: the balance in DuckDB was changed, and not by the fold; "
        "the projector rebuilds it once it has checked the file"
    )


def _fail(future: asyncio.Future[Baseline], problem: LedgerError) -> None:
    if not future.done():
        future.set_exception(problem)
        future.exception()  # Marks it as retrieved: the task that asked may have been cancelled.
