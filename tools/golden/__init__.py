"""Golden files of tests/golden."""
