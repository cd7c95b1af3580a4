"""Schedulers: what a killed sweep had heard counts for the trials that come after it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from ray_ft.recipe import Recipe
from ray_ft.tune import schedule
from ray_ft.tune.journal import Report, Trial
from ray_ft.tune.proposals import Slots
from ray_ft.tune.rungs import Verdict
from ray_ft.tune.schedule import PROGRESS, STEP
from ray_ft.tune.space import Space

SPACE = "tune.space={train.optimizer.lr: {loguniform: [1e-5, 1e-2]}}"


class Controller:
    def get_live_trials(self) -> set[Any]:
        return set()

    def get_trials(self) -> list[Any]:
        return []


def past(*values: float) -> list[Trial]:
    """Trials that reported at a sixteenth, a quarter and the whole of 16 steps."""
    return [
        Trial(number, {}, status="finished", reports=[Report(step, 16, value, number + step) for step in (1, 4, 16)])
        for number, value in enumerate(values)
    ]


def make(recipe: Recipe, known: list[Trial], expected: int = 6) -> TrialScheduler:
    assert recipe.tune is not None
    return schedule.make(Space(recipe), recipe.tune, 16, known, expected, Slots(2))


class New:
    """A trial of Ray Tune."""

    def __init__(self, number: int = 5) -> None:
        self.trial_id, self.status = f"new-{number}", "RUNNING"
        self.config = {"trial": {"number": number, "settings": {}}}


def decision(scheduler: TrialScheduler, progress: float, value: float) -> str:
    trial = New()
    scheduler.on_trial_add(Controller(), trial)
    return scheduler.on_trial_result(Controller(), trial, {PROGRESS: progress, STEP: 16 * progress, "eval_loss": value})


@pytest.mark.parametrize(("name", "progress"), [("asha", 0.0625), ("asha", 0.25), ("median", 0.5)])
def test_a_newcomer_is_held_against_what_was_reported_before_the_sweep_was_killed(
    name: str, progress: float, make_recipe: Callable[..., Recipe]
) -> None:
    recipe = make_recipe(SPACE, f"tune.scheduler={name}")
    known = past(1.0, 1.1, 1.2, 1.3, 1.4)
    for trials, expected, worst in ((known, 6, TrialScheduler.STOP), ([], 1, TrialScheduler.CONTINUE)):
        assert decision(make(recipe, trials, expected), progress, 2.0) == worst
        assert decision(make(recipe, trials, expected), progress, 0.5) == TrialScheduler.CONTINUE


@pytest.mark.parametrize("name", ["asha", "median"])
def test_more_may_be_better(name: str, make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe(SPACE, f"tune.scheduler={name}", "tune.mode=max")
    known = past(1.0, 1.1, 1.2, 1.3, 1.4)
    assert decision(make(recipe, known), 0.5, 0.2) == TrialScheduler.STOP
    assert decision(make(recipe, known), 0.5, 2.0) == TrialScheduler.CONTINUE


def test_a_population_changes_the_settings_but_not_which_trial_it_is(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe(SPACE, "tune.scheduler=pbt", "tune.pbt.resample=0")
    scheduler = make(recipe, [])

    class Member:
        def __init__(self, number: int, lr: float) -> None:
            self.config = {"trial": {"number": number, "settings": {"train.optimizer.lr": lr}}}

    weak, strong = Member(0, 1e-5), Member(1, 1e-3)
    config, _ = scheduler._get_new_config(weak, strong)  # type: ignore[attr-defined]
    assert config["trial"]["number"] == 0
    assert config["trial"]["settings"]["train.optimizer.lr"] in (pytest.approx(1.2e-3), pytest.approx(0.8e-3))
    strongest = Member(2, 1e-2)  # at the end of the range, which a fifth more would leave
    rates = [scheduler._get_new_config(weak, strongest)[0]["trial"]["settings"] for _ in range(20)]  # type: ignore[attr-defined]
    assert sorted({rate["train.optimizer.lr"] for rate in rates}) == pytest.approx([0.8e-2, 1e-2])
    assert strong.config == {"trial": {"number": 1, "settings": {"train.optimizer.lr": 1e-3}}}


def test_a_tenth_of_the_run_lies_between_comparisons(make_recipe: Callable[..., Recipe]) -> None:
    tune = make_recipe(SPACE, "tune.scheduler=pbt").tune
    assert tune is not None
    assert [schedule.pbt_every(tune, total) for total in (100, 25, 3)] == [10, 2, 1]
    tune = make_recipe(SPACE, "tune.scheduler=pbt", "tune.pbt.every=7").tune
    assert tune is not None
    assert schedule.pbt_every(tune, 100) == 7


class Population:
    """Ray Tune's controller with trials that have all begun."""

    search_alg = None

    def __init__(self, recipe: Recipe, count: int, cap: int) -> None:
        assert recipe.tune is not None
        self.slots = Slots(cap)
        self.slots.exhausted = True
        self.scheduler: Any = schedule.make(Space(recipe), recipe.tune, 100, [], count, self.slots)
        self.trials = [Living(number) for number in range(count)]
        self.live = set(self.trials)
        for trial in self.trials:
            self.scheduler.on_trial_add(self, trial)

    def get_trials(self) -> list[Any]:
        return self.trials

    def get_live_trials(self) -> set[Any]:
        return self.live

    def _schedule_trial_save(self, trial: Any, result: Any) -> Any:
        return object()

    def report(self, number: int, step: int, value: float) -> str:
        trial = self.trials[number]
        decision = self.scheduler.on_trial_result(self, trial, {STEP: step, "total": 100, "eval_loss": value})
        if decision == TrialScheduler.PAUSE:
            trial.status = "PAUSED"
        return str(decision)


