"""The ledger: events on a Redis stream, the gate that appends them, the fold into DuckDB, the archive.

Imports only `schemas`. The gate (gate/functions/tollbook.lua) is the only writer of holds.
"""
