"""Cost as work grows, on one machine: overheads and their growth, never speed-ups. `python -m benchmarks.scale`."""
