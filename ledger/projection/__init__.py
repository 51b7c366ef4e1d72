"""The projection: the ledger folded into DuckDB, served to budget checks, and copied for queries."""
