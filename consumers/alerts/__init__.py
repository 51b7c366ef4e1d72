"""Alerts on their way to people: a queue in Redis, and the receivers that are served from it."""
