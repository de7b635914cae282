"""Ratios against a baseline measured in the same run. `python -m benchmarks.NAME` prints one table and names the hardware."""
