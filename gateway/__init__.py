"""HTTP in front of the same calls: other APIs' requests, answers and events, and how they become chat completions."""
