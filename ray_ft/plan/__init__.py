"""`ray-ft plan`: what a recipe takes on given GPUs, before money is spent.

Memory on each GPU and in each machine by part, speed, hours and dollars, the cheapest setting that fits, and what to
change where none does. It works from the model's config alone; docs/plan.md says what is counted and what is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console

from ray_ft import paths
from ray_ft.errors import ResourceError
from ray_ft.plan import fleet, report, search, shapes
from ray_ft.plan.cut import per_rank_parameter_bytes
from ray_ft.plan.planner import Plan, Planner
from ray_ft.plan.search import Way
from ray_ft.recipe import Recipe

__all__ = ["Answer", "Plan", "Planner", "Way", "answer", "per_rank_parameter_bytes"]


@dataclass(frozen=True)
class Answer:
    """What `ray-ft plan` says. `tokens`: of the run and how they are known; None where they are not."""

    plan: Plan
    tokens: tuple[float, str] | None
    settings: list[Plan]
    ways: list[Way]

    def show(self, console: Console, command: str) -> None:
        """Print it for people; `command`: the recipe's path and overrides, as on the command line."""
        report.show(console, command, self.plan, self.tokens, self.settings, self.ways)

    def as_json(self) -> dict[str, Any]:
        return report.as_json(self.plan, self.tokens, self.settings, self.ways)


def answer(
    recipe: Recipe,
    *,
    gpu: str | None = None,
    nodes: int | None = None,
    gpus_per_node: int | None = None,
    tokens: float | None = None,
    prices: str | None = None,
    config: str | None = None,
    top: int = 3,
) -> Answer:
    """Plan a recipe.

    Args:
        tokens: of the whole run; else from its prepared data, or from train.max_steps.
        prices: file that replaces parts of gpus.yaml.
        config: the model's config.json, where neither model.path nor this package has it.
        top: settings that are shown.

    Raises:
        ResourceError: an unknown GPU, or a file of prices that is wrong.
        ModelError: the model's config is missing, or its layers cannot be planned.
        RecipeError: the recipe does not go with that number of workers.
    """
    if tokens is not None and tokens <= 0:
        raise ResourceError(f"--tokens {tokens:g} is no number of tokens", ["give those of the whole run, such as 1e9"])
    known = fleet.load_prices(prices)
    chosen = fleet.choose(known, recipe.train.world_size, gpu, nodes, gpus_per_node)
    planner = Planner(recipe, shapes.find_config(recipe.model.location, config, recipe.model.labels), known)
    plan = planner.plan(chosen)
    settings = search.cheapest(planner, chosen)[:top]
    ways = [] if settings else list(search.ways_out(planner, chosen))
    return Answer(plan, _tokens(plan.recipe, tokens), settings, ways)


def _tokens(recipe: Recipe, given: float | None) -> tuple[float, str] | None:
    """Tokens of the whole run, padding included."""
    if given is not None:
        return given, "--tokens"
    if recipe.train.max_steps is not None:
        return float(recipe.train.max_steps * recipe.train.global_batch * recipe.data.seq_len), "train.max_steps"
    if paths.exists(recipe.run.dir.stats):
        found = paths.read_json(recipe.run.dir.stats)["train"]
        packed = found.get("packed_by_source")  # a run of an older version has none
        if found["seq_len"] == recipe.data.seq_len and packed is not None:
            rows = sum(source.weight * packed.get(str(at), 0) for at, source in enumerate(recipe.data.train))
            return rows * found["seq_len"] * recipe.train.epochs, "the run's prepared data"
    return None
