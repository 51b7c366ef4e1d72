"""Unchanged clients of OpenAI's and Anthropic's APIs against a gateway: what each was seen to do."""
