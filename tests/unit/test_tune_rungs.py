"""The rungs: who goes on, who waits and who stops, in whatever order trials arrive and end."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ray_ft.tune.rungs import Rungs, Verdict

GO, WAIT, STOP = Verdict.GO, Verdict.WAIT, Verdict.STOP


def test_rungs_lie_eta_times_apart_below_a_whole_run() -> None:
    assert Rungs(16, 0.0625, 4, 1).milestones == [0.0625, 0.25]
    assert Rungs(16, 0.1, 3, 1).milestones == pytest.approx([0.1, 0.3, 0.9])
    assert Rungs(16, 0.25, 4, 1).milestones == [0.25]


def test_none_goes_on_before_it_is_among_the_best_of_those_that_came_as_far() -> None:
    rungs = Rungs(8, 0.25, 4, 1)
    for number, value in enumerate([5.0, 4.0, 3.0]):
        assert rungs.arrived(number, 0.25, value)
    assert [rungs.verdict(number) for number in range(3)] == [WAIT, WAIT, WAIT]
    # One of four goes on. Of eight, two will, and a third one waits in case they fail.
    rungs.arrived(3, 0.3, 2.0)
    assert [rungs.verdict(number) for number in range(4)] == [STOP, WAIT, WAIT, GO]
    rungs.arrived(4, 0.25, 1.0)
    assert rungs.verdict(4) is GO


def test_more_may_be_better() -> None:
    rungs = Rungs(4, 0.25, 4, -1)
    for number, value in enumerate([5.0, 4.0, 3.0, 6.0]):
        rungs.arrived(number, 0.25, value)
    assert [rungs.verdict(number) for number in range(4)] == [WAIT, STOP, STOP, GO]


def test_a_report_between_rungs_changes_nothing_and_a_sparse_one_reaches_several() -> None:
    rungs = Rungs(4, 0.0625, 4, 1)
    assert not rungs.arrived(0, 0.05, 1.0)
    assert rungs.verdict(0) is GO
    assert rungs.arrived(0, 0.3, 1.0)
    assert rungs.level(0) == 1
    assert not rungs.arrived(0, 0.5, 0.1)


def test_the_next_best_waits_until_one_has_finished() -> None:
    rungs = Rungs(4, 0.25, 4, 1)
    for number, value in enumerate([5.0, 4.0, 3.0, 2.0]):
        rungs.arrived(number, 0.25, value)
    assert [rungs.verdict(number) for number in range(4)] == [STOP, STOP, WAIT, GO]
    rungs.promote(3)
    rungs.gone(3, failed=True)
    assert [rungs.verdict(number) for number in (0, 1, 2)] == [STOP, WAIT, GO]
    rungs.promote(2)
    rungs.gone(2, finished=True)
    assert rungs.verdict(1) is STOP


def test_who_failed_is_not_waited_for() -> None:
    rungs = Rungs(4, 0.25, 4, 1)
    for number, value in enumerate([5.0, 4.0, 3.0]):
        rungs.arrived(number, 0.25, value)
    assert rungs.verdict(2) is WAIT
    rungs.gone(3, failed=True)
    assert [rungs.verdict(number) for number in range(3)] == [STOP, WAIT, GO]


def test_when_no_more_come_the_best_goes_on() -> None:
    rungs = Rungs(10, 0.25, 4, 1)
    for number, value in enumerate([5.0, 4.0]):
        rungs.arrived(number, 0.25, value)
    assert [rungs.verdict(number) for number in range(2)] == [WAIT, WAIT]
    rungs.close()
    assert [rungs.verdict(number) for number in range(2)] == [WAIT, GO]


def test_the_next_best_goes_on_where_those_who_are_better_failed_or_had_been_stopped() -> None:
    rungs = Rungs(9, 0.1, 3, 1)
    for number in range(9):
        rungs.arrived(number, 0.1, float(number))
    for number in range(3):
        rungs.promote(number)
        rungs.arrived(number, 0.3, float(number))
    assert [rungs.verdict(number) for number in range(3)] == [GO, WAIT, STOP]
    rungs.gone(2)
    for number in (0, 1):
        assert rungs.verdict(number) is GO
        rungs.promote(number)
        rungs.gone(number, failed=True)
    for number in (3, 4):  # in the place of those
        assert rungs.verdict(number) is GO
        rungs.promote(number)
        rungs.arrived(number, 0.3, float(number))
    assert rungs.verdict(3) is GO  # 2 was better, and does not come back
    rungs.promote(3)
    assert rungs.verdict(4) is not GO
    rungs.gone(3, finished=True)
    assert {rungs.verdict(number) for number in range(4, 9)} == {STOP}


@example(count=33, cap=3, eta=3, first=0.02, seed=3)  # one waited for ever
@given(
    count=st.integers(1, 40),
    cap=st.integers(1, 8),
    eta=st.sampled_from([1.5, 2, 3, 4]),
    first=st.sampled_from([0.02, 0.0625, 0.25, 0.5]),
    seed=st.integers(0, 10_000),
)
def test_every_sweep_ends_with_a_finished_trial_and_costs_no_more_than_all_in_full(
    count: int, cap: int, eta: float, first: float, seed: int
) -> None:
    """A sweep in miniature: at each tick one of the running trials comes to its next rung, fails or finishes."""
    chance = random.Random(seed)
    quality = {number: chance.random() for number in range(count)}
    rungs = Rungs(count, first, eta, 1)
    new, running, waiting = list(range(count)), [], set()
    finished, failed, spent = [], set(), 0.0
    at = dict.fromkeys(range(count), 0.0)
    for _ in range(100_000):
        for number in sorted(waiting):
            if rungs.verdict(number) is STOP:
                waiting.discard(number)
                rungs.gone(number)
        ready = sorted((n for n in waiting if rungs.verdict(n) is GO), key=rungs.before)
        while len(running) < cap and (new or ready):
            number = new.pop(0) if new else ready.pop(0)
            rungs.promote(number)
            waiting.discard(number)
            running.append(number)
        if not running:
            break
        number = running.pop(chance.randrange(len(running)))
        if chance.random() < 0.1:
            failed.add(number)
            rungs.gone(number, failed=True)
            continue
        further = next((m for m in rungs.milestones if m > at[number] + 1e-9), 1.0)
        spent += further - at[number]
        at[number] = further
        if further >= 1:
            finished.append(number)
            rungs.gone(number, finished=True)
            continue
        rungs.arrived(number, further, quality[number])
        verdict = rungs.verdict(number)
        if verdict is GO:
            rungs.promote(number)
            running.append(number)
        elif verdict is WAIT:
            waiting.add(number)
        else:
            rungs.gone(number)
    assert not waiting
    assert not new
    assert spent <= count + 1e-6
    # One waits in case the best fails, so that no single failure leaves a sweep without a finished trial.
    assert finished or len(failed) >= min(2, count)
    if not failed:
        assert min(finished, key=quality.__getitem__) == min(quality, key=quality.__getitem__)


def test_sixteen_trials_cost_a_sixth_of_all_in_full() -> None:
    costs = []
    for seed in range(30):
        chance = random.Random(seed)
        quality = [chance.random() for _ in range(16)]
        rungs = Rungs(16, 0.0625, 4, 1)
        spent, waiting = 16 * 0.0625, set(range(16))
        for number in range(16):
            rungs.arrived(number, 0.0625, quality[number])
        for milestone in (0.25, 1.0):
            for number in [n for n in sorted(waiting) if rungs.verdict(n) is GO]:
                rungs.promote(number)
                spent += milestone - (0.0625 if milestone == 0.25 else 0.25)
                if milestone < 1:
                    rungs.arrived(number, milestone, quality[number])
        costs.append(16 / spent)
    assert costs == [pytest.approx(6.4)] * 30  # 16 / (16/16 + 4 × 3/16 + 1 × 3/4)


def test_a_value_that_is_no_number_is_the_worst_and_leaves_the_others_in_their_order() -> None:
    for sign in (1, -1):
        rungs = Rungs(8, 0.25, 4, sign)
        for number, value in enumerate([5.0, 3.0, math.nan, 1.0, 6.0, 2.0, math.nan, 4.0]):
            rungs.arrived(number, 0.25, value)
        going = {number for number in range(8) if rungs.verdict(number) is GO}
        assert going == ({3, 5} if sign == 1 else {4, 0})
