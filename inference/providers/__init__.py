"""Requests to model providers, and their replies and usage."""
