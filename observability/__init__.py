"""Metrics, health and traces of one process: read beside the work, deciding nothing."""
