"""The test suite: unit, contract, integration, stateful, end to end, and golden files."""
