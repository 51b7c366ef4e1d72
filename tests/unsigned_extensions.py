"""DuckDB without its check of an extension's signature, which the suite's processes would make hundreds of times.

For each database that loads Quack, DuckDB (1.5, November 2026) hashes its wheels, 40 MB: 0.2 s of a processor.
They are pinned by hash in uv.lock. What is started as installed (`tests.system.run_installed`) makes the check.
"""

from functools import wraps
from typing import Any

import duckdb

_connect = duckdb.connect


@wraps(_connect)
def _connect_unsigned(
    database: Any = ":memory:", read_only: bool = False, config: dict[str, Any] | None = None
) -> duckdb.DuckDBPyConnection:
    return _connect(database, read_only, {**(config or {}), "allow_unsigned_extensions": "true"})


def allow_unsigned_extensions() -> None:
    """Let every database that this process opens load extensions without the check."""
    duckdb.connect = _connect_unsigned
