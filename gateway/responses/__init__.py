"""OpenAI's Responses, translated onto chat completions and back (as of November 2026)."""
