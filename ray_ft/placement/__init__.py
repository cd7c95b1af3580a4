"""Where workers fit: the nodes that a cluster has and may add, what will never fit, and how many runs fit at once."""

from ray_ft.placement.feasible import (
    answering_cpus,
    gpus_within_reach,
    lacking,
    reading_cpus,
    refuse_impossible,
    within_reach,
)

__all__ = ["answering_cpus", "gpus_within_reach", "lacking", "reading_cpus", "refuse_impossible", "within_reach"]
