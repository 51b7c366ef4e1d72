"""The ledger: events on a Redis stream, the gate that appends them, the fold into DuckDB, the archive.

Imports only `schemas`. The gate (gate/functions) is the only writer of holds and
balances. Rooms: server (the Redis server and connections to it), gate, projection, archive.
"""
