"""Sweeps as they grow in trials, without training: Ray Tune's part is played by a loop that tells the same things.

Each trial reports a loss that falls, the lower the better its settings, and is paused, stopped and finished by the
product's scheduler; the journal and the table are the product's too. What is timed is all of it.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

from rich.console import Console

from benchmarks.scale.growth import Series, measured, timed
from ray_ft import recipe, report
from ray_ft.recipe import Recipe
from ray_ft.tune import results, run, schedule, search
from ray_ft.tune.journal import Sweep
from ray_ft.tune.proposals import Known, Planned, Proposals, Slots
from ray_ft.tune.schedule import PROGRESS, STEP, Halving
from ray_ft.tune.space import Space
from ray_ft.tune.table import Table
from ray_ft.tune.watch import Watch
from ray_ft.view import View

TRIALS = (1, 4, 16, 64)
MANY_TRIALS = 512
AT_ONCE = 4
STEPS = 64
REPORT_EVERY = 4
SPACE = {
    "train.optimizer.lr": {"loguniform": [1e-5, 1e-2]},
    "train.optimizer.weight_decay": {"uniform": [0.0, 0.2]},
}


def sweep_recipe(folder: str, trials: int, **tune: Any) -> Recipe:
    source = {"path": [os.path.join(folder, "rows.jsonl")], "format": "text"}
    section = {"space": SPACE, "metric": "loss", "scheduler": "asha", "trials": trials, **tune}
    return recipe.parse(
        {
            "run": {"name": "sweep", "storage": folder},
            "model": {"path": os.path.join(folder, "base")},
            "data": {"train": [source]},
            "train": {"global_batch": 8},
            "tune": section,
        }
    )


class Fake:
    """A trial as Ray Tune has it, as far as the product looks at it."""

    def __init__(self, number: int, settings: dict[str, Any]) -> None:
        self.config = {"trial": {"number": number, "settings": settings}}
        self.trial_id = f"trial-{number}"
        self.status, self.is_saving, self.at = "RUNNING", False, 0
        self.last_result: dict[str, Any] = {}
        self.checkpoint = None

    def is_finished(self) -> bool:
        return self.status == "TERMINATED"

    def step(self) -> dict[str, Any]:
        """The next report: falls with progress, the lower the nearer the learning rate is to 1e-3."""
        self.at += REPORT_EVERY
        away = abs(math.log10(self.config["trial"]["settings"]["train.optimizer.lr"]) + 3)
        progress = self.at / STEPS
        value = (4 - 3.2 * progress**0.4) * (0.5 + 0.5 * away)
        self.last_result = {"loss": value, STEP: self.at, "total": STEPS, PROGRESS: progress, "seconds": float(self.at)}
        return {**self.last_result, "alive": {"step": self.at, "loss": value, "total": STEPS}}


class Loop:
    """Ray Tune's loop: one trial is started or heard of at a time, the scheduler asked what becomes of it."""

    def __init__(self, base: Recipe, folder: str) -> None:
        assert base.tune is not None
        self.base, self.section = base, base.tune
        self.sweep = Sweep.create(base)
        self.space = Space(base)
        self.trials: list[Fake] = []
        self.reports = 0
        self.deciding = 0.0

    def play(self) -> Sweep:
        section, slots = self.section, Slots(AT_ONCE)
        settings = search.planned(self.space, section)
        record = run._Recorder(self.sweep, self.base)
        for number, one in enumerate(settings or ()):
            record(number, one)
        count = section.trials or 0
        view = View(Console(quiet=True))
        scheduler: Any = schedule.make(self.space, section, STEPS, [], count, slots)
        assert isinstance(scheduler, Halving), "the loop plays ASHA alone"
        waiting = Known(list(self.sweep.trials.values()), slots, scheduler.rungs, lambda _: None)
        source: Any = Planned(waiting, section.metric, section.mode)
        if settings is None:
            source = search.TPE(self.space, section, [], waiting, 0, record)
        door: Any = SimpleNamespace(inside=SimpleNamespace(remote=list), seconds=SimpleNamespace(remote=dict))
        watch = Watch(self.sweep, Table(self.sweep, view, count, section), section, 1, slots, door)
        proposals = Proposals(source, slots, count)
        with mock.patch("ray.get", lambda value: value):
            self._until_all_are_over(scheduler, proposals, watch)
        return self.sweep

    def _until_all_are_over(self, scheduler: Halving, proposals: Proposals, watch: Watch) -> None:
        controller: Any = SimpleNamespace(get_trials=lambda: self.trials, stop_trial=None)
        controller.stop_trial = lambda trial: self._over(trial, scheduler, proposals, watch, controller)
        turn = 0
        while True:
            watch.on_step_begin(0, self.trials)
            began = time.perf_counter()
            chosen = scheduler.choose_trial_to_run(controller)
            found = None if chosen else proposals.suggest(f"trial-{len(self.trials)}")
            self.deciding += time.perf_counter() - began
            if chosen is None and isinstance(found, dict):
                chosen = Fake(**found["trial"])
                self.trials.append(chosen)
                scheduler.on_trial_add(controller, chosen)
            if chosen is not None:
                chosen.status = "RUNNING"
                watch.on_trial_start(0, self.trials, chosen)
            running = [trial for trial in self.trials if trial.status == "RUNNING"]
            if not running and all(trial.is_finished() for trial in self.trials) and proposals._slots.exhausted:
                return
            if running:
                trial = running[turn % len(running)]
                turn += 1
                self._hear(trial, scheduler, proposals, watch, controller)
            watch.on_step_end(0, self.trials)

    def _hear(self, trial: Fake, scheduler: Halving, proposals: Proposals, watch: Watch, controller: Any) -> None:
        result = trial.step()
        self.reports += 1
        began = time.perf_counter()
        decision = scheduler.on_trial_result(controller, trial, result)
        proposals.on_trial_result(trial.trial_id, result)
        self.deciding += time.perf_counter() - began
        watch.on_trial_result(0, self.trials, trial, result)
        if decision == "PAUSE":
            trial.status = "PAUSED"
        elif decision == "STOP" or result[PROGRESS] >= 1:
            self._over(trial, scheduler, proposals, watch, controller)

    def _over(self, trial: Fake, scheduler: Halving, proposals: Proposals, watch: Watch, controller: Any) -> None:
        trial.status = "TERMINATED"
        scheduler.on_trial_complete(controller, trial, trial.last_result)
        proposals.on_trial_complete(trial.trial_id, trial.last_result)
        watch.on_trial_complete(0, self.trials, trial)


