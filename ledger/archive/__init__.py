"""The archive: sealed Parquet segments, the hash chain over them, and replay from archive and stream."""
