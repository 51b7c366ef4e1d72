"""OpenAI's Responses, translated to chat completions and back (as of November 2026)."""
