"""Schedules: pure arithmetic, checked against numbers worked out by hand."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest

from ray_ft.recipe import Schedule
from ray_ft.train.schedule import due, learning_rate, total_steps


def rates(total: int, **settings: Any) -> list[float]:
    return [learning_rate(Schedule(**settings), 1.0, step, total) for step in range(total)]


def test_warm_up_rises_linearly_and_reaches_the_peak() -> None:
    assert rates(6, name="constant", warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_falls_towards_the_floor() -> None:
    assert rates(4, name="linear") == [1.0, 0.75, 0.5, 0.25]
    assert rates(6, name="linear", warmup_steps=2, min_lr_ratio=0.2) == pytest.approx([0.5, 1.0, 1.0, 0.8, 0.6, 0.4])


def test_cosine_is_half_a_cosine_above_the_floor() -> None:
    assert rates(4, name="cosine") == pytest.approx([1.0, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)])
    floor = rates(1000, name="cosine", min_lr_ratio=0.1)
    assert all(later < earlier for earlier, later in itertools.pairwise(floor))
    assert floor[-1] == pytest.approx(0.1, abs=1e-5)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_every_step_taken_moves_the_weights_and_none_exceeds_the_peak(name: str) -> None:
    for warmup in (0, 1, 5, 9, 20):  # also longer than the run
        assert all(0 < rate <= 1 for rate in rates(10, name=name, warmup_steps=warmup))


def test_past_the_end_the_rate_stays_at_the_floor() -> None:
    assert learning_rate(Schedule(min_lr_ratio=0.1), 1.0, 25, 10) == pytest.approx(0.1)


def test_due_every_n_steps_and_always_after_the_last() -> None:
    assert [n for n in range(1, 11) if due(4, n, 10)] == [4, 8, 10]
    assert [n for n in range(1, 11) if due(None, n, 10)] == [10]


@pytest.mark.parametrize(("rows", "batch", "max_steps", "steps"), [(30, 8, None, 4), (32, 8, None, 4), (30, 8, 7, 7)])
def test_the_last_step_may_be_padding_so_that_no_row_is_left_out(
    rows: int, batch: int, max_steps: int | None, steps: int
) -> None:
    recipe: Any = SimpleNamespace(train=SimpleNamespace(global_batch=batch, max_steps=max_steps))
    order: Any = SimpleNamespace(rows=rows)
    assert total_steps(recipe, order) == steps
