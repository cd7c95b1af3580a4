"""Comparisons with peers, side by side: `python -m benchmarks` runs them, `python -m benchmarks.NAME` one of them."""
