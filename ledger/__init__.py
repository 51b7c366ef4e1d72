"""The ledger: events on a Redis stream, the gate that appends them, the fold into DuckDB.

Imports only `schemas`. The gate (ledger/functions/tollbook.lua) is the only writer of holds.
"""
