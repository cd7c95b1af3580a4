"""Sweeps: many runs of one recipe with different settings on Ray Tune, the worse ones ended early."""
