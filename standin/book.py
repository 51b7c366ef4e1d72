"""The stand-in's billing book: append-only, in memory, and in a file of JSON lines if one is named."""

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Entry:
    """One charge, in nano-dollars."""

    generation_id: str
    user: str
    model: str
    prompt_tokens: int
    completion_tokens: int
    charged_nanousd: int
    fault: str | None


class Book:
    """Every charge, by generation id. A line is written before the reply is sent, so the file survives a kill."""

    def __init__(self, path: Path | None = None) -> None:
        self.entries: dict[str, Entry] = {}
        self._file = None
        if path is not None:
            if path.exists():
                self._load(path)
            self._file = path.open("a", encoding="utf-8")

    def _load(self, path: Path) -> None:
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = Entry(**json.loads(line))
            self.entries[entry.generation_id] = entry

    def charge(self, entry: Entry) -> None:
        """Record a charge."""
        self.entries[entry.generation_id] = entry
        if self._file is not None:
            self._file.write(json.dumps(asdict(entry)) + "\n")
            self._file.flush()

    def totals(self) -> dict[str, int]:
        """Return what each user was charged, in nano-dollars."""
        totals: Counter[str] = Counter()
        for entry in self.entries.values():
            totals[entry.user] += entry.charged_nanousd
        return dict(totals)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
