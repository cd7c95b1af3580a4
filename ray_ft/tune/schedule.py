"""When trials end or change early: Ray Tune's schedulers, which also hear what a killed sweep had heard."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from ray.tune.schedulers import (
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from ray_ft.recipe import Tune
from ray_ft.tune import journal
from ray_ft.tune.proposals import Slots
from ray_ft.tune.rungs import Rungs, Verdict
from ray_ft.tune.space import Space

#: What results call a trial's share of its run, and its steps.
PROGRESS, STEP = "progress", "step"


def make(
    space: Space, tune: Tune, total: int, known: Sequence[journal.Trial], expected: int, slots: Slots
) -> TrialScheduler:
    """The scheduler of the recipe, which knows what trials of the journal reported.

    Args:
        total: steps of a trial; of PBT alone, whose trials all have as many.
        expected: trials of the sweep in all.
    """
    # PBT's choices are drawn from these; nothing else in this process draws from them.
    random.seed(tune.seed)
    np.random.seed(tune.seed)
    if tune.scheduler == "none":
        return FIFOScheduler()
    if tune.scheduler == "pbt":
        return _Population(
            space,
            slots,
            time_attr=STEP,
            metric=tune.metric,
            mode=tune.mode,
            perturbation_interval=pbt_every(tune, total),
            hyperparam_mutations={"trial": {"settings": space.mutations()}},
            quantile_fraction=tune.pbt.quantile,
            resample_probability=tune.pbt.resample,
            synch=tune.pbt.synchronous,
            log_config=False,
            require_attrs=False,
        )
    if tune.scheduler == "asha":
        return Halving(tune, expected, slots, known)
    scheduler = MedianStoppingRule(
        time_attr=PROGRESS,
        metric=tune.metric,
        mode=tune.mode,
        grace_period=tune.median.first,
        min_samples_required=tune.median.trials,
        min_time_slice=math.inf,  # else it pauses trials in favour of others, and each time costs a start
    )
    _replay(scheduler, tune.metric, known)
    return scheduler


def pbt_every(tune: Tune, total: int) -> int:
    """Steps between PBT's comparisons."""
    return tune.pbt.every or max(total // 10, 1)


class Halving(FIFOScheduler):
    """The rungs as a scheduler of Ray Tune: who waits is paused, with a checkpoint, and holds nothing of the cluster.

    Args:
        expected: trials that will come in all.
        known: trials of the journal: where they stood, they stand.
    """

    def __init__(self, tune: Tune, expected: int, slots: Slots, known: Sequence[journal.Trial]) -> None:
        super().__init__()
        self._metric, self._mode = tune.metric, tune.mode
        self.rungs = Rungs(expected, tune.asha.first, tune.asha.eta, 1 if tune.mode == "min" else -1)
        self._slots = slots
        for trial in known:
            for report in trial.reports:
                if not self.rungs.arrived(trial.number, report.progress, report.value):
                    self.rungs.promote(trial.number)  # it went on from where it stood
            if trial.over:
                status = trial.status
                self.rungs.gone(trial.number, failed=status == "failed", finished=status == "finished")

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if self._metric not in result or PROGRESS not in result:
            return TrialScheduler.CONTINUE
        number = number_of(trial)
        self.rungs.arrived(number, result[PROGRESS], result[self._metric])
        if result[PROGRESS] >= 1:
            return TrialScheduler.CONTINUE
        # Also between rungs: one that was to wait may have died instead, and come back without having been promoted.
        verdict = self.rungs.verdict(number)
        if verdict is Verdict.GO:
            self.rungs.promote(number)
            return TrialScheduler.CONTINUE
        return TrialScheduler.PAUSE if verdict is Verdict.WAIT else TrialScheduler.STOP

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """Of those that wait, the one that goes on now, if there is room; those that never will are ended."""
        trials = tune_controller.get_trials()
        waiting = [trial for trial in trials if trial.status == "PAUSED" and not trial.is_saving]
        if self._slots.closed:
            return None
        if waiting and not self._slots.active and self._slots.exhausted:
            self.rungs.close()
        ready = []
        for trial in waiting:
            verdict = self.rungs.verdict(number_of(trial))
            if verdict is Verdict.STOP:
                tune_controller.stop_trial(trial)
            elif verdict is Verdict.GO:
                ready.append(trial)
        if not ready or not self._slots.take():
            return None
        chosen = min(ready, key=lambda trial: self.rungs.before(number_of(trial)))
        self.rungs.promote(number_of(chosen))
        return chosen

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        failed, finished = "failed" in result, result.get(PROGRESS, 0) >= 1
        self.rungs.gone(number_of(trial), failed=failed, finished=finished)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        if not trial.should_recover():  # else it starts again where it stands; meanwhile Ray Tune calls it an ERROR too
            self.rungs.gone(number_of(trial))

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        self.rungs.gone(number_of(trial))


def number_of(trial: Any) -> int:
    return int(trial.config["trial"]["number"])


@dataclass(eq=False)
class _Past:
    """A trial of the sweep's former life, as far as schedulers look at trials."""

    trial_id: str
    status: str = "TERMINATED"


class _NothingRuns:
    """What schedulers may ask of Ray Tune's controller while the past is told."""

    def get_live_trials(self) -> set[Any]:
        return set()


def _replay(scheduler: MedianStoppingRule, metric: str, known: Sequence[journal.Trial]) -> None:
    """Tell it every report, earlier ones of all trials first; what it decided then is known, and stands."""
    trials = {trial.number: _Past(f"past-{trial.name}") for trial in known if trial.reports}
    for past in trials.values():
        scheduler.on_trial_add(_NothingRuns(), past)
    reports = [(report.seconds, trial.number, report) for trial in known for report in trial.reports]
    for _, number, report in sorted(reports, key=lambda one: one[:2]):
        result = {PROGRESS: report.progress, STEP: report.step, metric: report.value}
        scheduler.on_trial_result(_NothingRuns(), trials[number], result)
        scheduler._stopped_trials.discard(trials[number])  # it wants to hear no more of one that it would stop


class _Population(PopulationBasedTraining):
    """Ray Tune's PBT, in which a trial that takes over another one's settings stays the trial it is.

    A population larger than what runs at once takes turns: until all have begun, each makes way when it is compared.
    """

    def __init__(self, space: Space, slots: Slots, **options: Any) -> None:
        super().__init__(**options)
        self._space, self._slots = space, slots

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        # It refuses searchers, whose suggestions it would ignore; this one only hands out the population.
        super().on_trial_add(SimpleNamespace(search_alg=None), trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if self._metric in result and not self._slots.exhausted and result[STEP] < result["total"]:
            self._save_trial_state(self._trial_state[trial], result[STEP], result, trial)
            self._trial_state[trial].last_perturbation_time = result[STEP]
            return TrialScheduler.PAUSE
        decision = super().on_trial_result(tune_controller, trial, result)
        live = [other for other in tune_controller.get_trials() if not other.is_finished()]
        if decision == TrialScheduler.PAUSE and not self._synch and self._slots.suffice(len(live)):
            return TrialScheduler.CONTINUE  # it would make way for one that starts anew, and has a slot of its own
        return decision

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        if not trial.should_recover():  # Ray Tune goes on to count it as one for which the others wait
            tune_controller.get_live_trials().discard(trial)

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        chosen = super().choose_trial_to_run(tune_controller)
        if chosen is None and self._synch and not self._slots.active:
            # All that are left wait, and the one that they waited for has failed: they are compared without it.
            waiting = next((one for one in tune_controller.get_trials() if one.status == "PAUSED"), None)
            if waiting is not None:
                state = self._trial_state[waiting]
                state.last_perturbation_time = -math.inf  # also where it made way for others to begin
                super().on_trial_result(tune_controller, waiting, state.last_result)
                chosen = super().choose_trial_to_run(tune_controller)
        if chosen is None or chosen.status != "PAUSED":
            return None  # those that are pending have been let in, and start by themselves
        return chosen if self._slots.take() else None

    def _get_new_config(self, trial: Any, trial_to_clone: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        config, operations = super()._get_new_config(trial, trial_to_clone)
        # A fifth more may be more than the range, or the recipe, allows.
        settings = self._space.within(config["trial"]["settings"])
        config["trial"] = {"number": number_of(trial), "settings": settings}
        return config, operations
