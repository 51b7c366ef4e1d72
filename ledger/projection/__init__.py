"""The projection: the ledger folded into DuckDB, served to budget checks, and copied for queries."""

from typing import Final

PROJECTION_FILE: Final = "tollbook.duckdb"
"""Name of the projection in the data directory."""
