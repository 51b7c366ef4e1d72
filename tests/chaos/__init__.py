"""The chaos run: a real system of many processes, killed and stopped at random, held against the provider's book."""
