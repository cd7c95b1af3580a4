"""Whether the recipe's workers fit on the nodes that there are, or that may come."""

from __future__ import annotations

from ray_ft import placement
from ray_ft.doctor.finding import Finding, Severity
from ray_ft.errors import ResourceError
from ray_ft.recipe import Recipe


def check(recipe: Recipe) -> list[Finding]:
    """Asks what `train` asks before it waits for nodes; the lines that it would say are notes."""
    lines: list[str] = []
    try:
        placement.refuse_impossible(recipe, lines.append)
    except ResourceError as error:
        ways = error.ways_out or ("add nodes to the cluster",)
        return [Finding("placement.workers", Severity.ERROR, "cluster", error.what, ways)]
    if lines:
        return [Finding("placement.later", Severity.NOTE, "cluster", line) for line in lines]
    workers = recipe.train.sizes
    shown = f"{workers[0]}" if len(workers) == 1 else f"{workers[0]} to {workers[-1]}"
    what = f"there is room for train.workers = {shown}, train.cpus_per_worker = {recipe.train.cpus_per_worker:g}"
    return [Finding("placement", Severity.OK, "cluster", what)]
