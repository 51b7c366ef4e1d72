"""Benchmarks: what a guarantee costs, as a ratio to doing without it, both measured in one run.

`python3 dev.py bench` runs all; see README.md in this folder.
"""
