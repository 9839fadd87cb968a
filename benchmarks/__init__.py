"""What measures fastbert; run from the root of the repository, as `python -m benchmarks.suite`."""
