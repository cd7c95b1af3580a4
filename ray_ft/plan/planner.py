"""A recipe on a fleet: memory, speed, cost. What costs time, building and tracing the model, is done once per model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ray_ft import recipe as recipes
from ray_ft.plan import memory, shapes, speed
from ray_ft.plan.fleet import Fleet, Prices
from ray_ft.plan.memory import Memory
from ray_ft.plan.shapes import Shapes
from ray_ft.plan.speed import Speed
from ray_ft.plan.trace import Tracer
from ray_ft.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Plan:
    """A recipe reckoned through on a fleet. `overrides`: what makes it out of the recipe that was asked about."""

    recipe: Recipe
    fleet: Fleet
    overrides: tuple[str, ...]
    shapes: Shapes
    memory: Memory
    speed: Speed

    @property
    def fits(self) -> bool:
        return self.memory.fits

    def dollars(self, tokens: float) -> float:
        return self.speed.hours(tokens) * self.fleet.dollars_per_hour


class Planner:
    """Plans variants of one recipe.

    Args:
        recipe: as it was asked about.
        config: of its model.
    """

    def __init__(self, recipe: Recipe, config: PretrainedConfig, prices: Prices) -> None:
        self.recipe, self.prices = recipe, prices
        self._config = config.to_dict()
        self._model_type = config.model_type
        self._shapes: dict[str, Shapes] = {}
        self._tracers: dict[str, Tracer] = {}

    def plan(self, fleet: Fleet, overrides: Sequence[str] = ()) -> Plan:
        """Plan the recipe, changed by overrides, with a worker on each of the fleet's GPUs.

        Raises:
            RecipeError: the overrides do not go together.
        """
        recipe, overrides = self._on(fleet, overrides)
        found, tracer = self._of(recipe)
        return Plan(
            recipe,
            fleet,
            tuple(overrides),
            found,
            memory.estimate(found, tracer, recipe, fleet, self.prices.constants),
            speed.estimate(found, recipe, fleet, self.prices),
        )

    def could_fit(self, fleet: Fleet, overrides: Sequence[str] = ()) -> bool:
        """Whether weights and optimizer alone leave room on the fleet.

        Raises:
            RecipeError: the overrides do not go together.
        """
        recipe, _ = self._on(fleet, overrides)
        return memory.could_fit(self._of(recipe)[0], recipe, fleet)

    def _on(self, fleet: Fleet, overrides: Sequence[str]) -> tuple[Recipe, list[str]]:
        """The recipe with overrides and as many workers as the fleet has GPUs."""
        changes = [*overrides]
        if self.recipe.train.world_size != fleet.gpus:
            changes.insert(0, f"train.workers={fleet.gpus}")
        return self.changed(changes), changes

    def changed(self, overrides: Sequence[str]) -> Recipe:
        """The recipe with overrides, checked anew."""
        content = self.recipe.model_dump(mode="json")
        for override in overrides:
            recipes.apply_override(content, override)
        return recipes.parse(content, where=" ".join(overrides))

    def _of(self, recipe: Recipe) -> tuple[Shapes, Tracer]:
        compute = torch.float32 if recipe.model.dtype == "float32" else torch.bfloat16
        zero = recipe.train.strategy.startswith("zero")
        model_key = f"{recipe.model.model_dump_json()} {recipe.data.seq_len} {compute}"
        key = f"{model_key} {zero or recipe.train.optimizer.weights}"
        if key not in self._shapes:
            with _quiet():
                model, adapted = shapes.build(self._fresh_config(), recipe, compute)
            self._shapes[key] = shapes.read(model, recipe, compute, adapted.quantized)
            if model_key not in self._tracers:  # which sets precisions itself
                kinds = [kind for kind in self._shapes[key].blocks if kind is not None]
                self._tracers[model_key] = Tracer(model, kinds, recipe.data.seq_len)
        return self._shapes[key], self._tracers[model_key]

    def _fresh_config(self) -> PretrainedConfig:
        """Tracing cuts the model down, its config too."""
        from transformers import AutoConfig

        settings: dict[str, Any] = dict(self._config)
        return AutoConfig.for_model(settings.pop("model_type", self._model_type), **settings)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the remarks that transformers makes while a model is built that nobody will run."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
