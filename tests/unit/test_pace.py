"""Ray Data rests while enough blocks wait, and only then."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from ray_ft.data import pace
from ray_ft.data.pace import FULL, LOW, FewAhead

Waits = Callable[[int], None]


class Operator:
    def __init__(self, splits: int, deals: bool) -> None:
        self.num_output_splits = lambda: splits
        self.throttling_disabled = lambda: deals


@pytest.fixture
def read() -> Operator:
    return Operator(1, False)


@pytest.fixture
def cut() -> Operator:
    return Operator(1, False)


@pytest.fixture
def split() -> Operator:
    return Operator(2, True)


@pytest.fixture
def rests(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr(pace.time, "sleep", found.append)
    return found


@pytest.fixture
def policy(read: Operator, cut: Operator, split: Operator) -> tuple[FewAhead, Any]:
    queue = SimpleNamespace(num_blocks=0)
    states = {read: None, cut: None, split: SimpleNamespace(output_queue=queue)}
    return FewAhead(None, states, None), queue


def test_it_rests_from_full_until_low(
    policy: tuple[FewAhead, Any], read: Operator, cut: Operator, split: Operator, rests: list[float]
) -> None:
    ahead, queue = policy
    seen = []
    for each in (0, LOW, FULL - 1, FULL, FULL + 5, LOW, LOW - 1, LOW, FULL):
        queue.num_blocks = 2 * each  # of two workers
        limits = [ahead.max_task_output_bytes_to_read(op) for op in (read, cut, split)]
        assert len(set(limits)) == 1
        assert ahead.can_add_input(read) is ahead.can_add_input(cut) is (limits[0] is None)
        assert ahead.can_add_input(split)
        seen.append(limits[0])
    assert seen == [None, None, None, 0, 0, 0, None, None, 0]
    assert rests == [pace.REST] * 4  # once a round


def test_what_bounds_memory_stays() -> None:
    from ray.data import DataContext
    from ray.data._internal.execution.backpressure_policy import (
        ENABLED_BACKPRESSURE_POLICIES,
        get_backpressure_policies,
    )

    dataset = SimpleNamespace(context=DataContext())
    pace.few_ahead(dataset)  # type: ignore[arg-type]
    found = get_backpressure_policies(dataset.context, {Operator(1, True): None, Operator(1, True): None}, None)
    assert [type(one) for one in found] == [*ENABLED_BACKPRESSURE_POLICIES, FewAhead]
