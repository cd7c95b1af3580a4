"""Training: launched on Ray, or in this process."""
