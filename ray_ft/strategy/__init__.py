"""How parameters, gradients and optimizer state lie over the workers."""

from __future__ import annotations

from ray_ft.recipe import Recipe
from ray_ft.strategy.base import Layout, Strategy


def make(recipe: Recipe, layout: Layout) -> Strategy:
    """The strategy that the recipe names."""
    if recipe.train.strategy == "fsdp":
        from ray_ft.strategy.fsdp import FSDP

        return FSDP(layout)
    from ray_ft.strategy.replicated import Replicated

    return Replicated(layout)
