"""Walks the whole ledger and reports everything that is wrong."""
