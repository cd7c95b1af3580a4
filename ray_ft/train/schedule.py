"""When and how much: pure arithmetic over steps."""

from __future__ import annotations

import math

from ray_ft.data.order import Order
from ray_ft.recipe import Recipe, Schedule


def total_steps(recipe: Recipe, order: Order) -> int:
    """Optimizer steps of the whole run; the last one may be partly padding, so that every row is used."""
    if recipe.train.max_steps is not None:
        return recipe.train.max_steps
    return math.ceil(order.rows / recipe.train.global_batch)


def learning_rate(schedule: Schedule, peak: float, step: int, total: int) -> float:
    """Learning rate of step `step` (from 0) of `total`.

    Linear warm-up from peak / warmup_steps, then half a cosine (Loshchilov & Hutter 2017, without restarts), a line, or
    a constant. It would reach `min_lr_ratio` × peak at step `total`, so that the last step taken still moves.
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.name == "constant":
        return peak
    done = (step - schedule.warmup_steps) / max(total - schedule.warmup_steps, 1)
    done = min(max(done, 0.0), 1.0)
    shape = 0.5 * (1 + math.cos(math.pi * done)) if schedule.name == "cosine" else 1 - done
    return peak * (schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * shape)


def ends_epoch(order: Order, global_batch: int, finished: int) -> bool:
    """Whether an epoch's rows are all used after `finished` steps, and were not before the last of them."""
    return order.epoch_of(finished * global_batch) > order.epoch_of((finished - 1) * global_batch)


def due(every: int | None, finished: int, total: int) -> bool:
    """Whether something that happens every N steps, and always after the last, is due after `finished` steps."""
    return finished == total or (every is not None and finished % every == 0)
