"""What ray-ft is compared with: programs of their own, with nothing of ray_ft in what is timed."""
