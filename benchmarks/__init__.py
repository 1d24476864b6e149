"""Ratios against peers and against the machine's own limit: `python -m benchmarks NAME`."""
