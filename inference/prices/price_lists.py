"""The price lists of a provider over time: each list is stored in its own file, which is never overwritten.

A list is in force from its fetch until the fetch of the next one. So a restart without network has prices, and the
price at any moment can be looked up later. A list equal to the one in force is not stored.
"""

import json
import re
from bisect import bisect_right, insort
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self, cast
from urllib.parse import urlsplit

from tollbook.inference.prices.listed_price import Pricing, read_pricing
from tollbook.inference.prices.model_price import ModelPrice
from tollbook.ledger.logs import LazyLogger
from tollbook.ledger.private_files import create_private, make_private_folder, read_private

if TYPE_CHECKING:
    from tollbook.inference.settings import Settings

FOLDER: Final = "prices"
"""Folder of the lists in the data directory."""
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_STAMP: Final = "%Y-%m-%dT%H-%M-%S.%f"
_SUFFIX: Final = "Z.json"
_MAX_LOADED: Final = 16
_log = LazyLogger(__name__)


@dataclass(frozen=True, slots=True)
class PriceList:
    """The prices of one provider, by model id, as it listed them at `fetched_ms`, milliseconds since the epoch."""

    fetched_ms: int
    pricing: Mapping[str, Pricing]
    _by_name: Mapping[str, list[str]] = field(init=False, compare=False, repr=False)
    _read: dict[str, ModelPrice | None] = field(
        init=False, compare=False, repr=False, default_factory=dict[str, ModelPrice | None]
    )

    def __post_init__(self) -> None:
        by_name: dict[str, list[str]] = {}
        for model in self.pricing:
            by_name.setdefault(model.lower(), []).append(model)
        object.__setattr__(self, "_by_name", by_name)

    @property
    def source(self) -> str:
        """The source of these prices, as written to the ledger."""
        return f"provider {_moment(self.fetched_ms).isoformat(timespec='milliseconds').removesuffix('+00:00')}Z"

    def price(self, model: str) -> ModelPrice | None:
        """Return the price of a model; None if the list has none, or several under names that differ only in case."""
        name = model.lower()
        listed = self._by_name.get(name)
        if listed is None:
            return None
        if name not in self._read:
            found = read_pricing(listed[0], self.pricing[listed[0]]) if len(listed) == 1 else None
            self._read[name] = found
        return self._read[name]


class PriceLists:
    """The lists of the provider at `base_url`, stored in a folder; without a folder, in memory."""

    def __init__(self, folder: Path | None = None, base_url: str = "") -> None:
        self._folder = folder
        self._provider = provider_name(base_url)
        self._prefix = re.sub(r"[^a-z0-9.]+", "-", self._provider) + "-"
        self._newest: PriceList | None = None
        self._starts: list[int] = []
        self._loaded: dict[int, PriceList | None] = {}
        self.refresh()

    @classmethod
    def from_settings(cls, settings: "Settings") -> Self:
        """Open the lists of the settings' default provider, in the data directory."""
        return cls(settings.data_dir / FOLDER, settings.openrouter_base_url)

    def in_force(self, at_ms: int) -> PriceList | None:
        """Return the list in force at a moment, milliseconds since the epoch; None before the first one.

        A file that cannot be read is ignored: the list before it stays in force.
        """
        for start in reversed(self._starts[: bisect_right(self._starts, at_ms)]):
            found = self._load(start)
            if found is not None:
                return found
        return None

    def add(self, pricing: Mapping[str, Pricing], fetched_ms: int) -> bool:
        """Store a provider's current list, unless it equals the one in force; return whether it is new.

        An empty list is ignored: the provider has no prices, or failed to list them. If the file cannot be written,
        only this process has the list.
        """
        if not pricing:
            return False
        self.refresh()  # Another process may have stored it.
        before = self.in_force(fetched_ms)
        if before is not None and before.pricing == pricing:
            return False
        made = PriceList(fetched_ms, pricing)
        try:
            self._write(made)
        except OSError as exc:
            self.refresh()
            if isinstance(exc, FileExistsError) and fetched_ms in self._starts:
                return False  # Another process stored a list in the same millisecond.
            _log.warning("prices.not_kept", problem=str(exc), hint="a restart without network will lack these prices")
        self._newest = made
        self.refresh()
        _log.info("prices.changed", models=len(pricing), source=made.source)
        return True

    def _write(self, made: PriceList) -> None:
        if self._folder is None:
            return
        make_private_folder(self._folder)
        document = {"provider": self._provider, "fetched_ms": made.fetched_ms, "pricing": made.pricing}
        create_private(self._folder / self._file_name(made.fetched_ms), json.dumps(document, indent=1) + "\n")

    def refresh(self) -> None:
        """Read the names of the stored lists again: other processes store some too."""
        names = [] if self._folder is None else [path.name for path in self._folder.glob("*" + _SUFFIX)]
        starts = sorted(start for start in map(self._start_of, names) if start is not None)
        if self._newest is not None and self._newest.fetched_ms not in starts:
            insort(starts, self._newest.fetched_ms)
        self._starts = starts
        # Try again to read unreadable files: they may have been half written.
        self._loaded = {start: found for start, found in self._loaded.items() if found is not None}

    def _load(self, start: int) -> PriceList | None:
        if self._newest is not None and self._newest.fetched_ms == start:
            return self._newest
        if start in self._loaded:
            return self._loaded[start]
        found = None if self._folder is None else self._read(self._folder / self._file_name(start), start)
        kept = self._loaded if len(self._loaded) < _MAX_LOADED else {}
        self._loaded = {**kept, start: found}
        return found

    def _read(self, path: Path, start: int) -> PriceList | None:
        try:
            document: Any = json.loads(read_private(path))
            if document["provider"] != self._provider:
                return None  # Of another address that gives the same file name.
            pricing = cast("Mapping[str, Any]", dict(document["pricing"]))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as exc:
            _log.warning("prices.unreadable", path=str(path), problem=str(exc))
            return None
        return PriceList(start, pricing)

    def _file_name(self, start: int) -> str:
        return f"{self._prefix}{_moment(start).strftime(_STAMP)[:-3]}{_SUFFIX}"

    def _start_of(self, name: str) -> int | None:
        if not name.startswith(self._prefix):
            return None
        try:
            moment = datetime.strptime(name[len(self._prefix) : -len(_SUFFIX)], _STAMP).replace(tzinfo=UTC)
        except ValueError:
            return None
        return (moment - _EPOCH) // timedelta(milliseconds=1)


def provider_name(base_url: str) -> str:
    """Return a provider's name from its address: host, port and path, such as `openrouter.ai/api/v1`."""
    parts = urlsplit(base_url)
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.hostname or ''}{port}{parts.path}".rstrip("/").lower()


def _moment(at_ms: int) -> datetime:
    return _EPOCH + timedelta(milliseconds=at_ms)
