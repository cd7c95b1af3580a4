"""Ray Data rests while enough blocks wait, and only then."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from ray_ft.data import pace
from ray_ft.data.pace import FULL, LOW, FewAhead


class Operator:
    def __init__(self, splits: int, deals: bool) -> None:
        self.metrics = SimpleNamespace(num_outputs_taken=0)
        self.num_output_splits = lambda: splits
        self.throttling_disabled = lambda: deals
        self.num_active_tasks = lambda: 1


class State:
    """Of an operator: what lies behind it, and who waits."""

    def __init__(self) -> None:
        self.output_queue = SimpleNamespace(num_blocks=0)
        self.num_waiting_consumers = 0

    def total_enqueued_output_blocks(self) -> int:
        return int(self.output_queue.num_blocks)


class Executor:
    """Rounds of Ray Data's executor over reading, cutting and dealing to two workers."""

    def __init__(self) -> None:
        self.read, self.cut, self.split = Operator(1, False), Operator(1, False), Operator(2, True)
        self.ops = {op: State() for op in (Operator(1, False), self.read, self.cut, self.split)}
        self.policy = FewAhead(None, self.ops, None)
        self.dealt = self.ops[self.split]

    def round(self, each: int, waits: int = 0) -> bool:
        """Whether blocks may be made where so many wait for each worker, and so many workers for rows."""
        self.dealt.output_queue.num_blocks, self.dealt.num_waiting_consumers = 2 * each, waits
        limits = {op: self.policy.max_task_output_bytes_to_read(op) for op in self.ops}
        starts = {op: self.policy.can_add_input(op) for op in self.ops}
        assert limits[next(iter(self.ops))] is None and limits[self.split] is None  # neither has tasks
        assert starts[self.split]
        assert limits[self.read] == limits[self.cut] == (None if starts[self.read] else 0)
        assert starts[self.read] is starts[self.cut]
        return starts[self.read]


@pytest.fixture
def rests(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr(pace.time, "sleep", found.append)
    return found


def test_it_rests_from_full_until_low(rests: list[float]) -> None:
    executor = Executor()
    waiting = (0, LOW, FULL - 1, FULL, FULL + 5, LOW, LOW - 1, LOW, FULL)
    assert [executor.round(each) for each in waiting] == [True, True, True, False, False, False, True, True, False]
    assert rests == [pace.REST] * 4  # once a round


def test_it_rests_where_nothing_moves_and_nobody_waits(rests: list[float]) -> None:
    """Such as where so few steps fill the memory that it never comes to `FULL`."""
    executor = Executor()
    assert executor.round(3) and rests == []
    assert executor.round(3) and len(rests) == 1
    assert executor.round(3, waits=1) and len(rests) == 1  # somebody does
    executor.read.metrics.num_outputs_taken += 1  # something does
    assert executor.round(3) and len(rests) == 1


def test_a_worker_that_waits_is_served_whatever_the_others_have(rests: list[float]) -> None:
    executor = Executor()
    assert not executor.round(FULL)
    assert executor.round(FULL, waits=1)
    assert not executor.round(FULL)


def test_a_worker_that_waits_in_vain_is_told(rests: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    executor = Executor()
    for _ in range(3):  # nobody asks: an evaluation may take any time
        executor.round(0)
        now[0] += 1e6
    for _ in range(2):
        executor.round(0, waits=2)
        now[0] += pace.STALLED
    executor.read.metrics.num_outputs_taken += 1
    executor.round(0, waits=2)
    now[0] += pace.STALLED
    executor.round(0, waits=2)
    now[0] += 1
    with pytest.raises(TimeoutError, match="1800 s"):
        executor.round(0, waits=2)


def test_what_bounds_memory_stays() -> None:
    from ray.data import DataContext
    from ray.data._internal.execution.backpressure_policy import (
        ENABLED_BACKPRESSURE_POLICIES,
        get_backpressure_policies,
    )

    dataset = SimpleNamespace(context=DataContext())
    pace.few_ahead(dataset)  # type: ignore[arg-type]
    found = get_backpressure_policies(dataset.context, Executor().ops, None)
    assert [type(one) for one in found] == [*ENABLED_BACKPRESSURE_POLICIES, FewAhead]
