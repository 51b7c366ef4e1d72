"""The test suite. A package, so that no installed package named `tests` can take its place."""