class Living:
    """A trial of Ray Tune in a population."""

    def __init__(self, number: int) -> None:
        self.trial_id, self.status, self.recovers, self.experiment_tag = str(number), "RUNNING", False, ""
        self.config = {"trial": {"number": number, "settings": {"train.optimizer.lr": 1e-3}}}
        self.temporary_state, self.checkpoint = SimpleNamespace(saving_to=None), SimpleNamespace(path="")
        manager = SimpleNamespace(checkpoint_config=SimpleNamespace(num_to_keep=None))
        self.run_metadata = SimpleNamespace(checkpoint_manager=manager)

    def is_finished(self) -> bool:
        return self.status in ("TERMINATED", "ERROR")

    def should_recover(self) -> bool:
        return self.recovers

    def set_experiment_tag(self, tag: str) -> None:
        self.experiment_tag = tag

    def set_config(self, config: dict[str, Any]) -> None:
        self.config = config


@pytest.mark.parametrize("ends", ["its setting fails", "its process dies"])
def test_a_population_that_waits_for_each_other_does_not_wait_for_who_failed(
    ends: str, make_recipe: Callable[..., Recipe]
) -> None:
    sweep = Population(make_recipe(SPACE, "tune.scheduler=pbt", "tune.pbt.synchronous=true"), 3, 3)
    for number, value in ((0, 1.0), (1, 2.0)):
        assert sweep.report(number, 10, value) == TrialScheduler.PAUSE
    failing = sweep.trials[2]
    failing.status = "TERMINATED" if ends == "its setting fails" else "ERROR"
    if failing.status == "ERROR":
        sweep.scheduler.on_trial_error(sweep, failing)
    else:
        sweep.live.discard(failing)  # as Ray Tune itself does
    sweep.slots.count(sweep.trials)
    chosen = sweep.scheduler.choose_trial_to_run(sweep)
    assert chosen in sweep.trials[:2]
    # They were compared: the worse one has what the better one's setting became.
    assert sweep.trials[1].experiment_tag


def test_none_makes_way_where_all_have_room(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe(SPACE, "tune.scheduler=pbt")
    for cap, expected in ((3, TrialScheduler.CONTINUE), (2, TrialScheduler.PAUSE)):
        sweep = Population(recipe, 3, cap)
        sweep.trials[2].status = "PENDING"  # it starts anew
        assert sweep.report(0, 10, 1.0) == expected


class Failed(New):
    def __init__(self, number: int, recovers: bool) -> None:
        super().__init__(number)
        self.status, self._recovers = "ERROR", recovers

    def should_recover(self) -> bool:
        return self._recovers


def test_a_trial_that_starts_again_is_waited_for(make_recipe: Callable[..., Recipe]) -> None:
    for recovers, expected in ((True, TrialScheduler.PAUSE), (False, TrialScheduler.CONTINUE)):
        scheduler = make(make_recipe(SPACE), [], 2)
        scheduler.on_trial_error(Controller(), Failed(1, recovers))
        assert decision(scheduler, 0.0625, 1.0) == expected


def test_who_died_instead_of_waiting_waits_when_it_comes_back(make_recipe: Callable[..., Recipe]) -> None:
    scheduler = make(make_recipe(SPACE), [], 6)
    assert decision(scheduler, 0.0625, 1.0) == TrialScheduler.PAUSE
    assert decision(scheduler, 0.125, 1.0) == TrialScheduler.PAUSE


def test_who_had_gone_on_before_the_kill_goes_on_after_it(make_recipe: Callable[..., Recipe]) -> None:
    """It was the best of those that had come as far, and is not any more."""
    better = [Trial(number, {}, status="paused", reports=[Report(1, 16, 0.1, 1.0)]) for number in range(4)]
    for steps, expected in (([1, 2], Verdict.GO), ([1], Verdict.WAIT)):
        ran = Trial(5, {}, status="running", reports=[Report(step, 16, 0.5, 1.0) for step in steps])
        scheduler: Any = make(make_recipe(SPACE), [*better, ran], 30)
        assert scheduler.rungs.verdict(5) is expected
