"""Baselines from the projector's process, wherever it runs at the moment."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

from ledger.baselines import BaselinePage, BaselineReader
from ledger.quack import RemoteStore


def remote_reader(data_dir: Path) -> BaselineReader:
    """Return a reader of baselines; it finds the projector anew after that has restarted."""
    store = RemoteStore.open(data_dir)

    async def read(names: Sequence[str], /) -> BaselinePage:
        return await asyncio.to_thread(store.baselines, names)

    return read
