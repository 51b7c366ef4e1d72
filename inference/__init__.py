"""Calls to models under a budget: routes, prices, providers, and the Python API over them."""
