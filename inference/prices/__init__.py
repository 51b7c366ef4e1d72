"""Prices of models: configured prices and the catalogue's, as exact integers."""
