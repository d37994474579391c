"""Benchmarks: one file for each operation or job, one runner, results as JSON lines. See `python -m benchmarks
--help`."""
