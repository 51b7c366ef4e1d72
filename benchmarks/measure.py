"""Measuring: both sides in turn, several rounds, medians.

A machine that is slow for a minute is slow for both sides of a round. So ratios are
comparable between machines and runs, and rates are not.
"""

import asyncio
import json
import resource
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

Side = Callable[[], Awaitable[float]]
"""Runs one round of one side and returns its figure."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of a run. `is_quick`: only to check that a benchmark runs; such figures mean little."""

    is_quick: bool = False

    def of(self, full: int, quick: int) -> int:
        return quick if self.is_quick else full


@dataclass(frozen=True, slots=True)
class Target:
    """The bound that a figure must meet."""

    bound: Literal[">=", "<="]
    value: float

    def is_met_by(self, figure: float) -> bool:
        return figure >= self.value if self.bound == ">=" else figure <= self.value

    def __str__(self) -> str:
        return f"{self.bound} {self.value:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One line of the report: a subject compared with its reference. Without a target, it only informs."""

    benchmark: str
    what: str
    subject: float
    reference: float | None
    unit: str
    target: Target | None = None
    floor: Target | None = None
    rounds: tuple[float, ...] = ()
    details: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def ratio(self) -> float | None:
        return None if self.reference is None else self.subject / self.reference

    @property
    def is_met(self) -> bool:
        """Whether the ratio meets the target and the subject meets the floor, if they are set."""
        reaches_ratio = self.target is None or self.ratio is None or self.target.is_met_by(self.ratio)
        return reaches_ratio and (self.floor is None or self.floor.is_met_by(self.subject))

    def as_json(self) -> dict[str, Any]:
        return {
            "benchmark": self.benchmark,
            "what": self.what,
            "subject": self.subject,
            "reference": self.reference,
            "unit": self.unit,
            "ratio": self.ratio,
            "target": str(self.target) if self.target else None,
            "floor": str(self.floor) if self.floor else None,
            "is_met": self.is_met if self.target or self.floor else None,
            "ratio_of_each_round": list(self.rounds),
            **self.details,
        }


async def in_turn(rounds: int, *sides: Side) -> list[list[float]]:
    """Run the sides one after the other, `rounds` times (ABAB); return the figures of each side."""
    figures: list[list[float]] = [[] for _ in sides]
    for _ in range(rounds):
        for side, seen in zip(sides, figures, strict=True):
            seen.append(await side())
    return figures


def compare(
    benchmark: str,
    what: str,
    subject: Sequence[float],
    reference: Sequence[float],
    *,
    unit: str,
    target: Target | None = None,
    floor: Target | None = None,
    **details: Any,
) -> Result:
    """Make a line from two sides' rounds: medians, and the ratio of each round, which shows how much it varies."""
    return Result(
        benchmark=benchmark,
        what=what,
        subject=median(subject),
        reference=median(reference),
        unit=unit,
        target=target,
        floor=floor,
        rounds=tuple(a / b for a, b in zip(subject, reference, strict=True)),
        details={"subject_rounds": list(subject), "reference_rounds": list(reference), **details},
    )


async def in_process(module: str, *arguments: object) -> dict[str, Any]:
    """Run a module of the benchmarks in a separate process; return the JSON in its last line."""
    command = (sys.executable, "-m", module, *map(str, arguments))
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    if process.returncode:
        raise ValueError(f"{module} ended with exit code {process.returncode}")
    return json.loads(output.splitlines()[-1])


def median_of(figures: Sequence[dict[str, Any]], name: str) -> float:
    return median(figure[name] for figure in figures)


class Work:
    """Measures the work of this process, from the time when this object is made."""

    def __init__(self) -> None:
        self._began, self._processor = time.perf_counter(), time.process_time()

    def figures(self, events: int) -> dict[str, Any]:
        """Return the figures of the work so far, on `events` events."""
        processor_s = time.process_time() - self._processor
        return {
            "events": events,
            "seconds": time.perf_counter() - self._began,
            "processor_us_per_event": 1e6 * processor_s / events,
            "peak_mb": _peak_mb(),
        }


def peak_memory(benchmark: str, figures: Sequence[dict[str, Any]], *, max_mb: float) -> Result:
    """Make the line with the peak memory of a process of `Work`."""
    return Result(
        benchmark=benchmark,
        what="peak memory of the process",
        subject=max(figure["peak_mb"] for figure in figures),
        reference=None,
        unit="MB",
        floor=Target("<=", max_mb),
    )


def _peak_mb() -> float:
    """Return the peak memory of this process so far, in megabytes (10^6 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # `ru_maxrss` is in bytes on macOS, in kilobytes on Linux.
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
