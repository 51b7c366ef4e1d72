"""Consumers of streams: workers read the task streams, the projector's service reads the ledger.

A FastStream app reads the task streams. Every task becomes one call of `inference`.
"""
