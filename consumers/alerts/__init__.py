"""Delivery of alerts to people: a queue in Redis, and the receivers that get the alerts in it."""
