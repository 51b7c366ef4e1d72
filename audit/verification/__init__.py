"""Walks the whole ledger and reports what is not as it must be."""
