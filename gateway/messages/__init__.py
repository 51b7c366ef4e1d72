"""Anthropic's Messages (version 2023-06-01), translated to chat completions and back (as of November 2026)."""
