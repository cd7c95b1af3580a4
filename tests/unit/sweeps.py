"""Sweeps as `ray-ft tune` leaves them on storage, with metrics that follow from the settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ray_ft.recipe import Recipe
from ray_ft.recipe.loading import parse
from ray_ft.tune.journal import Inherited, Report, Sweep, Trial
from ray_ft.tune.space import Space

SPACE: dict[str, Any] = {
    "train.optimizer.lr": {"loguniform": [1e-5, 1e-2]},
    "train.schedule.warmup_steps": {"choice": [0, 10, 50]},
    "train.optimizer.weight_decay": {"uniform": [0.0, 0.2]},
}
STEPS = 64


def recipe_with(make_recipe: Callable[..., Recipe], **tune: Any) -> Recipe:
    """The demo's recipe, with a sweep section."""
    content = make_recipe().model_dump(mode="json")
    content["run"]["name"] = "sweep"
    return parse({**content, "tune": {"space": SPACE, "metric": "loss", **tune}})


def loss(settings: dict[str, Any], progress: float) -> float:
    """Falls with progress; lr, best at 1e-3, decides nearly all, warm-up little, weight decay nothing."""
    away = abs(math.log10(settings["train.optimizer.lr"]) + 3)
    return (4 - 3.2 * progress**0.4) * (0.5 + 0.5 * away) + settings.get("train.schedule.warmup_steps", 0) / 500


def asha(recipe: Recipe, count: int = 16, seconds: float = 100.0, *, save: bool = True) -> Sweep:
    """A finished sweep: of each rung (1/16, 1/4) a quarter goes on. Trial 3 fails in the beginning.

    `save` False leaves the trials in memory alone.
    """
    sweep, space = Sweep.create(recipe), Space(recipe)
    for number in range(count):
        sweep.trials[number] = Trial(number, space.draw(number), workers=2)
    alive = [trial for trial in sweep.trials.values() if trial.number != 3]
    for rung, until in ((4, 16), (16, 64), (64, 64)):
        for trial in alive:
            for step in range(max(trial.step, 0) + 4, rung + 1, 4):
                value = loss(trial.settings, step / STEPS)
                trial.reported(Report(step, STEPS, value, seconds * step / STEPS))
            trial.seconds, trial.status = seconds * rung / STEPS, "stopped" if rung < STEPS else "finished"
        if until > rung:
            alive = sorted(alive, key=lambda trial: trial.value or 0)[: max(len(alive) // 4, 1)]
    if 3 in sweep.trials:
        failed = sweep.trials[3]
        failed.status, failed.seconds = "failed", 2.5
        failed.error = (
            "the loss is not finite at step 2\n  → train.optimizer.lr=…, a smaller one\n  → train.clip_norm=1"
        )
    return saved(sweep, seconds * 2) if save else sweep


def pbt(recipe: Recipe) -> Sweep:
    """Four trials, of which 2 goes on from 1 after step 32, and 1 from 2 after step 48."""
    sweep, space = Sweep.create(recipe), Space(recipe)
    for number in range(4):
        sweep.trials[number] = Trial(number, space.draw(number))
    for step in range(8, STEPS + 1, 8):
        for trial in sweep.trials.values():
            took = {(2, 40): 1, (1, 56): 2}.get((trial.number, step))
            if took is not None:
                rate = trial.settings["train.optimizer.lr"] * 1.2
                trial.settings = {**sweep.trials[took].settings, "train.optimizer.lr": rate}
                trial.inherited.append(Inherited(step - 8, took, trial.settings))
            trial.reported(Report(step, STEPS, loss(trial.settings, step / STEPS), float(step)))
            trial.seconds, trial.status = float(step), "finished" if step == STEPS else "running"
    return saved(sweep, 130.0)


def saved(sweep: Sweep, seconds: float) -> Sweep:
    """Written to storage, and as it is read from there."""
    sweep.seconds = seconds
    for trial in sweep.trials.values():
        sweep.save_trial(trial)
    sweep.save()
    return Sweep.load(sweep.root)
