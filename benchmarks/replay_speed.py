"""Replay: an archive of every type of event, folded into a new DuckDB file.

Each round is a separate process, like `tollbook replay`, so that its peak memory is measured alone.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any, Final

from benchmarks.ledger import MadeLedger
from benchmarks.measure import Result, Sizes, Target, Work, in_process, median_of, peak_memory
from tollbook.ledger.archive.history import LedgerSource
from tollbook.ledger.archive.replay import replay
from tollbook.ledger.archive.segments import Archive

_SEGMENT: Final = 100_000  # As sealed by default.
_USERS: Final = 5_000


async def run(directory: Path, sizes: Sizes) -> list[Result]:
    events, rounds = sizes.of(5_000_000, 30_000), sizes.of(2, 1)
    archive = directory / "archive"
    await asyncio.to_thread(make_archive, archive, events, sizes.of(_SEGMENT, 10_000))
    figures: list[dict[str, Any]] = []
    for _ in range(rounds):
        into = directory / "replay.duckdb"
        figures.append(await in_process("benchmarks.replay_speed", archive, into))
        into.unlink()
    folded = median_of(figures, "events")
    if folded != events:
        raise ValueError(f"replayed {folded} events of {events}")
    return [
        Result(
            benchmark="replay",
            what=f"folding {events:,} archived events into a new file",
            subject=median_of(figures, "events_per_second"),
            reference=None,
            unit="events/s",
            floor=Target(">=", 300_000),
            details={"processes": figures},
        ),
        peak_memory("replay", figures, max_mb=1_500),
    ]


def make_archive(directory: Path, events: int, segment: int) -> None:
    """Seal `events` events into whole segments."""
    rest = MadeLedger.draw(events, users=_USERS, segment=segment).write(Archive(directory))
    if rest.num_rows:
        raise ValueError(f"{events} events do not fill segments of {segment}")


async def _replay(archive: Path, into: Path) -> dict[str, Any]:
    work = Work()
    store = await replay(LedgerSource.of_archive(Archive(archive)), into)
    figures = work.figures(store.position().seq)
    if store.query("FROM discrepancies"):
        raise ValueError("the generated ledger is not valid")
    store.close()
    return {
        **figures,
        "events_per_second": figures["events"] / figures["seconds"],
        "file_bytes_per_event": await asyncio.to_thread(_size, into) / figures["events"],
    }


def _size(path: Path) -> int:
    return path.stat().st_size


if __name__ == "__main__":
    print(json.dumps(asyncio.run(_replay(Path(sys.argv[1]), Path(sys.argv[2])))))
