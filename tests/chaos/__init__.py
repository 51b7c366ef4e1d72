"""The chaos run: a real system of many processes, killed and paused at random, checked with the provider's book."""
