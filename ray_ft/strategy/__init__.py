"""How parameters, gradients and optimizer state lie over the workers."""

from __future__ import annotations

from ray_ft.recipe import Recipe
from ray_ft.strategy.base import Layout, Strategy


def make(recipe: Recipe, layout: Layout) -> Strategy:
    """The strategy that the recipe names."""
    settings = recipe.train
    if settings.strategy == "fsdp":
        from ray_ft.strategy.fsdp import FSDP

        return FSDP(layout, settings.fsdp, settings.optimizer.in_backward)
    if settings.strategy.startswith("zero"):
        from ray_ft.strategy.deepspeed import Zero

        return Zero(layout, recipe)
    from ray_ft.strategy.replicated import Replicated

    return Replicated(layout, settings.optimizer.in_backward)
