"""Baselines from the projector's process, wherever it runs at the moment."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

from ledger.baselines import BaselinePage, BaselineReader
from ledger.endpoint import read_endpoint
from ledger.errors import BaselineUnavailable
from ledger.quack import RemoteStore, read_token


def open_remote(data_dir: Path, *, quack_url: str | None = None) -> RemoteStore:
    """Connect to the DuckDB that a projector serves. Errors: BaselineUnavailable where none runs."""
    url = quack_url or _served_url(data_dir)
    return RemoteStore(url, read_token(data_dir))


def remote_reader(data_dir: Path, *, quack_url: str | None = None) -> BaselineReader:
    """Return a reader of baselines that finds the projector anew after it has restarted."""
    connected: dict[str, RemoteStore] = {}

    def read(names: Sequence[str]) -> BaselinePage:
        url = quack_url or _served_url(data_dir)
        if url not in connected:
            for store in connected.values():
                store.close()
            connected.clear()
            connected[url] = open_remote(data_dir, quack_url=url)
        try:
            return connected[url].baselines(names)
        except BaselineUnavailable:
            connected.pop(url).close()
            raise

    async def read_off_loop(names: Sequence[str], /) -> BaselinePage:
        return await asyncio.to_thread(read, names)

    return read_off_loop


def _served_url(data_dir: Path) -> str:
    endpoint = read_endpoint(data_dir)
    if endpoint is None or endpoint.quack_url is None:
        raise BaselineUnavailable(f"no projector runs on {data_dir}; start `tollbook up` or `tollbook projector`")
    return endpoint.quack_url
