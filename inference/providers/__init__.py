"""Speaking to a model provider: requests, replies, usage."""
