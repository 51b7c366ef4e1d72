"""Reads the ledger to answer questions and to verify it. Never writes to it."""
