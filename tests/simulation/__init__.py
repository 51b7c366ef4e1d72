"""Deterministic simulation: the project's own code over a fake clock and a fake network, from a seed."""
