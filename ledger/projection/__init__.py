"""The projection: the ledger folded into DuckDB, served to budget checks, copied for queries."""
