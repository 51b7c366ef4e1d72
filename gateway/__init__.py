"""The HTTP gateway: calls over OpenAI's and Anthropic's APIs, under the same caps and on the same ledger."""
