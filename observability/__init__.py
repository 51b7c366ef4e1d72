"""Metrics, health and traces of one process. They only observe: no decision depends on them."""
