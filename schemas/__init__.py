"""The types of Tollbook: money, identifiers, tasks, events, results.

Pure: no I/O, no clock, no randomness. Everything else in the project may import
this package; this package imports nothing of the project.
"""
