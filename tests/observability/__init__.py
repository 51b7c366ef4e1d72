"""Metrics, health and traces of real systems."""
