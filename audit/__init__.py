"""Reads the ledger to answer questions and to prove it sound. Never writes to it."""
