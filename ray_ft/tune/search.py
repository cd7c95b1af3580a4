"""What is tried next: all settings known at once (random, grid), or each drawn near those that did well (TPE).

Nothing is kept but the journal's records: a random draw is a function of its number, and a suggestion of its number and
of what was known of the others, so that a resumed sweep goes on as if it had not been ended.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import optuna
from optuna.trial import TrialState
from ray.tune.search import Searcher

from ray_ft.errors import RecipeError
from ray_ft.recipe import Tune
from ray_ft.tune.journal import Trial
from ray_ft.tune.proposals import Known
from ray_ft.tune.space import Settings, Space

#: Draws in a row that were tried already, after which the space counts as exhausted; and those of them after which TPE,
#: which returns to the same few values of a small space, gives way to chance.
PATIENCE, GUIDED = 100, 10
#: Parts of a run that Optuna, which counts whole steps, tells apart: trials may differ in their number of steps.
PARTS = 10_000


def planned(space: Space, tune: Tune) -> list[Settings] | None:
    """The settings of all trials by their number; None for optuna, which draws each when its turn comes.

    A grid is cut at tune.trials. Random settings differ from each other, since a run that is repeated gives the same
    result again: fewer than tune.trials come back where a small space is exhausted. In a population (PBT) they may
    repeat, as its trials take different ways later. Raising tune.trials leaves the settings of the first ones.

    Raises:
        RecipeError: an expression cannot be computed for one.
    """
    if tune.search == "optuna":
        return None
    if tune.search == "grid":
        return list(itertools.islice(space.combinations(), tune.wanted))
    wanted = tune.wanted or 0
    if tune.scheduler == "pbt":
        return [space.draw(number) for number in range(wanted)]
    return list(itertools.islice(_different(space), wanted))


def _different(space: Space) -> Iterator[Settings]:
    seen: set[str] = set()
    repeated = 0
    for number in itertools.count():
        settings = space.draw(number)
        text = _text(settings)
        repeated = repeated + 1 if text in seen else 0
        if repeated == PATIENCE:
            return
        if not repeated:
            seen.add(text)
            yield settings


class TPE(Searcher):
    """Optuna's tree-structured Parzen estimator (Bergstra et al. 2011) as a searcher of Ray Tune.

    Values come from results as `result["progress"]` (0 to 1) and `result[tune.metric]`. Trials that were stopped early
    count behind all that went to the end, those that came farther first. Failed ones count as the worst of all, so that
    a setting that diverges or does not fit into memory is avoided and not drawn again. Running ones count as bad
    (constant liar), so that trials which run at once lie apart.

    Args:
        known: trials of the journal, from which it learns.
        unfinished: those of them that go on, which are handed out first, with their own settings.
        first: number of the first new trial.
        on_new: called with number and settings of each new trial, before it is handed out.
    """

    def __init__(
        self,
        space: Space,
        tune: Tune,
        known: Sequence[Trial],
        unfinished: Known,
        first: int,
        on_new: Callable[[int, Settings], None],
    ) -> None:
        super().__init__()  # without the metric: Ray Tune would then refuse results that do not hold it yet
        self._space = space
        self._tune = tune
        self._on_new = on_new
        self._next = first
        self._wanted = tune.wanted or 0
        # A third of the trials, 4 to 10, are random: fewer tell little, and Optuna's own 10 would be most of 16.
        self._startup = min(max(self._wanted // 3, 4), 10)
        self._unfinished = unfinished
        self._running: dict[str, _Running] = {}
        self._seen = {_text(trial.settings) for trial in known}
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # else a line for each trial, through the live table
        self._study = optuna.create_study(
            direction="minimize" if tune.mode == "min" else "maximize", pruner=optuna.pruners.NopPruner()
        )
        for trial in known:
            try:
                remembered = self._remembered(trial)
            except (KeyError, ValueError) as error:
                raise RecipeError(
                    f"trial {trial.name} has settings that tune.space does not hold: {trial.settings}",
                    ["resume with the space that the sweep began with", "begin another sweep, under another run.name"],
                ) from error
            if trial.over:
                self._study.add_trial(remembered)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """{"number", "settings"} of the next trial; None where those that are left wait, FINISHED where none is.

        Raises:
            RecipeError: an expression cannot be computed for any of many draws.
        """
        if (known := self._unfinished.next()) is not None:
            self._study.enqueue_trial(self._space.parameters(known.settings))
            trial = self._asked(known.number, 0)
            self._space.suggest(trial)
            self._running[trial_id] = _Running(trial)
            for report in known.reports:
                self._running[trial_id].note(report.progress, report.value)
            return {"number": known.number, "settings": known.settings}
        new = self._new() if self._next < self._wanted else None
        if new is None:
            return None if self._unfinished else self.FINISHED
        trial, settings = new
        number, self._next = self._next, self._next + 1
        self._running[trial_id] = _Running(trial)
        self._on_new(number, settings)
        return {"number": number, "settings": settings}

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """Note a trial's metric on its way."""
        value = result.get(self._tune.metric)
        if value is not None:
            self._running[trial_id].note(result["progress"], value)

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """Note how a trial ended: at its end, before it, or by failing. Ray Tune gives no result of one that waited."""
        running = self._running.pop(trial_id)
        value = None if result is None else result.get(self._tune.metric)
        if result is not None and value is not None:
            running.note(result["progress"], value)
        last = max(running.noted.items(), default=None)
        if error or (result is not None and (last is None or "failed" in result)):
            self._study.tell(running.trial, state=TrialState.FAIL)
            self._study.add_trial(_worst(running.trial.params, running.trial.distributions))
        elif last is None:
            self._study.tell(running.trial, state=TrialState.FAIL)
        elif last[0] < PARTS:
            self._study.tell(running.trial, state=TrialState.PRUNED)
        else:
            self._study.tell(running.trial, last[1])

    def save(self, checkpoint_path: str) -> None:
        """Part of Ray Tune's snapshot: nothing, since the journal holds all that a resumed sweep needs."""

    def _new(self) -> tuple[optuna.Trial, Settings] | None:
        """Settings that were not tried yet; None where many draws in a row were."""
        fault: RecipeError | None = None
        repeated = False
        for attempt in range(PATIENCE):
            trial = self._asked(self._next, attempt)
            try:
                settings = self._space.suggest(trial)
            except RecipeError as error:  # of an expression that cannot be computed for these values: others may do
                fault = error
            else:
                if (text := _text(settings)) not in self._seen:
                    self._seen.add(text)
                    return trial, settings
                repeated = True
            self._study.tell(trial, state=TrialState.FAIL)
        if fault is not None and not repeated:
            raise fault
        return None

    def _asked(self, number: int, attempt: int) -> optuna.Trial:
        seed = random.Random(f"{self._space.seed}/{number}/{attempt}").getrandbits(32)
        guided = optuna.samplers.TPESampler(seed=seed, n_startup_trials=self._startup, constant_liar=True)
        self._study.sampler = guided if attempt < GUIDED else optuna.samplers.RandomSampler(seed=seed)
        return self._study.ask()

    def _remembered(self, trial: Trial) -> optuna.trial.FrozenTrial:
        """A trial of the journal that is over, as Optuna has it."""
        fixed = optuna.trial.FixedTrial(self._space.parameters(trial.settings))
        self._space.suggest(fixed)
        noted = {_part(one.progress): one.value for one in trial.reports if math.isfinite(one.value)}
        if trial.status == "failed" or not noted:
            return _worst(fixed.params, fixed.distributions)
        finished = trial.status == "finished"
        return optuna.trial.create_trial(
            state=TrialState.COMPLETE if finished else TrialState.PRUNED,
            value=noted[max(noted)] if finished else None,
            params=fixed.params,
            distributions=fixed.distributions,
            intermediate_values=noted,
        )


class _Running:
    """A trial that runs, and what it reported: by parts of the run, since Optuna keeps the first value of each."""

    def __init__(self, trial: optuna.Trial) -> None:
        self.trial = trial
        self.noted: dict[int, float] = {}

    def note(self, progress: float, value: float) -> None:
        if math.isfinite(value) and _part(progress) not in self.noted:
            self.noted[_part(progress)] = value
            self.trial.report(value, _part(progress))


def _worst(params: dict[str, Any], distributions: dict[str, Any]) -> optuna.trial.FrozenTrial:
    """A trial behind all others: TPE passes over what failed, and ranks a pruned trial without a value last."""
    return optuna.trial.create_trial(state=TrialState.PRUNED, params=params, distributions=distributions)


def _part(progress: float) -> int:
    return round(progress * PARTS)


def _text(settings: Settings) -> str:
    return json.dumps(settings, sort_keys=True)
