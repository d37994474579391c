"""Benchmarks: one file an operation or job, one runner, rows as JSON lines. `python -m benchmarks --help`."""
