"""Benchmarks: the cost of each guarantee, as a ratio to the same work without it, measured in one run.

`python3 dev.py bench` runs all; see README.md in this folder.
"""