def by_trials(scratch: str, repeat: int, sizes: Sequence[int] = TRIALS, search_: str = "random") -> list[Series]:
    folder = os.path.join(scratch, "sweeps")

    def play(size: int) -> dict[str, float]:
        shutil.rmtree(folder, ignore_errors=True)
        base = sweep_recipe(folder, size, search=search_)
        loop = Loop(base, folder)
        seconds = timed(loop.play)
        assert all(trial.over for trial in loop.sweep.trials.values()), "a trial was left"
        assert len(loop.sweep.trials) == size
        found = {
            "as a whole": seconds,
            "deciding alone": loop.deciding,
            "as a whole, for each report": seconds / loop.reports,
        }
        if search_ == "optuna":
            return found
        read: list[Sweep] = []
        quiet = View(Console(quiet=True))
        return {
            **found,
            "reading the journal": timed(lambda: read.append(Sweep.load(loop.sweep.root))),
            "writing table and best": timed(lambda: (results.write_table(read[0]), results.write_best(read[0], base))),
            "report": timed(lambda: report.report(loop.sweep.root, quiet)),
        }

    names = measured(sizes, play, repeat)
    return [
        Series(
            f"sweep ({'TPE' if search_ == 'optuna' else search_}, ASHA), {name}",
            "trials",
            "s",
            0.0 if name.endswith("for each report") else 1.0,
            values,
        )
        for name, values in names.items()
    ]


def series(scratch: str, repeat: int, many: bool) -> list[Series]:
    sizes = (*TRIALS, MANY_TRIALS) if many else TRIALS
    return [*by_trials(scratch, repeat, sizes), *by_trials(scratch, repeat, sizes, "optuna")]
